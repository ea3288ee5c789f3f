"""Learning a merge from text to a written model, and what is refused on the way."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from coefficient_models import config_text, moved, noise, variant, weights

from quantlab import load_model, load_tokenizer, merge_checkpoints, perplexity, quantize_checkpoint
from quantlab.checkpoint import open_checkpoint
from quantlab.errors import InputError
from quantlab.search.coefficient_model import MergedModel
from quantlab.search.coefficient_training import CoefficientSettings
from quantlab.search.coefficient_windows import learning_text
from quantlab.search.learned_coefficients import learn_merge
from quantlab.search.learning_job import check_learning_memory, compared
from quantlab.search.learning_work import learning_folder_of

QUICK = CoefficientSettings(by="model", steps=12, step_tokens=256, learning_rate=0.15, evaluations=3)


@pytest.fixture(scope="module")
def prose(tmp_path_factory) -> Path:
    """Half of the prose."""
    file = tmp_path_factory.mktemp("prose") / "prose.txt"
    whole = (Path(__file__).parents[1] / "data" / "prose.txt").read_text(encoding="utf-8")
    file.write_text(whole[: len(whole) // 2], encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def models(make_model, tmp_path_factory, prose) -> tuple[Path, Path, Path]:
    """A base, that trained on the prose for a moment, and that with noise."""
    root = tmp_path_factory.mktemp("models")
    base = make_model(root / "base", "llama", hidden_size=32, intermediate_size=64)
    model, ids = load_model(base), load_tokenizer(base).encode(prose.read_text(encoding="utf-8"))
    windows = torch.tensor(ids[: len(ids) // 64 * 64]).reshape(-1, 64)
    optimizer = torch.optim.Adam(model.parameters(), lr=8e-3)
    for step in range(15):
        batch = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(step))[:8]]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = model.state_dict()
    tuned = variant(base, root / "tuned", {name: state[name] for name in weights(base)})
    return base, tuned, moved(base, root / "noisy", noise(base, 1))


@pytest.fixture(scope="module")
def text(models) -> str:
    base, tuned, noisy = models
    return config_text("task_arithmetic", base, {tuned: 0.2, noisy: 0.2})


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_weights_are_learned_proven_and_written(text, models, prose, tmp_path):
    report = learn_merge(text, tmp_path / "out", prose, QUICK, threads=1)
    learning = report.learning
    assert learning.proven
    assert 0 < learning.gain_low < learning.gain < learning.gain_high
    assert learning.gain == pytest.approx(learning.start_loss - learning.learned_loss, abs=1e-9)
    tuned, noisy = learning.coefficients
    assert (tuned.model, tuned.group, tuned.start) == (str(models[1]), "model", 0.2)
    assert tuned.learned > 0.6
    assert abs(noisy.learned) < tuned.learned
    written = yaml.safe_load((tmp_path / "out" / "merge_config.yml").read_text())
    assert [model["parameters"]["weight"] for model in written["models"]] == [tuned.learned, noisy.learned]
    assert (tmp_path / "out" / "merge_config.yml").read_text() == report.config
    merge_checkpoints(tmp_path / "out" / "merge_config.yml", tmp_path / "again" / "out")
    assert files_of(tmp_path / "again" / "out") == files_of(tmp_path / "out")
    losses = []
    for weight, name in ((0.2, "before"), (None, "out")):
        if weight is not None:
            merge_checkpoints(text, tmp_path / name)
        losses.append(perplexity(tmp_path / name, prose, context=128, threads=1).nll)
    assert losses[0] - losses[1] == pytest.approx(learning.gain, rel=0.3)
    assert not learning_folder_of(tmp_path / "out").exists()


def test_the_same_run_gives_the_same_bytes_after_a_kill(text, prose, tmp_path, monkeypatch):
    settings = CoefficientSettings(by="layer", steps=6, step_tokens=256, learning_rate=0.15, evaluations=2)
    whole = learn_merge(text, tmp_path / "a" / "out", prose, settings, threads=1)
    calls, original = [], MergedModel.gradient

    def counted(self, windows):
        calls.append(windows)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(self, windows)

    monkeypatch.setattr(MergedModel, "gradient", counted)
    out = tmp_path / "b" / "out"
    with pytest.raises(KeyboardInterrupt):
        learn_merge(text, out, prose, settings, threads=1)
    assert [path.name for path in out.parent.iterdir()] == ["out.learning"]
    with pytest.raises(InputError, match="holds unfinished work; pass --resume"):
        learn_merge(text, out, prose, settings, threads=1)
    with pytest.raises(InputError, match="begun with settings"):
        learn_merge(text, out, prose, QUICK, threads=1, resume=True)
    resumed = learn_merge(text, out, prose, settings, threads=1, resume=True)
    assert len(calls) == 7  # the one that failed, and two that were left
    assert resumed.learning.coefficients == whole.learning.coefficients
    assert resumed.learning.history == whole.learning.history
    assert files_of(out) == files_of(tmp_path / "a" / "out")
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_unproven_gain_is_refused(models, prose, tmp_path, monkeypatch):
    """A step so small that nothing can come of it, and an interval as wide as it could be."""
    monkeypatch.setattr("quantlab.search.learning_job.student_quantile", lambda probability, freedom: 1e9)
    base, _, noisy = models
    content = config_text("task_arithmetic", base, {noisy: 0.0})
    settings = CoefficientSettings(by="model", steps=2, step_tokens=128, learning_rate=1e-6, evaluations=1)
    with pytest.raises(InputError, match="unproven") as refused:
        learn_merge(content, tmp_path / "out", prose, settings, threads=1)
    assert "nothing was written" in str(refused.value)
    assert "--keep-unproven" in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == []
    report = learn_merge(content, tmp_path / "out", prose, settings, threads=1, keep_unproven=True)
    assert not report.learning.proven
    assert any("unproven" in note for note in report.notes)
    assert "# unproven" in (tmp_path / "out" / "merge_config.yml").read_text()


def packed_parents(models, root: Path) -> str:
    """The config with a base of Q8_0 in a GGUF file and a model of Q4_1."""
    base, tuned, noisy = models
    quantize_checkpoint(base, root / "base.gguf", format="q8_0", threads=1)
    quantize_checkpoint(tuned, root / "tuned", format="q4_1", threads=1)
    return config_text("task_arithmetic", root / "base.gguf", {root / "tuned": 0.2, noisy: 0.2})


@pytest.mark.parametrize("case", ["packed output", "bf16 output", "packed parents"])
def test_losses_are_those_of_the_written_model(case, text, models, prose, tmp_path):
    """Of the same blocks and roundings, whatever the parents' files are."""
    format = "q4_0" if case == "packed output" else None
    if case == "bf16 output":
        text = json.dumps({**json.loads(text), "dtype": "bfloat16"}) + "\n"
    elif case == "packed parents":
        text = packed_parents(models, tmp_path)
    report = learn_merge(text, tmp_path / "out", prose, QUICK, format=format, threads=1)
    checkpoint = open_checkpoint(tmp_path / "out")
    found = checkpoint.format("model.layers.0.mlp.up_proj.weight")
    assert (None if found is None else found.name) == format
    assert (report.requantization_error is not None) == (format is not None)
    windows = learning_text(checkpoint, prose, QUICK.seed, QUICK.steps * QUICK.step_tokens).report
    model = load_model(tmp_path / "out")
    losses = []
    with torch.no_grad():
        for window in windows:
            ids = torch.tensor([window])
            logits = model(input_ids=ids).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    assert report.learning.report_windows == len(windows)
    assert report.learning.learned_loss == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)


