"""`--method learned` from the original model to the written one: better than its start, resumed, refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from quantlab import InputError, open_checkpoint, quantize_checkpoint
from quantlab.calibration import learned_run
from quantlab.calibration.calibrated import CalibrationOptions
from quantlab.calibration.learned import LearnSettings
from quantlab.calibration.samples import CalibrationRequest

PROSE = Path(__file__).parents[1] / "data" / "prose.txt"
SETTINGS = LearnSettings(steps=6, step_tokens=128)


class Killed(BaseException):
    """Stands for a signal."""


PLAIN = {"correct_drift": False}  # corrected, a start fits so few tokens better than any step that is learned from them


def learn(
    model: Path, out: Path, *, settings: LearnSettings = SETTINGS, progress=None, statistics=None, threads=1, **options
):
    resume = options.pop("resume", False)
    request = None if statistics else CalibrationRequest(PROSE, samples=16, length=64)
    calibration = CalibrationOptions(request=request, resume=resume, statistics=statistics, method_options=PLAIN)
    return quantize_checkpoint(
        model,
        out,
        method="learned",
        calibration=calibration,
        learning=settings,
        threads=threads,
        progress=progress,
        **options,
    )


def kill_at(note: str):
    def progress(done: int, total: int, said: str) -> None:
        assert 0 <= done <= total
        if said.startswith(note):
            raise Killed

    return progress


def content(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(path.iterdir())
    return {file.name: file.read_bytes() for file in files}


def test_it_is_gptq_with_other_scales(llama_model, tmp_path):
    report = learn(llama_model, tmp_path / "learned")
    quantize_checkpoint(
        llama_model,
        tmp_path / "gptq",
        method="gptq",
        calibration=CalibrationOptions(request=CalibrationRequest(PROSE, samples=16, length=64), method_options=PLAIN),
        threads=1,
    )
    learned, start = open_checkpoint(tmp_path / "learned"), open_checkpoint(tmp_path / "gptq")
    assert learned.config["quantization_config"]["method"] == "learned"
    assert learned.config["quantization_config"]["after"] == "gptq"
    assert {n: learned.format(n) for n in learned.names} == {n: start.format(n) for n in start.names}
    assert any(
        learned.read_packed(n).blocks.ne(start.read_packed(n).blocks).any()
        for n in learned.names
        if learned.format(n) is not None
    )
    (said,) = [note for note in report.notes if note.startswith("learned:")]
    before, after = (float(word) for word in said.split()[-3::2])
    assert after < before
    assert report.bytes == sum(learned.entry(name).nbytes for name in learned.names)
    assert all(0 < t.relative_error < 0.5 for t in report.tensors if t.format in ("q4_1", "q8_0"))
    assert not (tmp_path / "learned.quantizing").exists()


def test_threads_do_not_change_the_bytes(llama_model, tmp_path):
    reports = [learn(llama_model, tmp_path / f"{threads}", threads=threads) for threads in (1, 2, 3)]
    assert content(tmp_path / "1") == content(tmp_path / "2") == content(tmp_path / "3")
    assert reports[0].notes == reports[1].notes == reports[2].notes
    assert [t.relative_error for t in reports[0].tensors] == [t.relative_error for t in reports[1].tensors]


def test_the_model_learns_from_shorter_windows_of_as_much_text(llama_model, tmp_path, monkeypatch):
    seen = []
    whole = learned_run.learn_scales

    def spied(model, start, windows, *arguments, **options):
        seen.extend(windows)
        return whole(model, start, windows, *arguments, **options)

    monkeypatch.setattr(learned_run, "learn_scales", spied)
    learn(llama_model, tmp_path / "out", settings=replace(SETTINGS, window_tokens=20))
    assert max(map(len, seen)) == 20
    assert 52 * 20 <= sum(map(len, seen)) < 53 * 20  # 16 windows of 64 tokens, in whole ones of 20
    assert len({window[0] for window in seen}) == 1  # each begins with the start token


@pytest.mark.parametrize("note", ["block 2", "learning scales"])
def test_a_killed_run_is_resumed_to_the_same_bytes(llama_model, tmp_path, note):
    with pytest.raises(Killed):
        learn(llama_model, tmp_path / "out.gguf", progress=kill_at(note))
    assert not (tmp_path / "out.gguf").exists()
    with pytest.raises(InputError, match="holds unfinished work; pass --resume"):
        learn(llama_model, tmp_path / "out.gguf")
    with pytest.raises(InputError, match="the unfinished work was begun with learning"):
        learn(llama_model, tmp_path / "out.gguf", settings=LearnSettings(steps=7, step_tokens=128), resume=True)
    learn(llama_model, tmp_path / "out.gguf", resume=True)
    (tmp_path / "whole").mkdir()
    learn(llama_model, tmp_path / "whole" / "out.gguf")
    assert content(tmp_path / "out.gguf") == content(tmp_path / "whole" / "out.gguf")


def test_what_it_refuses_it_refuses_at_once(llama_model, tmp_path):
    with pytest.raises(InputError, match="learned needs text"):
        learn(llama_model, tmp_path / "out", statistics=tmp_path / "none.safetensors")
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="exists already"):
        learn(llama_model, tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
