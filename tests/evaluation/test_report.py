"""Reports: the page is complete in itself, figures hold what was measured, a wrong place costs nobody anything."""

from __future__ import annotations

import base64
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import quantlab
from quantlab.documents import read_documents
from quantlab.errors import InputError
from quantlab.evaluation.compare import Measurement, measure
from quantlab.evaluation.report import report_files, write_report
from quantlab.evaluation.report_plots import FilePoint, distribution_figure, size_figure, tensor_figure
from quantlab.evaluation.tensor_errors import TensorError

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def text(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two short documents with what HTML takes for its own."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    first, second = (document[:500] for document in read_documents(prose)[:2])
    path.write_text(f"<b>&amp; {first}\n<|endoftext|>\n{second}\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def files(llama_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny Llama in two formats."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("q8_0", "q4_0"):
        quantlab.quantize_checkpoint(llama_model, folder / name, format=name)
    return {name: folder / name for name in ("q8_0", "q4_0")}


@pytest.fixture(scope="module")
def measured(llama_model: Path, files: dict[str, Path], text: Path) -> Measurement:
    """The Q4_0 against the original."""
    return measure(llama_model, files["q4_0"], text, context=64)


def test_a_report_of_two_files(llama_model: Path, files: dict[str, Path], text: Path, tmp_path: Path) -> None:
    """Its figures are those of `compare`; the page holds three pictures and needs nothing from elsewhere."""
    out = tmp_path / "report.html"
    seen: list[tuple[int, int, str]] = []
    found = report_files(
        llama_model, list(files.values()), text, out, context=64, progress=lambda *state: seen.append(state)
    )
    assert [seen[-1][0], seen[-1][1]] == [2 * found.tokens] * 2
    assert [state[0] for state in seen] == sorted({state[0] for state in seen})
    for name, file in zip(files, found.files, strict=True):
        twin = quantlab.compare(llama_model, files[name], text, context=64)
        checkpoint = quantlab.open_checkpoint(files[name])
        assert (file.kld_mean, file.kld_stderr, file.same_top) == (twin.kld_mean, twin.kld_stderr, twin.same_top)
        assert (file.perplexity, found.perplexity) == (twin.perplexity_b, twin.perplexity_a)
        assert (file.file, file.bytes) == (str(files[name]), checkpoint.nbytes)
    page = out.read_text(encoding="utf-8")
    pictures = re.findall(r"src='data:image/png;base64,([^']+)'", page)
    assert len(pictures) == 3
    assert all(base64.b64decode(picture).startswith(PNG) for picture in pictures)
    assert not re.search(r"(src|href)=['\"]?(http|/|\.)", page)
    assert f"{found.files[1].kld_mean:.6f}" in page
    assert "<b>&amp; The" not in page
    assert "&lt;b&gt;&amp;amp; The" in page


def test_a_folder_of_pictures(
    llama_model: Path, files: dict[str, Path], measured: Measurement, text: Path, tmp_path: Path
) -> None:
    """One file needs no picture of sizes; a second report replaces the first."""
    for _ in range(2):
        write_report(llama_model, {str(files["q4_0"]): measured}, text, tmp_path / "out")
        pictures = sorted((tmp_path / "out").iterdir())
        assert [picture.name for picture in pictures] == ["divergence.png", "tensors.png"]
        assert all(picture.read_bytes().startswith(PNG) for picture in pictures)


def test_other_things_are_not_replaced(llama_model: Path, measured: Measurement, text: Path, tmp_path: Path) -> None:
    """A page that is no report, a folder that holds something else, a folder of that name."""
    (tmp_path / "page.html").write_text("<html>mine</html>")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").touch()
    (tmp_path / "folder.html").mkdir()
    for name in ("page.html", "folder", "folder.html"):
        with pytest.raises(InputError, match=f"{tmp_path / name}: exists and is no report"):
            write_report(llama_model, {str(llama_model): measured}, text, tmp_path / name)
    assert (tmp_path / "page.html").read_text() == "<html>mine</html>"
    assert (tmp_path / "folder" / "mine.txt").exists()


def test_wrong_requests(llama_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is measured."""
    out = tmp_path / "out.html"
    with pytest.raises(InputError, match="no file to compare with the reference"):
        report_files(llama_model, [], text, out)
    with pytest.raises(InputError, match=f"{llama_model}: named twice"):
        report_files(llama_model, [llama_model, llama_model], text, out)
    with pytest.raises(InputError, match="no such folder or file"):
        report_files(llama_model, [llama_model, tmp_path / "none"], text, out)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"matplotlib is not installed; .*quantlab\[plot\]"):
        report_files(llama_model, [llama_model], text, out)
    assert not out.exists()


# What the figures hold.


def test_the_size_figure_shows_points_intervals_and_front() -> None:
    """The file that is larger and worse than another is no part of the line."""
    points = [
        FilePoint("small", 4_000_000, 4.5, 0.02, 0.001),
        FilePoint("worse", 5_000_000, 5.5, 0.03, 0.001),
        FilePoint("large", 8_000_000, 8.5, 0.0001, 0.00001),
        FilePoint("equal", 9_000_000, 9.5, 0.0, 0.0),
    ]
    (axes,) = size_figure(points).axes
    assert axes.get_yscale() == "log"
    assert axes.lines[0].get_xydata().tolist() == [[4, 0.02], [8, 0.0001], [9, 1e-9]]
    segments = [bars[2][0].get_segments()[0] for bars in axes.containers]
    assert segments[0][:, 1] == pytest.approx([0.02 - 1.96 * 0.001, 0.02 + 1.96 * 0.001])
    labels = [text.get_text() for text in axes.texts]
    assert [f"{p.label}\n{p.bits_per_weight:.2f} bits per weight" in labels for p in points] == [True] * 4


def test_labels_do_not_cover_each_other() -> None:
    """Also where files lie close together."""
    points = [FilePoint(f"file {n}", 5_000_000 + 20_000 * n, 5.0, 0.01 * 1.3**n, 1e-4) for n in range(5)]
    figure = size_figure(points)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text().startswith("file")]
    assert len(boxes) == 5
    assert not any(one.overlaps(other) for n, one in enumerate(boxes) for other in boxes[:n])


def test_the_distribution_counts_every_token() -> None:
    """Shares add up to 100 %, the tail starts at 100 % and ends at one token."""
    values = np.random.default_rng(0).lognormal(-5, 1, 1000)
    left, right = distribution_figure({"one": values, "two": 10 * values}).axes
    for curve in right.lines:
        assert (curve.get_ydata()[0], curve.get_ydata()[-1]) == (100, pytest.approx(0.1))
    assert np.array_equal(right.lines[0].get_xdata(), np.sort(values))
    assert [patch.get_data().values.sum() for patch in left.patches] == pytest.approx([100] * 4, abs=1)
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["one", "two"]
    distribution_figure({"nothing": np.zeros(5)})  # a model with itself


def test_the_heat_map_has_a_cell_for_each_tensor() -> None:
    """Layers across, kinds down, tensors outside the layers in the last column and row; errors in per cent."""
    errors = [
        TensorError("e", None, "embed_tokens", "q8_0", 0.01),
        TensorError("d", 1, "mlp.down_proj", "q4_1", 0.08),
        TensorError("q", 0, "self_attn.q_proj", "q4_1", 0.04),
    ]
    axes = tensor_figure({"file": errors}).axes[0]
    cells = axes.images[0].get_array().filled(np.nan)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["q_proj", "down_proj", "embed_tokens"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "outside"]
    nan = np.nan
    np.testing.assert_allclose(cells, [[4, nan, nan], [nan, 8, nan], [nan, nan, 1]])
    assert sorted(text.get_text() for text in axes.texts) == ["1.0", "4.0", "8.0"]