def test_an_average_stays_one(models, prose, tmp_path):
    base, tuned, _ = models
    text = config_text("linear", None, {base: 3, tuned: 1})
    settings = CoefficientSettings(by="layer", steps=4, step_tokens=256, learning_rate=0.1, evaluations=1)
    report = learn_merge(text, tmp_path / "out", prose, settings, threads=1)
    rows = report.learning.coefficients
    assert [row.start for row in rows] == [0.75, 0.25] * 4
    for one, other in zip(rows[::2], rows[1::2], strict=True):
        assert one.group == other.group
        assert one.learned + other.learned == pytest.approx(1, abs=2e-6)
        assert other.learned > 0.25
    written = yaml.safe_load((tmp_path / "out" / "merge_config.yml").read_text())
    assert written["parameters"] == {"normalize": True}


def test_what_was_learned_outlives_a_merge_that_fails(text, prose, tmp_path, monkeypatch):
    place = "quantlab.search.learned_coefficients.merge_checkpoints"

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    settings = CoefficientSettings(by="model", steps=3, step_tokens=256, learning_rate=0.15, evaluations=1)
    with monkeypatch.context() as patch:
        patch.setattr(place, full)
        with pytest.raises(OSError, match="space"):
            learn_merge(text, tmp_path / "out", prose, settings, threads=1)
    assert [path.name for path in tmp_path.iterdir()] == ["out.learning"]
    monkeypatch.setattr(MergedModel, "gradient", full)
    report = learn_merge(text, tmp_path / "out", prose, settings, threads=1, resume=True)
    assert report.learning.steps == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_dry_run_writes_nothing(text, prose, tmp_path):
    report = learn_merge(text, tmp_path / "out", prose, dry_run=True)
    assert report.learning is None
    assert report.notes[0].startswith("--learn: 8 weights would be learned (4 x 2, by layer) of ")
    assert list(tmp_path.iterdir()) == []


