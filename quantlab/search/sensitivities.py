"""What each format of each tensor costs, in nats per token: measured where it matters, else by a cheap prior."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from quantlab.checkpoint import Checkpoint
from quantlab.formats import BlockFormat
from quantlab.search.candidates import CANDIDATES, Candidates
from quantlab.search.measuring import Meter
from quantlab.search.overlay import OverlaidCheckpoint
from quantlab.search.plan_work import PlanWork

Progress = Callable[[int, int, str], None]
MEASURED_SHARE = 0.95  # of a plan's predicted divergence that measurements must bear out


@dataclass(frozen=True)
class Figure:
    """The KL divergence that one tensor in one format adds; `stderr` is None where it is an estimate."""

    kld: float
    stderr: float | None


class Sensitivities:
    """The table of figures, which grows as it is measured.

    An estimate is the nearest measured figure of the same tensor times the ratio of the priors: the divergence is close
    to quadratic in the error, and the formats' errors of one tensor are alike but for their size. Without any, the
    prior is scaled by the median of its kind of tensor, or of all.

    Args:
        prior: error shares by (tensor, format).
        kinds: what sort of tensor each is.
    """

    def __init__(self, prior: Mapping[tuple[str, str], float], kinds: Mapping[str, str]) -> None:
        self._prior, self._kinds = prior, kinds
        self._measured: dict[tuple[str, str], Figure] = {}

    def add(self, name: str, format: str, kld: float, stderr: float) -> None:
        """Take a measurement."""
        self._measured[name, format] = Figure(kld, stderr)

    @property
    def measured(self) -> int:
        """How many figures are measurements."""
        return len(self._measured)

    def by_weight(self, names: Sequence[str], format: str) -> list[str]:
        """First one tensor of each kind, the heaviest by the prior, since it scales its kind; then all by the prior."""
        ordered = sorted(names, key=lambda name: -self._prior[name, format])
        firsts = {self._kinds[name]: name for name in reversed(ordered)}
        return sorted(ordered, key=lambda name: firsts[self._kinds[name]] != name)

    def figure(self, name: str, format: str) -> Figure:
        """The measurement, or an estimate."""
        if (name, format) in self._measured:
            return self._measured[name, format]
        prior = self._prior[name, format]
        known = [f.name for f in CANDIDATES if (name, f.name) in self._measured and self._prior[name, f.name] > 0]
        if known and prior > 0:
            near = min(known, key=lambda other: abs(np.log(prior / self._prior[name, other])))
            return Figure(self._measured[name, near].kld * prior / self._prior[name, near], None)
        return Figure(prior * self._scale(self._kinds[name]), None)

    def _scale(self, kind: str) -> float:
        """Divergence for each unit of the prior."""
        for same in (True, False):
            scales = [
                figure.kld / self._prior[key]
                for key, figure in self._measured.items()
                if self._prior[key] > 0 and (not same or self._kinds[key[0]] == kind)
            ]
            if scales:
                return statistics.median(scales)
        return 1.0


class Prober:
    """Measures one tensor at a time in another format, all others float."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        candidates: Candidates,
        meter: Meter,
        work: PlanWork,
        table: Sensitivities,
    ) -> None:
        self._checkpoint, self._candidates, self._meter = checkpoint, candidates, meter
        self._work, self.table = work, table

    def probe(self, wanted: Sequence[tuple[str, BlockFormat]], progress: Progress) -> None:
        """Measure what is not measured yet, or take it from the work folder."""
        total = len(wanted) * self._meter.tokens
        for number, (name, format) in enumerate(wanted):
            start = number * self._meter.tokens

            def count(done: int, start: int = start, name: str = name, format: BlockFormat = format) -> None:
                progress(start + done, total, f"{name} {format.name}")

            key = f"{name} {format.name}"
            found = self._work.get(key)
            if found is None:
                blocks = self._candidates.blocks(name, format)
                found = self._meter.measure(OverlaidCheckpoint(self._checkpoint, {name: (format, blocks)}), count)
                self._work.add(key, found)
            count(self._meter.tokens)
            self.table.add(name, format.name, found.kld, found.stderr)

    def missing(self, chosen: Mapping[str, BlockFormat]) -> list[tuple[str, BlockFormat]]:
        """The largest estimates in a choice, until the others are less than a twentieth of its sum."""
        figures = {name: self.table.figure(name, format.name) for name, format in chosen.items()}
        total = sum(figure.kld for figure in figures.values())
        guessed = sorted((name for name in chosen if figures[name].stderr is None), key=lambda n: -figures[n].kld)
        allowed, found = (1 - MEASURED_SHARE) * total, []
        remaining = sum(figures[name].kld for name in guessed)
        for name in guessed:
            if remaining <= allowed:
                break
            found.append((name, chosen[name]))
            remaining -= figures[name].kld
        return found
