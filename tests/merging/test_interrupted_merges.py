"""Merges that are broken off: what is kept, what a resumed run makes of it, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from streamed_models import config_of, files_of, weights, write_model

from quantlab import merge_checkpoints
from quantlab.errors import InputError
from quantlab.merging.tensor_merge import TensorMerger
from quantlab.merging.work import work_folder_of

# A merge that takes its time, with 20 tensors.
SLOW = """
import sys, time
from quantlab.merging.tensor_merge import TensorMerger
merge = TensorMerger.merge
def slowly(self, *arguments):
    time.sleep(0.15)
    return merge(self, *arguments)
TensorMerger.merge = slowly
from quantlab.cli import main
sys.argv = ["quantlab", "merge", *sys.argv[1:]]
main()
"""
PATIENCE = 120  # seconds until a subprocess counts as hung


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("parents")
    base = write_model(root / "base", 0)
    models = [write_model(root / name, i, start=base) for i, name in enumerate("ab", 1)]
    return config_of("dare_ties", *models, base=base, density=0.4, weight=1)


class PowerCutError(BaseException):
    """Ends everything, as a kill does."""


def fail(*arguments, **options):
    raise PowerCutError


def break_off(monkeypatch: pytest.MonkeyPatch, after: int, text: str, out: Path) -> None:
    """Begin a merge, of which every tensor after some fails."""
    count, merge = 0, TensorMerger.merge

    def failing(self, *arguments):
        nonlocal count
        count += 1
        return merge(self, *arguments) if count <= after else fail()

    with monkeypatch.context() as patch:
        patch.setattr(TensorMerger, "merge", failing)
        with pytest.raises(PowerCutError):
            merge_checkpoints(text, out, threads=1)


@pytest.mark.parametrize("name", ["out", "out.gguf"])
def test_a_resumed_merge_has_the_same_bytes(name, text, tmp_path, monkeypatch):
    merge_checkpoints(text, tmp_path / name, threads=1)
    expected = files_of(tmp_path / name)
    (tmp_path / "other").mkdir()
    out = tmp_path / "other" / name
    break_off(monkeypatch, 5, text, out)
    assert not out.exists()
    journal = (work_folder_of(out) / "journal.jsonl").read_text().splitlines()
    assert len(journal) == 5
    merged = []
    with monkeypatch.context() as patch:
        merge = TensorMerger.merge
        patch.setattr(
            TensorMerger, "merge", lambda self, work, *rest: merged.append(work.plan.name) or merge(self, work, *rest)
        )
        report = merge_checkpoints(text, out, threads=1, resume=True)
    assert sorted([*merged, *(json.loads(line)["name"] for line in journal)]) == sorted(weights(out))
    assert report.tensors == len(weights(out))
    assert files_of(out) == expected
    assert [path.name for path in out.parent.iterdir()] == [name]


def test_a_tensor_that_the_disk_lost_is_merged_again(text, tmp_path, monkeypatch):
    merge_checkpoints(text, tmp_path / "expected", threads=1)
    break_off(monkeypatch, 5, text, tmp_path / "out")
    file = work_folder_of(tmp_path / "out") / "output" / "model.safetensors"
    content = bytearray(file.read_bytes())
    header = int.from_bytes(content[:8], "little")
    content[8 + header :] = bytes(len(content) - 8 - header)
    file.write_bytes(content)
    merge_checkpoints(text, tmp_path / "out", resume=True)
    assert files_of(tmp_path / "out")["model.safetensors"] == files_of(tmp_path / "expected")["model.safetensors"]


def test_a_packed_output_goes_on_after_its_float_merge(text, tmp_path, monkeypatch):
    merge_checkpoints(text, tmp_path / "expected", format="q4_1")

    with monkeypatch.context() as patch:
        patch.setattr("quantlab.merging.job.quantize_merged", fail)
        with pytest.raises(PowerCutError):
            merge_checkpoints(text, tmp_path / "out", format="q4_1")
    with monkeypatch.context() as patch:  # the method of packing may be another one now
        patch.setattr(TensorMerger, "merge", fail)
        resumed = merge_checkpoints(text, tmp_path / "out", format="q4_1", resume=True, report=tmp_path / "report")
    assert files_of(tmp_path / "out")["model.safetensors"] == files_of(tmp_path / "expected")["model.safetensors"]
    assert resumed.requantization_error > 0
    assert len(resumed.conflicts.tensors) == resumed.tensors


def test_unfinished_work_is_not_thrown_away_unasked(text, tmp_path, monkeypatch):
    break_off(monkeypatch, 3, text, tmp_path / "out")
    with pytest.raises(InputError, match="holds unfinished work; pass --resume"):
        merge_checkpoints(text, tmp_path / "out")
    with pytest.raises(InputError, match="the unfinished work was begun with seed 0, now it is 1"):
        merge_checkpoints(text, tmp_path / "out", resume=True, seed=1)
    merge_checkpoints(text, tmp_path / "out", overwrite=True, seed=1)
    assert not work_folder_of(tmp_path / "out").exists()
    report = merge_checkpoints(text, tmp_path / "other", resume=True)
    assert report.notes[0].startswith("nothing to resume")


def test_a_failure_before_the_first_tensor_leaves_nothing(text, tmp_path, monkeypatch):
    break_off(monkeypatch, 0, text, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def slow_merge(config: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, str(config), str(out), "-t", "1", *options],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def wait_for_tensors(out: Path, process: subprocess.Popen[str], count: int) -> None:
    journal, deadline = work_folder_of(out) / "journal.jsonl", time.monotonic() + PATIENCE
    while not journal.is_file() or journal.read_text().count("\n") < count:
        assert process.poll() is None, "ended too early"
        assert time.monotonic() < deadline, "hung"
        time.sleep(0.01)


def test_killed_and_interrupted_commands(text, tmp_path):
    """Killed, then interrupted, then run to the end: the bytes are those of a run that nobody disturbed."""
    config, out = tmp_path / "config.yml", tmp_path / "out"
    config.write_text(text)
    merge_checkpoints(config, tmp_path / "expected", threads=1)
    with slow_merge(config, out) as process:
        wait_for_tensors(out, process, 2)
        process.kill()
    assert not out.exists()
    with slow_merge(config, out, "--resume") as process:
        wait_for_tensors(out, process, 4)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert f"finished tensors are kept in {work_folder_of(out)}: the same command with --resume" in said
    assert said.endswith("quantlab: interrupted; nothing was left half-written\n")
    assert not out.exists()
    merge_checkpoints(config, out, resume=True)
    assert files_of(out)["model.safetensors"] == files_of(tmp_path / "expected")["model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yml", "expected", "out"]
