"""Documents as chunks: as many whole sentences as the embedding model reads, the last ones again in the next chunk.

Every character of a document is in some chunk. A chunk does not reach over a heading, and it carries the headings that
it stands under: a sentence says what it is about there as often as in its own words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, repeat

from quantlab.errors import InputError
from quantlab.retrieval.documents import Document
from quantlab.retrieval.sentences import code_blocks, lines, sentences, words

Count = Callable[[Sequence[str]], Sequence[int]]  # the tokens of each text

DEFAULT_TOKENS = 254  # all-MiniLM-L6-v2 reads 256, of which two mark the text's ends
OVERLAP_SHARE = 8  # the default overlap is this part of a chunk
HEADING_SHARE = 4  # headings may take this part of a chunk at most
HEADING_JOINT = " > "


@dataclass(frozen=True)
class Chunk:
    """The characters from `start` to `end` (exclusive) of a document. `text` is what is embedded and shown: the
    headings above them, then they themselves, without the blanks around them.
    """

    start: int
    end: int
    text: str


@dataclass(frozen=True)
class ChunkSize:
    """In tokens of the embedding model: the most that a chunk has, and the most of them that the next one repeats."""

    tokens: int
    overlap: int

    @classmethod
    def of(cls, model_tokens: int, tokens: int | None = None, overlap: int | None = None) -> ChunkSize:
        """Sizes that a model can read, by default at most 254 tokens with an eighth of them as overlap.

        Args:
            model_tokens: the most that the embedding model reads of a text.

        Raises:
            InputError: chunks of less than 16 tokens or more than the model reads, or an overlap of over a half.
        """
        size = min(DEFAULT_TOKENS, model_tokens) if tokens is None else tokens
        if not 16 <= size <= model_tokens:
            raise InputError(f"chunks of {size} tokens: the embedding model reads {model_tokens}; give 16 to that many")
        repeated = size // OVERLAP_SHARE if overlap is None else overlap
        if not 0 <= repeated <= size // 2:
            raise InputError(f"overlap of {repeated} tokens: 0 to {size // 2}, half a chunk, are possible")
        return cls(size, repeated)


@dataclass(frozen=True)
class _Section:
    """From one heading to the next: `above` are the headings over its own, `path` includes these."""

    start: int
    end: int
    above: tuple[str, ...]
    path: tuple[str, ...]


def chunks_of(document: Document, size: ChunkSize, count: Count) -> list[Chunk]:
    """Cut a document.

    Args:
        count: the embedding model's, without marks of a text's beginning and end.
    """
    found: list[Chunk] = []
    for section in _sections(document):
        found += _section_chunks(document, section, size, count)
    return found


def _sections(document: Document) -> list[_Section]:
    """The document from heading to heading; one with nothing under it belongs to the next one's section."""
    text, path = document.text, tuple[tuple[int, str], ...]()
    begun: list[tuple[int, tuple[str, ...], tuple[str, ...]]] = [(0, (), ())]
    own_end = 0  # of the headings that the last section begins with
    for heading in document.headings:
        path = (*(each for each in path if each[0] < heading.level), (heading.level, heading.title))
        titles = tuple(title for _, title in path)
        if text[own_end : heading.start].strip():
            begun.append((heading.start, titles[:-1], titles))
        else:
            start, above, _ = begun[-1]
            begun[-1] = (start, above, titles)
        line_end = text.find("\n", heading.start)
        own_end = len(text) if line_end < 0 else line_end
    ends = [start for start, _, _ in begun[1:]] + [len(text)]
    return [_Section(start, end, above, path) for (start, above, path), end in zip(begun, ends, strict=True)]


def _section_chunks(document: Document, section: _Section, size: ChunkSize, count: Count) -> list[Chunk]:
    most = size.tokens // HEADING_SHARE
    (above, above_tokens), (path, path_tokens) = (
        _headings(each, most, count) for each in (section.above, section.path)
    )
    room = size.tokens - max(above_tokens, path_tokens)
    borders, counts = _pieces(document, section, room, count)
    starts = [section.start, *borders[:-1]]
    found = []
    for first, last in _packed(counts, room, min(size.overlap, room // 2)):
        start, end = starts[first], borders[last - 1]
        over = path if first else above
        found.append(
            Chunk(start, end, f"{over}\n\n{body}" if (body := document.text[start:end].strip()) and over else body)
        )
    return found


def _headings(titles: Sequence[str], most: int, count: Count) -> tuple[str, int]:
    """The headings as one line of at most `most` tokens, the outermost left out first, and its tokens."""
    for outermost in range(len(titles)):
        line = HEADING_JOINT.join(titles[outermost:])
        if (tokens := count([line])[0]) <= most:
            return line, tokens
    return "", 0


def _pieces(document: Document, section: _Section, room: int, count: Count) -> tuple[list[int], list[int]]:
    """Ends and tokens of pieces of at most `room` tokens: sentences or blocks of code, and parts of longer ones; a
    single character may have more.
    """
    text, start = document.text, section.start
    ends = (code_blocks if document.kind == "code" else sentences)(text, start, section.end)
    counts = _counts(text, start, ends, count)
    for finer in chain((lines, words), repeat(_halves)):
        if max(counts) <= room:
            break
        parted = _refined(text, start, ends, counts, finer, room, count)
        if finer is _halves and parted == (ends, counts):
            break  # single characters of more tokens than that
        ends, counts = parted
    return ends, counts


def _refined(
    text: str,
    start: int,
    ends: Sequence[int],
    counts: Sequence[int],
    part: Callable[[str, int, int], list[int]],
    room: int,
    count: Count,
) -> tuple[list[int], list[int]]:
    """Pieces of more than `room` tokens parted, and what results joined again as far as it fits."""
    new_ends: list[int] = []
    new_counts: list[int] = []
    for before, end, tokens in zip([start, *ends], ends, counts, strict=False):
        if tokens <= room:
            new_ends.append(end)
            new_counts.append(tokens)
            continue
        parts = part(text, before, end)
        part_counts = _counts(text, before, parts, count)
        for first, last in _packed(part_counts, room, 0):
            new_ends.append(parts[last - 1])
            new_counts.append(sum(part_counts[first:last]))
    return new_ends, new_counts


def _counts(text: str, start: int, ends: Sequence[int], count: Count) -> list[int]:
    return list(count([text[before:end] for before, end in zip([start, *ends], ends, strict=False)]))


def _halves(text: str, start: int, end: int) -> list[int]:
    """A piece without any blank: of one character, there is nothing to part."""
    middle = (start + end) // 2
    return [middle, end] if end - start > 1 else [end]


def _packed(counts: Sequence[int], room: int, overlap: int) -> list[tuple[int, int]]:
    """(first, last exclusive) pieces of each chunk: as many as fit, then those again that the overlap has room for."""
    sums = [0, *accumulate(counts)]
    found = []
    first = last = 0
    while last < len(counts):
        last += 1  # a piece that is too large by itself has a chunk of its own
        while last < len(counts) and sums[last + 1] - sums[first] <= room:
            last += 1
        found.append((first, last))
        if last == len(counts):
            break
        begun, first = first, last
        while (
            first - 1 > begun and sums[last] - sums[first - 1] <= overlap and sums[last + 1] - sums[first - 1] <= room
        ):
            first -= 1
    return found
