"""What a model is trained on: token ids, and which of them carry loss."""

from __future__ import annotations

from dataclasses import dataclass

NO_LOSS = -100  # a label that torch's cross-entropy, and so transformers and TRL, leave out


@dataclass(frozen=True)
class Sample:
    """`labels[i]` is `input_ids[i]` where that token is to be predicted from those before it, else -100. The first is
    always -100: nothing precedes it, and in a packed batch another sample would.

    `place` names its file and line. `as_served` says whether its prompt's ids are those that a request with the same
    prompt gives; None where it has no prompt.
    """

    input_ids: list[int]
    labels: list[int]
    place: str
    as_served: bool | None = None

    @property
    def trained(self) -> list[int]:
        """The ids that carry loss."""
        return [label for label in self.labels if label != NO_LOSS]


def sample_of(ids: list[int], spans: list[tuple[int, int]], place: str, as_served: bool | None) -> Sample:
    """`ids` with loss on the tokens of `spans`, each from its first to before its second number."""
    labels = [NO_LOSS] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    labels[:1] = [NO_LOSS]
    return Sample(ids, labels, place, as_served)
