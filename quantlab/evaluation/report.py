"""A comparison as a page or pictures: what a person looks at before choosing a file."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from quantlab.checkpoint import open_checkpoint
from quantlab.checkpoint.atomic import atomic_file, atomic_folder
from quantlab.errors import InputError, missing_extra
from quantlab.evaluation.compare import CompareResult, Measurement, measure
from quantlab.evaluation.report_plots import FilePoint, distribution_figure, size_figure, tensor_figure
from quantlab.evaluation.tensor_errors import TensorError, tensor_errors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Progress = Callable[[int, int, str], None]  # (tokens done, tokens in all, the file at hand and the figure so far)
DPI = 130
MARK = "<!doctype html><!-- quantlab report -->"
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem } img { max-width: 100%; height: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.92rem }
th, td { padding: 0.25rem 0.6rem; text-align: right; white-space: nowrap }
th, td { border-bottom: 1px solid #ddd } th { border-bottom-color: #888 }
th:first-child, td:first-child, .text { text-align: left } .small { color: #666; font-size: 0.88rem }
mark { background: #ffe08a; padding: 0 0.15em } td.text { white-space: pre-wrap; max-width: 32rem }
"""


@dataclass(frozen=True)
class FileFigures:
    """One file beside the reference; see `compare.CompareResult`. `bytes` counts tensor data."""

    file: str
    bytes: int
    bits_per_weight: float
    perplexity: float
    kld_mean: float
    kld_stderr: float
    kld_median: float
    kld_p99: float
    kld_max: float
    same_top: float
    same_top_stderr: float


@dataclass(frozen=True)
class ReportResult:
    """`report` is the page or folder that was written."""

    reference: str
    text: str
    tokens: int
    perplexity: float
    files: tuple[FileFigures, ...]
    report: str


def report_files(
    reference: str | Path,
    files: Sequence[str | Path],
    text: Path,
    out: Path,
    *,
    context: int = 512,
    windows: str = "documents",
    engine: str = "auto",
    activations: str = "f32",
    threads: int | None = None,
    progress: Progress | None = None,
) -> ReportResult:
    """Compare each file with the reference on a text, one after the other, and draw them side by side.

    Args:
        reference: folder, GGUF file or hub id, usually the float model.
        files: models made from it.
        text: UTF-8 text file, best one that no quantizer has seen.
        out: a page if it ends in .html, else a folder of PNGs.
        context: tokens of a window; this and what follows are `compare.measure`'s.
        windows: see there.
        engine: see there.
        activations: see there.
        threads: see there.
        progress: called with tokens done, tokens in all, and the file at hand.

    Raises:
        InputError: see `compare.measure`; no files, one named twice, or an `out` that may not be written.
    """
    if not files:
        raise InputError("no file to compare with the reference")
    names = [str(file) for file in files]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"{twice[0]}: named twice")
    check_report(out)
    for file in files:
        open_checkpoint(file)  # a wrong name at the end shows before the first one is measured
    found: dict[str, Measurement] = {}
    for number, name in enumerate(names):

        def advance(done: int, total: int, note: str, number: int = number, name: str = name) -> None:
            if progress is not None:
                progress(number * total + done, len(names) * total, f"{_short(name)}: {note}")

        found[name] = measure(
            reference, name, text, context=context, windows=windows, engine=engine, activations=activations,
            threads=threads, progress=advance,
        )  # fmt: skip
    write_report(reference, found, text, out)
    first = found[names[0]].result
    figures = tuple(_figures(name, measurement) for name, measurement in found.items())
    return ReportResult(str(reference), str(text), first.tokens, first.perplexity_a, figures, str(out))


