"""One picture of a conflict report: maps of layers and kinds of tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from quantlab.errors import missing_extra
from quantlab.merging.conflicts import ConflictReport, TensorConflict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WRITTEN_UP_TO = 16  # columns whose cells hold their numbers
MOST_TICKS = 16


@dataclass(frozen=True)
class _Map:
    """One quantity: its values, colours, and the least range that the colours span."""

    title: str
    value: Callable[[TensorConflict], float | None]
    colours: str
    low: float
    high: float | None
    written: str


_MAPS = (
    _Map("Cosine of the differences, mean over pairs", lambda t: t.mean_cosine, "RdBu", -1, 1, "{:.2f}"),
    _Map("Weights pulled both ways (%)", lambda t: _percent(t.conflict), "Purples", 0, None, "{:.0f}"),
    _Map("Largest difference over smallest", lambda t: t.norm_ratio, "Oranges", 1, None, "{:.1f}"),
    _Map("Error of packing (%)", lambda t: _percent(t.requantization_error), "Greens", 0, None, "{:.1f}"),
)


def conflict_figure(report: ConflictReport) -> Figure:
    """Mean cosine, sign conflict, ratio of sizes and, where tensors were packed, the error of packing: each a map with
    a row for every kind of tensor and a column for every layer. Kinds without any value are left out.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_extra("matplotlib", "plot") from None
    maps = [shown for shown in _MAPS if any(shown.value(tensor) is not None for tensor in report.tensors)]
    maps = maps or list(_MAPS[:1])
    kinds = [kind for kind, found in report.kinds().items() if any(m.value(t) is not None for m in maps for t in found)]
    layers = 1 + max((t.layer for t in report.tensors if t.layer is not None), default=-1)
    outside = any(t.layer is None for t in report.tensors if t.kind in kinds)
    columns = max(1, layers + outside)
    across = 2 if columns <= WRITTEN_UP_TO and len(maps) > 1 else 1
    down = -(-len(maps) // across)
    width = min(16.0, 1.6 + across * (2.2 + 0.44 * columns))
    figure = Figure(figsize=(width, 0.6 + down * (1.0 + 0.3 * max(1, len(kinds)))), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False)
    for axes in grid.flat[len(maps) :]:
        axes.set_axis_off()
    for number, (axes, shown) in enumerate(zip(grid.flat, maps, strict=False)):
        _draw(figure, axes, shown, report, kinds, layers, columns)
        if number % across:
            axes.set_yticklabels([])
        if number >= len(maps) - across:
            axes.set_xlabel("layer")
    figure.suptitle("Where the models disagree", x=0.01, ha="left", fontweight="bold")
    return figure


def _draw(
    figure: Figure, axes: Axes, shown: _Map, report: ConflictReport, kinds: list[str], layers: int, columns: int
) -> None:
    cells = np.full((max(1, len(kinds)), columns), np.nan)
    for tensor in report.tensors:
        value = shown.value(tensor)
        if value is not None:
            cells[kinds.index(tensor.kind), layers if tensor.layer is None else tensor.layer] = value
    known = cells[np.isfinite(cells)]
    high = shown.high if shown.high is not None else max(known.max(initial=shown.low) * 1.05, shown.low + 1e-3)
    image = axes.imshow(cells, cmap=shown.colours, vmin=shown.low, vmax=high, aspect="auto")
    axes.set_title(shown.title, loc="left", fontsize=10)
    ticks = list(range(0, layers, max(1, -(-layers // MOST_TICKS))))
    names = [str(layer) for layer in ticks] + ["outside"] * (columns - layers)
    axes.set_xticks(ticks + list(range(layers, columns)), names, fontsize=8)
    axes.set_yticks(range(len(kinds)), [_short(kind) for kind in kinds], fontsize=8)
    axes.tick_params(length=0, which="both")
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(-0.5, columns), minor=True)
    axes.set_yticks(np.arange(-0.5, len(cells)), minor=True)
    axes.grid(which="minor", color="white", lw=1)
    if columns <= WRITTEN_UP_TO:
        for row, column in np.argwhere(np.isfinite(cells)):
            value = cells[row, column]
            depth = abs(value) if shown.low < 0 else (value - shown.low) / (high - shown.low)
            colour = "white" if depth > 0.6 else "#303030"
            axes.text(column, row, shown.written.format(value), ha="center", va="center", fontsize=7, color=colour)
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _short(kind: str) -> str:
    return kind.replace("self_attn.", "").replace("mlp.", "")