def test_splits_of_a_text_share_nothing(models, prose):
    found = learning_text(open_checkpoint(models[0]), prose, 0, 10_000)
    splits = [set(found.training), set(found.selection), set(found.report)]
    assert all(len(split) >= 4 for split in splits)
    assert sum(map(len, splits)) == len(splits[0] | splits[1] | splits[2])
    assert found == learning_text(open_checkpoint(models[0]), prose, 0, 10_000)
    assert found != learning_text(open_checkpoint(models[0]), prose, 1, 10_000)


class Pair:
    """Two sets of coefficients, and what each loses."""

    def take(self, values: np.ndarray) -> None:
        self.values = values

    def losses(self, window: tuple[int, ...]) -> np.ndarray:
        return self.values[0] * np.array(window[1:], dtype=np.float64)


def test_losses_are_compared_window_by_window():
    said = []
    before, after = compared(
        Pair(), np.array([3.0]), np.array([2.0]), [(0, 1, 2), (0, 4)], lambda *place: said.append(place)
    )
    assert [each.tolist() for each in before] == [[3, 6], [12]]
    assert [each.tolist() for each in after] == [[2, 4], [8]]
    assert said[-1] == (10, 10, "")
    with pytest.raises(InputError, match="NaN or infinite"):
        compared(Pair(), np.array([3.0]), np.array([np.nan]), [(0, 1)], lambda *place: None)


def test_too_little_memory_is_said_before_any_work(text, prose, tmp_path, monkeypatch):
    monkeypatch.setattr("quantlab.search.learning_job.available_memory", lambda: 10**6)
    with pytest.raises(InputError, match=r"GB of memory .* and 0\.001 GB are available"):
        learn_merge(text, tmp_path / "out", prose)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("quantlab.search.learning_job.available_memory", lambda: None)
    check_learning_memory([], {}, {})


def test_equal_models_have_nothing_to_learn(models, prose, tmp_path):
    base = models[0]
    twin = variant(base, tmp_path / "twin", weights(base))
    with pytest.raises(InputError, match="are all equal"):
        learn_merge(config_text("task_arithmetic", base, {twin: 1}), tmp_path / "out", prose, QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["twin"]