def check_report(out: Path) -> None:
    """Refuse a place that a report may not take, before anything is measured.

    Raises:
        InputError: matplotlib is missing, or something that is no report of ours is there.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise missing_extra("matplotlib", "plot") from None
    if not out.exists():
        return
    if out.suffix == ".html":
        ours = out.is_file() and out.read_bytes()[: len(MARK)] == MARK.encode()
    else:
        ours = out.is_dir() and all(file.suffix == ".png" for file in out.iterdir())
    if not ours:
        raise InputError(f"{out}: exists and is no report; choose another name for the report")


def write_report(reference: str | Path, found: Mapping[str, Measurement], text: Path, out: Path) -> None:
    """Write what was measured of each file against the reference: a page if `out` ends in .html, else PNGs.

    Raises:
        InputError: see `check_report`; a model cannot be read again.
    """
    check_report(out)
    labels = _labels(list(found))
    errors = {labels[name]: tensor_errors(reference, name) for name in found}
    pictures = _pictures(found, labels, errors)
    if out.suffix == ".html":
        page = _page(str(reference), found, labels, text, pictures)
        with atomic_file(out, replace=True) as temporary:
            temporary.write_text(page, encoding="utf-8")
        return
    with atomic_folder(out, replace=True) as temporary:
        for name, figure in pictures.items():
            (temporary / f"{name}.png").write_bytes(_png(figure))


def _pictures(
    found: Mapping[str, Measurement], labels: Mapping[str, str], errors: Mapping[str, Sequence[TensorError]]
) -> dict[str, Figure]:
    pictures = {}
    if len(found) > 1:
        figures = [_figures(name, measurement) for name, measurement in found.items()]
        points = [FilePoint(labels[f.file], f.bytes, f.bits_per_weight, f.kld_mean, f.kld_stderr) for f in figures]
        pictures["size"] = size_figure(points)
    pictures["divergence"] = distribution_figure({labels[name]: m.divergences for name, m in found.items()})
    if any(errors.values()):
        pictures["tensors"] = tensor_figure(errors)
    return pictures


def _figures(name: str, measurement: Measurement) -> FileFigures:
    checkpoint, result = open_checkpoint(name), measurement.result
    return FileFigures(
        file=name,
        bytes=checkpoint.nbytes,
        bits_per_weight=8 * checkpoint.nbytes / max(1, checkpoint.parameters),
        perplexity=result.perplexity_b,
        kld_mean=result.kld_mean,
        kld_stderr=result.kld_stderr,
        kld_median=result.kld_median,
        kld_p99=result.kld_p99,
        kld_max=result.kld_max,
        same_top=result.same_top,
        same_top_stderr=result.same_top_stderr,
    )


def _short(name: str) -> str:
    return Path(name).name or name


def _labels(names: Sequence[str]) -> dict[str, str]:
    """The last part of each path, without .gguf; the whole path where two would be the same."""
    short = {name: _short(name).removesuffix(".gguf") for name in names}
    return {name: word if list(short.values()).count(word) == 1 else name for name, word in short.items()}


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


CONTEXT = "in its context"
TITLES = {
    "size": ("Size against divergence", "Mean KL divergence of each file against the size of its tensors."),
    "divergence": ("Divergence over tokens", "A mean hides how it is spread: the tail is what readers notice."),
    "tensors": (
        "Error per tensor",
        "Relative error of the stored weights by layer; tensors outside the layers stand in the last column. "
        "Equal errors do not matter equally.",
    ),
}
HEAD = "<html lang='en'><head><meta charset='utf-8'><title>quantlab report</title><style>{}</style></head>"


def _page(
    reference: str,
    found: Mapping[str, Measurement],
    labels: Mapping[str, str],
    text: Path,
    pictures: Mapping[str, Figure],
) -> str:
    parts = [
        MARK,
        HEAD.format(STYLE),
        "<body><h1>What quantization changes</h1>",
        _introduction(reference, next(iter(found.values())).result, text),
        _summary_table(found, labels),
    ]
    for name, figure in pictures.items():
        title, words = TITLES[name]
        data = base64.b64encode(_png(figure)).decode()
        parts.append(f"<h2>{title}</h2><p class='small'>{words}</p>")
        parts.append(f"<img alt='{title}' src='data:image/png;base64,{data}'>")
    for name, measurement in found.items():
        parts += [_documents_table(labels[name], measurement), _worst_table(labels[name], measurement)]
    return "\n".join([*parts, "</body></html>\n"])


def _introduction(reference: str, result: CompareResult, text: Path) -> str:
    how = f"{result.windows} windows of up to {result.context} tokens, {result.engine} engine"
    size = f"{open_checkpoint(reference).nbytes / 1e6:.2f} MB"
    types = f"{result.activations_a} activations of the reference, {result.activations_b} of the files"
    return (
        f"<p>Reference: <b>{escape(_short(reference))}</b>, {size}, perplexity "
        f"{result.perplexity_a:.3f} on {result.tokens} tokens of {escape(text.name)} ({how}; {types}). Divergences are "
        "KL(reference || file) in nats per token; ± is one standard error with windows as sampling units.</p>"
    )


def _summary_table(found: Mapping[str, Measurement], labels: Mapping[str, str]) -> str:
    rows = []
    for name, measurement in found.items():
        f, result = _figures(name, measurement), measurement.result
        rows.append([
            labels[name], f"{f.bytes / 1e6:.2f}", f"{f.bits_per_weight:.3f}", f"{f.perplexity:.3f}",
            f"{result.perplexity_ratio:.5f} ± {result.perplexity_ratio_stderr:.5f}",
            f"{f.kld_mean:.6f} ± {f.kld_stderr:.6f}", f"{f.kld_p99:.5f}", f"{f.kld_max:.4f}",
            f"{100 * f.same_top:.2f} ± {100 * f.same_top_stderr:.2f} %",
        ])  # fmt: skip
    heads = (
        "file",
        "MB",
        "bits per weight",
        "perplexity",
        "ratio",
        "KL divergence, mean",
        "99 %",
        "largest",
        "same top",
    )
    return _table(heads, rows)


def _documents_table(label: str, measurement: Measurement) -> str:
    documents = measurement.result.documents
    if len(documents) < 2:
        return ""
    rows = [
        [f"{d.document} {d.begins}", str(d.tokens), f"{d.perplexity_a:.3f}", f"{d.perplexity_b:.3f}",
         f"{d.kld_mean:.6f} ± {d.kld_stderr:.6f}", f"{100 * d.same_top:.2f} %"]
        for d in documents
    ]  # fmt: skip
    heads = ("document", "tokens", "perplexity, reference", "file", "KL divergence", "same top")
    return f"<h2>{escape(label)}: documents</h2>{_table(heads, rows)}"


def _worst_table(label: str, measurement: Measurement) -> str:
    if not measurement.result.worst:
        return ""
    rows = "".join(
        f"<tr><td>{token.kld:.4f}</td><td class='text'>{_line(token.before)}<mark>{_line(token.token)}</mark>"
        f"{_line(token.after)}</td><td>{token.p_a:.4f}</td><td>{token.p_b:.4f}</td>"
        f"<td>{_line(token.top_a)}</td><td>{_line(token.top_b)}</td></tr>"
        for token in measurement.result.worst
    )
    heads = ("KL divergence", CONTEXT, "p, reference", "p, file", "first, reference", "first, file")
    return f"<h2>{escape(label)}: the worst tokens</h2><table>{_head(heads)}{rows}</table>"


def _line(text: str) -> str:
    """A piece of text in one line, as HTML."""
    return escape(text.replace("\n", "\u23ce"))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{_head(heads)}{body}</table>"


def _head(heads: Sequence[str]) -> str:
    return (
        "<tr>"
        + "".join(f"<th{' class=text' if head == CONTEXT else ''}>{escape(head)}</th>" for head in heads)
        + "</tr>"
    )
