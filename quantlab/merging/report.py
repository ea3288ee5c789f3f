"""What a merge reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantlab.merging.conflicts import ConflictReport


@dataclass(frozen=True)
class TensorOutcome:
    """One written tensor.

    Attributes:
        how: "merged", or "copied" where all inputs are equal; "planned" in a dry run.
        format: a block format's name, or an element type in lower case.
        requantization_error: the norm of what packing changed over that of the merged weights; None for a float tensor.
    """

    name: str
    shape: tuple[int, ...]
    how: str
    format: str
    requantization_error: float | None = None


@dataclass(frozen=True)
class MergeReport:
    """What was merged.

    Attributes:
        tensors: how many were written; `copied` of them are byte for byte as in the inputs, or those bytes' values.
        bytes: of tensors in the output, of a GGUF file the whole.
        peak_rss_bytes: the most memory that the process has had resident, pages of mapped files included.
        memory_bytes: the most data that the merge was planned to have; 0 where none was planned.
        requantization_error: over all packed tensors, the norm of what packing changed over that of the merged weights;
            None for a float output.
        details: a line for every tensor.
        conflicts: how far the models disagree, if that was asked for.
    """

    method: str
    tensors: int
    copied: int
    parameters: int
    bytes: int
    seconds: float
    peak_rss_bytes: int
    memory_bytes: int
    requantization_error: float | None
    details: tuple[TensorOutcome, ...]
    notes: tuple[str, ...]
    conflicts: ConflictReport | None = None
