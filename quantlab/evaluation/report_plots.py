"""The figures of a report: size against divergence, divergence over tokens, error per tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from quantlab.errors import missing_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.transforms import Bbox

    from quantlab.evaluation.tensor_errors import TensorError

# Okabe and Ito 2008, "Color Universal Design": told apart by colour-blind readers; the light yellow is left out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SMALLEST = 1e-9  # nats; divergences below it are rounding errors of fp32 and are drawn there
CI95 = 1.96  # standard errors on either side of a mean
ORDER = (
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv",
    "query_key_value",
    "c_attn",
    "o_proj",
    "dense",
    "gate",
    "up",
    "c_fc",
    "down",
)
LABEL_PLACES = (  # points beside the marker, and the label's corner or side there
    (8, 6, "left", "bottom"),
    (-8, -6, "right", "top"),
    (11, 0, "left", "center"),
    (-11, 0, "right", "center"),
    (0, 10, "center", "bottom"),
    (0, -10, "center", "top"),
    (8, -6, "left", "top"),
    (-8, 6, "right", "bottom"),
)


@dataclass(frozen=True)
class FilePoint:
    """A file as the size figure shows it; `kld_stderr` is one standard error of `kld_mean`."""

    label: str
    bytes: int
    bits_per_weight: float
    kld_mean: float
    kld_stderr: float


def size_figure(points: Sequence[FilePoint]) -> Figure:
    """Bytes against mean divergence with 95 % intervals; a line joins the files that no smaller file matches."""
    figure = _figure(8.0, 5.0)
    axes = figure.add_subplot()
    front = _front(points)
    axes.plot([p.bytes / 1e6 for p in front], [_shown(p.kld_mean) for p in front], color="#B0B0B0", lw=1.2, zorder=1)
    for number, point in enumerate(points):
        axes.errorbar(
            point.bytes / 1e6,
            _shown(point.kld_mean),
            yerr=_interval(point),
            fmt="o",
            color=COLOURS[number % len(COLOURS)],
            markersize=7,
            capsize=4,
            elinewidth=1.4,
            zorder=2,
        )
    axes.set_yscale("log")
    axes.margins(x=0.12, y=0.15)
    _scale_by_size(axes)
    _dress(axes, "size of the tensors (MB)", "mean KL divergence from the reference (nats per token)")
    axes.set_title("Size against what it costs", loc="left", fontweight="bold")
    _note(axes, "bars: 95 % interval; lower and further left is better")
    labels = [f"{point.label}\n{point.bits_per_weight:.2f} bits per weight" for point in points]
    _place_labels(figure, axes, points, labels)
    return figure


def distribution_figure(divergences: Mapping[str, np.ndarray]) -> Figure:
    """How divergence spreads over tokens: its density, and the share of tokens above a value. fp64 [tokens] each."""
    figure = _figure(11.0, 4.6)
    left, right = figure.subplots(1, 2)
    shown = {label: np.maximum(values, SMALLEST) for label, values in divergences.items()}
    low = min(float(np.median(values)) for values in shown.values()) / 100
    high = max(float(values.max()) for values in shown.values())
    edges = np.geomspace(max(low, SMALLEST), max(high, 10 * SMALLEST) * 1.2, 61)
    for number, (label, values) in enumerate(shown.items()):
        colour = COLOURS[number % len(COLOURS)]
        share, _ = np.histogram(values, edges)
        left.stairs(100 * share / len(values), edges, color=colour, lw=1.6, label=label)
        left.stairs(100 * share / len(values), edges, color=colour, fill=True, alpha=0.10)
        left.axvline(values.mean(), color=colour, lw=1, ls=":")
        ordered = np.sort(values)
        above = 100 * (1 - np.arange(len(ordered)) / len(ordered))
        right.plot(ordered, above, color=colour, lw=1.6, label=label)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlim(edges[0], edges[-1])
    left.legend(frameon=False, fontsize=9)
    left.set_ylim(bottom=0)
    left.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _dress(left, "KL divergence of a token (nats)", "share of tokens (%)")
    _dress(right, "KL divergence (nats)", "tokens above it (%)")
    right.set_yscale("log")
    right.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    left.set_title("Divergence over tokens", loc="left", fontweight="bold")
    _note(left, "dotted: the mean")
    right.set_title("The tail: how many tokens are worse", loc="left", fontweight="bold")
    return figure


def tensor_figure(errors: Mapping[str, Sequence[TensorError]]) -> Figure:
    """Relative error by layer and kind of tensor, one heat map for each file on a common scale."""
    kinds = _kinds(errors)
    layers = 1 + max((e.layer for found in errors.values() for e in found if e.layer is not None), default=-1)
    outside = any(e.layer is None for found in errors.values() for e in found)
    columns = layers + outside
    top = max((e.relative_error for found in errors.values() for e in found), default=0.0) or 1.0
    across = min(len(errors), 2 if columns <= 16 else 1)
    down = -(-len(errors) // across)
    width = min(14.0, 2.0 + across * (1.6 + 0.46 * columns))
    figure = _figure(width, 0.9 + down * (0.9 + 0.34 * len(kinds)))
    figure.set_layout_engine("constrained", h_pad=0.09)
    grid = figure.subplots(down, across, squeeze=False)
    for axes in grid.flat[len(errors) :]:
        axes.set_axis_off()
    for number, (axes, (label, found)) in enumerate(zip(grid.flat, errors.items(), strict=False)):
        image = _heat_map(axes, found, kinds, layers, outside, top)
        axes.set_title(label, loc="left", fontsize=11)
        if number % across:
            axes.set_yticklabels([])
        if number >= len(errors) - across:
            axes.set_xlabel("layer")
    figure.suptitle("Error of the stored weights", x=0.01, ha="left", fontweight="bold")
    bar = figure.colorbar(image, ax=grid, fraction=0.03, pad=0.02)
    bar.set_label("relative error of the weights (%)")
    bar.outline.set_visible(False)
    return figure


def _heat_map(
    axes: Axes, found: Sequence[TensorError], kinds: Sequence[str], layers: int, outside: bool, top: float
) -> AxesImage:
    cells = np.full((len(kinds), layers + outside), np.nan)
    for error in found:
        cells[kinds.index(error.kind), layers if error.layer is None else error.layer] = 100 * error.relative_error
    image = axes.imshow(cells, cmap="viridis_r", vmin=0, vmax=100 * top, aspect="auto")
    names = [str(layer) for layer in range(layers)] + ["outside"] * outside
    step = max(1, len(names) // 16)
    axes.set_xticks(range(0, len(names), step), names[::step], fontsize=8)
    axes.set_yticks(
        range(len(kinds)), [kind.replace("self_attn.", "").replace("mlp.", "") for kind in kinds], fontsize=8
    )
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(-0.5, cells.shape[1]), minor=True)
    axes.set_yticks(np.arange(-0.5, cells.shape[0]), minor=True)
    axes.grid(which="minor", color="white", lw=1)
    axes.tick_params(which="minor", length=0)
    if cells.shape[1] <= 16:
        for row, column in np.argwhere(np.isfinite(cells)):
            value = cells[row, column]
            colour = "white" if value > 55 * top else "#303030"
            axes.text(
                column,
                row,
                f"{value:.1f}" if value >= 1 else f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=7,
                color=colour,
            )
    return image


def _kinds(errors: Mapping[str, Sequence[TensorError]]) -> list[str]:
    """Kinds of tensors, attention first, those outside the layers last."""
    inside = {e.kind for found in errors.values() for e in found if e.layer is not None}
    others = {e.kind for found in errors.values() for e in found if e.layer is None} - inside

    def rank(kind: str) -> tuple[bool, int, str]:
        place = next((number for number, word in enumerate(ORDER) if word in kind), len(ORDER))
        return "mlp" in kind, place, kind

    return sorted(inside, key=rank) + sorted(others)


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_extra("matplotlib", "plot") from None
    return Figure(figsize=(width, height), layout="constrained")


def _dress(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, which="major")
    axes.set_axisbelow(True)


def _note(axes: Axes, text: str) -> None:
    axes.text(1, 1.02, text, transform=axes.transAxes, ha="right", va="bottom", fontsize=8.5, color="#606060")


def _shown(divergence: float) -> float:
    return max(divergence, SMALLEST)


def _interval(point: FilePoint) -> list[list[float]]:
    """Below and above the mean; downwards no further than a hundredth of it, since the axis is logarithmic."""
    mean, half = _shown(point.kld_mean), CI95 * point.kld_stderr
    half = half if np.isfinite(half) else 0.0
    return [[min(half, 0.99 * mean)], [half]]


def _front(points: Sequence[FilePoint]) -> list[FilePoint]:
    """The files to which no file of at most their size is equal or nearer."""
    front: list[FilePoint] = []
    for point in sorted(points, key=lambda p: (p.bytes, p.kld_mean)):
        if not front or point.kld_mean < front[-1].kld_mean:
            front.append(point)
    return front


def _scale_by_size(axes: Axes) -> None:
    """Plain numbers at a logarithmic axis of at least a decade; twos and fives too where it is no longer than two."""
    low, high = axes.get_ylim()
    if high / low < 12:
        middle = (low * high) ** 0.5
        low, high = axes.set_ylim(middle / 12**0.5, middle * 12**0.5)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    told = (2, 5) if high / low < 100 else ()
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if round(value / 10 ** _power(value)) in told else "")


def _power(value: float) -> int:
    """Of ten, in a number: -3 of 0.005."""
    return int(np.floor(np.log10(value) + 1e-9))


def _place_labels(figure: Figure, axes: Axes, points: Sequence[FilePoint], labels: Sequence[str]) -> None:
    """Each label at the place beside its point where it covers least: labels, points, the line, the axes' frame."""
    figure.draw_without_rendering()
    frame = axes.get_window_extent()
    spots = [axes.transData.transform(_place(point)) for point in points]
    spots += _along([axes.transData.transform(_place(point)) for point in _front(points)])
    taken: list[Bbox] = []
    for number, (point, label) in enumerate(zip(points, labels, strict=True)):
        notes = [
            axes.annotate(label, _place(point), place[:2], textcoords="offset points", ha=place[2], va=place[3],
                          fontsize=9, color=COLOURS[number % len(COLOURS)])
            for place in LABEL_PLACES
        ]  # fmt: skip
        boxes = [note.get_window_extent() for note in notes]
        clashes = [_clashes(box, frame, taken, spots) for box in boxes]
        best = clashes.index(min(clashes))
        taken.append(boxes[best])
        for note in notes[:best] + notes[best + 1 :]:
            note.remove()


def _place(point: FilePoint) -> tuple[float, float]:
    return point.bytes / 1e6, _shown(point.kld_mean)


def _along(corners: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Places every few pixels on the line through `corners`."""
    found = []
    for start, end in pairwise(corners):
        steps = max(2, int(np.hypot(*(end - start)) / 8))
        found += [start + (end - start) * step / steps for step in range(1, steps)]
    return found


def _clashes(box: Bbox, frame: Bbox, taken: Sequence[Bbox], spots: Sequence[np.ndarray]) -> int:
    leaves = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
    covered = sum(bool(box.contains(*spot)) for spot in spots)
    return 100 * leaves + 10 * sum(bool(box.overlaps(other)) for other in taken) + covered
