"""Adapters as the native decoder takes them: by layer, the A of each input and the B of the matrices that read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from quantlab import native
from quantlab.generation.decoder_layout import DecoderLayout

# The decoder's matrices -> the input that they read.
INPUTS = {
    "query": "attention",
    "key": "attention",
    "value": "attention",
    "output": "output",
    "gate": "inner",
    "up": "inner",
    "down": "down",
}


@dataclass
class _Stack:
    """The A of one input, and of each of its matrices which of A's rows its B takes, from `first` on."""

    a: list[np.ndarray] = field(default_factory=list)
    updates: list[tuple[str, int, np.ndarray]] = field(default_factory=list)  # matrix, first, B
    rank: int = 0


def decoder_adapters(
    factors: Mapping[str, tuple[np.ndarray, np.ndarray]], layout: DecoderLayout, layers: int
) -> native.DecoderAdapters:
    """From `stacked_factors` of weights that the layout's checkpoint has.

    A tensor that several matrices share (query, key and value in one) has one A for all of them, and its B is cut and
    ordered as its rows are.
    """
    stacks: dict[tuple[int, str], _Stack] = {}
    for name, (a, b) in factors.items():
        layer, kind, _ = layout.place(name)
        order = layout.row_order(name)
        rows = b if order is None else b[order]
        for role, part in layout.roles(name, kind):
            stack = stacks.setdefault((layer, INPUTS[role]), _Stack())
            stack.updates.append((role, stack.rank, np.ascontiguousarray(rows[part.start : part.stop])))
        stack.a.append(a)
        stack.rank += len(a)
    made = native.DecoderAdapters(layers)
    for (layer, input_name), stack in stacks.items():
        made.set_input(layer, input_name, np.concatenate(stack.a))
        for role, first, b in stack.updates:
            made.set_rows(layer, role, first, b)
    return made
