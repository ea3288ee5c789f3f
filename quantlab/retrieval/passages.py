"""Passages: what a search gives back."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Passage:
    """A piece of a document that may answer a question.

    Attributes:
        source: the document, as a path within the indexed folder, parted by "/".
        text: the piece; in documents with headings after the headings that it stands under.
        score: higher is better; what it measures depends on the method of the search.
        place: where in the document, such as "page 3" or "lines 10 to 24"; empty where that says nothing.
        position: the number of the piece in its document, from 0.
        vector_rank: its place among the nearest vectors, from 1; None if it is not among them.
        keyword_rank: its place among the passages that share words with the question, likewise.
    """

    source: str
    text: str
    score: float
    place: str = ""
    position: int = 0
    vector_rank: int | None = None
    keyword_rank: int | None = None

    @property
    def cited(self) -> str:
        """Source and place as one text."""
        return f"{self.source}, {self.place}" if self.place else self.source
