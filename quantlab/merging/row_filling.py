"""Rows of embedding and head for tokens that a model does not have."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from quantlab.merging.plan_types import Part, TensorPlan


def fill_rows(
    plan: TensorPlan,
    first: int,
    base: torch.Tensor | None,
    tensors: Sequence[torch.Tensor],
    read_row: Callable[[Part, int], torch.Tensor],
) -> None:
    """Fill the rows that models lack, in place, as `TensorPlan` says.

    Args:
        first: the output row that the parts begin with.
        base: fp32 [rows, columns], where the plan has a base.
        tensors: of the parts, each fp32 [rows, columns]; rows of -1 hold anything.
        read_row: one row of a tensor, fp32 [columns].
    """
    count = len(tensors[0])
    held = [_held(part, first, count) for part in plan.parts]
    held_by_base = None if plan.base is None else _held(plan.base, first, count)
    for override in plan.overrides:
        at = override.row - first
        if 0 <= at < count:
            row = torch.zeros_like(tensors[0][0])
            if override.source is not None:
                row = read_row(override.source, override.source_row)
            everything = [*zip(tensors, held, strict=True), *_pair(base, held_by_base)]
            for tensor, has in everything:
                if override.force or not has[at]:
                    tensor[at], has[at] = row, True
    counted = torch.stack(held)
    if base is not None and held_by_base is not None:
        filling = ~held_by_base & counted.any(dim=0)
        base[filling] = _mean(tensors, counted, filling)
        base[~held_by_base & ~filling] = 0.0
        for tensor, has in zip(tensors, held, strict=True):
            tensor[~has] = base[~has]
        return
    lacking = ~counted.all(dim=0)
    if lacking.any():
        means = torch.zeros_like(tensors[0][lacking])
        means[counted.any(dim=0)[lacking]] = _mean(tensors, counted, lacking & counted.any(dim=0))
        for tensor, has in zip(tensors, held, strict=True):
            tensor[~has] = means[~has[lacking]]


def _pair(base: torch.Tensor | None, held: torch.Tensor | None) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    return () if base is None or held is None else ((base, held),)


def _held(part: Part, first: int, count: int) -> torch.Tensor:
    """Which of the rows the part's model has, bool [count]."""
    if part.rows is None:
        return torch.ones(count, dtype=torch.bool)
    return torch.tensor(part.rows[first : first + count]) >= 0


def _mean(tensors: Sequence[torch.Tensor], held: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The mean of chosen rows over the models that have them, added in the models' order."""
    total = torch.zeros_like(tensors[0][rows])
    for tensor, has in zip(tensors, held, strict=True):
        total += torch.where(has[rows][:, None], tensor[rows], 0.0)
    return total / held[:, rows].sum(dim=0)[:, None]
