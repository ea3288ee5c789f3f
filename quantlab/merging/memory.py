"""How a merge keeps within a memory limit: how many rows it takes at a time, and how many tensors side by side.

The limit counts what Linux counts as the process's data (VmData, which RLIMIT_DATA bounds): heap, anonymous mappings
and threads' stacks. Inputs are read, not mapped, so that no file adds to it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantlab.checkpoint.byte_sizes import bytes_of
from quantlab.checkpoint.tensors import DTYPE_BYTES
from quantlab.errors import InputError
from quantlab.merging.methods.method import MergeMethod
from quantlab.merging.methods.table import METHODS
from quantlab.merging.plan_types import Part, TensorPlan
from quantlab.merging.references import ModelReference
from quantlab.merging.sources import MergeSource

DEFAULT_LIMIT = 2_000_000_000
LEAST_ROOM = 1_000_000_000  # beside other data of the process, where no limit is given
PART_ELEMENTS = 1 << 18  # of one tensor: with those of a few models they stay in a processor's cache
LEAST_PART = 1 << 12  # elements: below, a part's costs are those of the calls
STACK_BYTES = 8 << 20  # of a thread
SCRATCH_BYTES = 24 << 20  # of a worker: surveys' counts, a method's small tables
OBSERVED_COPIES = 3  # of an input part, itself among them, while a conflict report looks at it
HEAP_BYTES = 48 << 20  # that the heap keeps for the next part, and for the threads in common


def limit_of(max_ram: int | str | None) -> int:
    """A limit in bytes. None is 2 GB, or 1 GB beyond what the process holds where that is more: a merge in a program
    that has other data is not refused for it unless it is told a limit.

    Raises:
        InputError: a text that is no number of bytes.
    """
    if max_ram is None:
        return max(DEFAULT_LIMIT, data_bytes() + LEAST_ROOM)
    return bytes_of(max_ram) if isinstance(max_ram, str) else max_ram


def data_bytes() -> int:
    """The process's data at the moment; 0 where the system does not tell."""
    return _status("VmData") or 0


def peak_resident_bytes() -> int:
    """The most memory that the process has had resident so far, pages of mapped files included."""
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(field: str) -> int | None:
    """A number of bytes that Linux gives for this process."""
    if sys.platform.startswith("linux"):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None


@dataclass(frozen=True)
class TensorWork:
    """A planned tensor, how many of its rows (of a vector: elements) are merged at a time, and the bytes it takes."""

    plan: TensorPlan
    rows_a_part: int
    nbytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """How the tensors are worked on.

    Attributes:
        works: in the order of the plan.
        workers: at a time.
        available: bytes for all tensors that are at work.
        expected: the most data that the process will have.
    """

    works: tuple[TensorWork, ...]
    workers: int
    available: int
    expected: int


def plan_memory(
    tensors: Sequence[TensorPlan],
    sources: Mapping[ModelReference, MergeSource],
    writes_through: Callable[[str], bool],
    *,
    limit: int,
    threads: int,
    observed: bool = False,
) -> MemoryPlan:
    """Fit a merge into `limit` bytes of data; the process is to have opened everything already.

    Args:
        writes_through: whether rows of an output tensor are written as they come (`CheckpointWriter.writes_through`).
        observed: whether parts are shown to a conflict report, which copies them.

    Raises:
        InputError: it does not fit; the message says how much it takes.
    """
    costs = [_Cost(plan, sources, writes_through(plan.name), observed) for plan in tensors]
    base = data_bytes()
    for workers in range(max(1, threads), 0, -1):
        fixed = base + HEAP_BYTES + STACK_BYTES + workers * (SCRATCH_BYTES + 2 * STACK_BYTES)
        available = limit - fixed
        works = [cost.fitted(available // workers) for cost in costs]
        largest = max(works, key=lambda work: work.nbytes, default=None)
        if largest is None or largest.nbytes <= available:
            most = sum(sorted((work.nbytes for work in works), reverse=True)[:workers])
            return MemoryPlan(tuple(works), workers, available, fixed + min(most, available))
    assert largest is not None
    plan, method = largest.plan, METHODS[largest.plan.method]
    whole = " at once" if method.grain == "tensor" else ""
    raise InputError(
        f"--max-ram {_gb(limit)}: {plan.method} needs {_gb(fixed + largest.nbytes)} for {plan.name} {list(plan.shape)} "
        f"of {len(plan.parts)} models{whole}; allow at least so much"
    )


def _gb(count: int) -> str:
    """Rounded up, so that what is named is enough."""
    return f"{math.ceil(count / 1e7) / 100:.2f}GB"


class _Cost:
    """What one tensor takes, by the rows of a part."""

    def __init__(
        self,
        plan: TensorPlan,
        sources: Mapping[ModelReference, MergeSource],
        writes_through: bool,
        observed: bool,
    ) -> None:
        self._plan, method = plan, METHODS[plan.method]
        self._rows = plan.shape[0] if plan.shape else 1
        self._columns = math.prod(plan.shape[1:])
        parts = (*plan.parts, *([plan.base] if plan.base is not None else []))
        self._whole = method.grain == "tensor" or (method.grain == "row" and len(plan.shape) < 2)
        read = sum(2 * _read_bytes(part, sources) for part in parts)
        out, update = DTYPE_BYTES[plan.dtype], 4 * any(_is_adapted(part, sources) for part in parts)
        copies = len(parts) * (OBSERVED_COPIES if observed else 1)
        self._element = 4 * (copies + workspace(method, plan.shape)) + read + out + update
        self._fixed = sum(sources[part.model].held_bytes(part.name) for part in parts if not part.zeros)
        if not writes_through:
            self._fixed += 2 * out * self._rows * self._columns

    def fitted(self, available: int) -> TensorWork:
        rows = self._rows if self._whole else min(self._rows, max(1, PART_ELEMENTS // max(1, self._columns)))
        while not self._whole and rows > 1 and rows * self._columns > LEAST_PART and self._bytes(rows) > available:
            rows = -(-rows // 2)
        return TensorWork(self._plan, max(1, rows), self._bytes(rows))

    def _bytes(self, rows: int) -> int:
        return self._fixed + math.ceil(rows * self._columns * self._element)


def _read_bytes(part: Part, sources: Mapping[ModelReference, MergeSource]) -> float:
    """Stored bytes of an element."""
    if part.zeros:
        return 0.0
    checkpoint = sources[part.model].checkpoint
    entry = checkpoint.entry(part.name)
    return entry.nbytes / max(1, math.prod(checkpoint.shape(part.name)))


def _is_adapted(part: Part, sources: Mapping[ModelReference, MergeSource]) -> bool:
    return not part.zeros and sources[part.model].is_adapted(part.name)


def workspace(method: MergeMethod, shape: tuple[int, ...]) -> float:
    """fp32 copies of a part that the method holds besides its inputs."""
    return method.workspace(shape) if callable(method.workspace) else method.workspace
