"""The k-th largest magnitude of a tensor that comes in parts, exactly, in two passes and without a sort.

A magnitude is its fp32 bit pattern without the sign, and patterns are ordered as the numbers are. The first pass counts
how often each pattern of the upper 15 bits occurs (8 of exponent, 7 of mantissa: bins less than a hundredth of their
value wide), which tells in whose bin the k-th largest lies; the second counts the lower 16 bits in that one bin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from quantlab.merging.methods.blocks import flat

UPPER, LOWER = 15, 16  # bits of a magnitude's pattern
RUN = 1 << 18  # elements that are counted together: their 1 MB of scratch against counts of 0.25 MB

Ranks = Callable[[int, int], Sequence[int]]  # (model, elements) -> how many of the largest are asked for: some answers
EVERYWHERE = 1 << 62  # an index behind every element


@dataclass(frozen=True)
class Cutoff:
    """Which elements are the k largest of a tensor: those above `magnitude`, and the first of those that equal it.

    Attributes:
        magnitude: of the k-th largest; -1 where all are kept, infinity where none is.
        start: every equal element whose index in the flattened tensor is less is kept, ...
        stop: ... none from this index on, ...
        within: ... and so many, the first ones, from `start` up to `stop`.
    """

    magnitude: float
    start: int = EVERYWHERE
    stop: int = EVERYWHERE
    within: int = 0

    def edge(self, delta: Callable[[int, int], torch.Tensor], offset: int, count: int) -> int:
        """How many elements at the beginning of a part are kept if they equal `magnitude`.

        Args:
            delta: gives elements first to last of the part, fp32.
            offset: index of the part's first element; at most `start`, or at least `stop`.
            count: elements in the part.
        """
        if offset + count <= self.start:
            return count
        if offset >= self.stop:
            return 0
        assert offset <= self.start, "a part to merge begins inside a part of the survey"
        left = self.within
        for first in range(self.start - offset, count, RUN):
            last = min(count, first + RUN)
            places = (delta(first, last).abs() == self.magnitude).nonzero().flatten()
            if len(places) >= left:
                return first + int(places[left - 1]) + 1
            left -= len(places)
        return count


ALL = Cutoff(-1.0)
NONE = Cutoff(math.inf)


class MagnitudeSurvey:
    """Finds the cutoffs of the largest elements of every model's difference from the base.

    `result()` is a tuple over models of tuples of Cutoffs, one for each of the model's ranks.

    Args:
        ranks: how many of the largest are asked for, once the number of elements is known.
        keeps_ties: whether all elements that equal the k-th largest are kept, for surveys of more than one tensor.
    """

    passes = 2

    def __init__(self, ranks: Ranks, *, keeps_ties: bool = False) -> None:
        self._ranks, self._keeps_ties = ranks, keeps_ties
        self._passed, self._seen = 0, 0  # passes, elements of this pass
        self._counts: list[torch.Tensor] = []  # by model, of each pattern of the upper bits
        self._searches: list[list[_Search | Cutoff]] = []
        self._bits = torch.empty(RUN, dtype=torch.int32)

    def add(self, base: torch.Tensor | None, tensors: Sequence[torch.Tensor]) -> None:
        assert base is not None
        if not self._counts:
            self._counts = [torch.zeros(1 << UPPER, dtype=torch.int64) for _ in tensors]
        origin = flat(base)
        for model, tensor in enumerate(tensors):
            if self._passed == 0:
                for bits in self._patterns(flat(tensor), origin):
                    bits.bitwise_right_shift_(LOWER)
                    self._counts[model].add_(torch.bincount(bits, minlength=1 << UPPER))
            elif searches := [search for search in self._searches[model] if isinstance(search, _Search)]:
                for bits in self._patterns(flat(tensor), origin):
                    for search in searches:
                        search.add(bits.numpy().view(np.uint32))
                for search in searches:
                    search.end_part(self._seen, self._seen + len(origin))
        self._seen += len(origin)

    def end_pass(self) -> None:
        if self._passed == 0:
            self._searches = [
                [_search(counts.numpy(), rank, self._seen, self._keeps_ties) for rank in self._ranks(model, self._seen)]
                for model, counts in enumerate(self._counts)
            ]
        self._passed, self._seen = self._passed + 1, 0

    def result(self) -> tuple[tuple[Cutoff, ...], ...]:
        assert self._passed == self.passes
        return tuple(
            tuple(found if isinstance(found, Cutoff) else found.cutoff() for found in searches)
            for searches in self._searches
        )

    def _patterns(self, values: torch.Tensor, base: torch.Tensor) -> Iterator[torch.Tensor]:
        """The differences' magnitudes as int32 patterns, run by run; good until the next run."""
        for first in range(0, len(values), RUN):
            run = values[first : first + RUN]
            bits = self._bits[: len(run)]
            torch.sub(run, base[first : first + RUN], out=bits.view(torch.float32)).abs_()
            yield bits


