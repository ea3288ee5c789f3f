"""The loss curve: the points of a Trainer's log history, in a PNG."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from quantlab.errors import InputError
from quantlab.evaluation.plots import loss_curve

HISTORY = [
    {"loss": 6.0, "learning_rate": 0.1, "epoch": 0.1, "step": 100},
    {"eval_loss": 5.9, "eval_runtime": 2.0, "step": 150},
    {"loss": 5.0, "step": 200},
    {"loss": 4.5, "step": 300},
    {"eval_loss": 4.75, "step": 300},
    {"train_runtime": 60.0, "train_loss": 5.2, "step": 300},  # the Trainer's summary at the end is no point
]


def test_the_curves_hold_the_points_of_the_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training and held-out loss over millions of tokens: 2000 tokens a step."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    loss_curve(HISTORY, tmp_path / "loss.png", 2000)
    (axes,) = figures[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines == {
        "training": [[0.2, 6.0], [0.4, 5.0], [0.6, 4.5]],
        "validation": [[0.3, 5.9], [0.6, 4.75]],
    }
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("million tokens", "loss (nats per token)")
    assert [label.get_text() for label in axes.get_legend().get_texts()] == ["training", "validation"]


def test_without_held_out_text_there_is_one_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    loss_curve([entry for entry in HISTORY if "eval_loss" not in entry], tmp_path / "loss.png", 2000)
    assert [line.get_label() for line in figures[0].axes[0].lines] == ["training"]


def test_the_file_is_a_png(tmp_path: Path) -> None:
    """840 by 480 pixels."""
    path = tmp_path / "loss.png"
    loss_curve(HISTORY, path, 2000)
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (840, 480)
    assert content.endswith(b"IEND\xaeB`\x82")


def test_without_matplotlib_the_error_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # importing it now fails
    with pytest.raises(InputError) as caught:
        loss_curve(HISTORY, tmp_path / "loss.png", 2000)
    assert str(caught.value) == "matplotlib is not installed; install it with: pip install 'quantlab[plot]'"
    assert not (tmp_path / "loss.png").exists()