def _search(counts: npt.NDArray[np.int64], rank: int, size: int, keeps_ties: bool) -> _Search | Cutoff:
    if rank <= 0:
        return NONE
    if rank >= size:
        return ALL
    above, upper = _descend(counts, rank)
    return _Search(upper, rank - above, keeps_ties)


def _descend(counts: npt.NDArray[np.int64], rank: int) -> tuple[int, int]:
    """The bin that holds the `rank`-th largest, and how many are in the bins above it: (above, bin)."""
    from_top = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_top, rank))
    above = int(from_top[place - 1]) if place else 0
    return above, len(counts) - 1 - place


class _Search:
    """Counts the lower bits of the magnitudes in one bin, part by part, to find the `rank`-th largest of them."""

    def __init__(self, upper: int, rank: int, keeps_ties: bool) -> None:
        self._upper, self._rank, self._keeps_ties = upper, rank, keeps_ties
        self._counts = np.zeros(1 << LOWER, np.int64)
        self._found: list[npt.NDArray[np.uint32]] = []  # in this part
        self._parts: list[_PartCounts] = []

    def add(self, patterns: npt.NDArray[np.uint32]) -> None:
        """See some magnitudes."""
        lower = np.subtract(patterns, self._upper << LOWER)  # those below the bin wrap around
        self._found.append(lower[np.flatnonzero(lower < 1 << LOWER)])

    def end_part(self, start: int, stop: int) -> None:
        """What was seen since the last part are the elements from `start` to `stop`."""
        found = np.concatenate(self._found) if self._found else np.empty(0, np.uint32)
        counts = np.bincount(found, minlength=1 << LOWER)
        self._found.clear()
        self._counts += counts
        if not self._keeps_ties:
            present = np.flatnonzero(counts)
            self._parts.append(_PartCounts(start, stop, present.astype(np.uint16), counts[present].astype(np.int32)))

    def cutoff(self) -> Cutoff:
        above, lower = _descend(self._counts, self._rank)
        magnitude = float(np.uint32(self._upper << LOWER | lower).view(np.float32))
        left = self._rank - above  # of those equal to it
        if self._keeps_ties or magnitude == 0 or left == int(self._counts[lower]):
            return Cutoff(magnitude)
        for part in self._parts:
            here = part.count(lower)
            if here >= left:
                return Cutoff(magnitude, part.start, part.stop, left)
            left -= here
        raise AssertionError("fewer elements than were counted")


@dataclass(frozen=True)
class _PartCounts:
    """How often lower bits occur in a part: those that do, ascending."""

    start: int
    stop: int
    present: npt.NDArray[np.uint16]
    counts: npt.NDArray[np.int32]

    def count(self, lower: int) -> int:
        place = int(np.searchsorted(self.present, lower))
        is_present = place < len(self.present) and int(self.present[place]) == lower
        return int(self.counts[place]) if is_present else 0


class KnownBeforehand:
    """A survey that need not see the data: its result is known."""

    passes = 0

    def __init__(self, result: tuple[tuple[Cutoff, ...], ...]) -> None:
        self._result = result

    def add(self, base: torch.Tensor | None, tensors: Sequence[torch.Tensor]) -> None:
        raise AssertionError("there is no pass")

    def end_pass(self) -> None:
        raise AssertionError("there is no pass")

    def result(self) -> tuple[tuple[Cutoff, ...], ...]:
        return self._result
