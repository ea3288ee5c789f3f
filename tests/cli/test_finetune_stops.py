"""`quantlab finetune` that does not come to its end: signals, a full disk, a loss that is no number, no memory."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_processes import PATIENCE, QUANTLAB, Run, environment, heed_ctrl_c
from finetune_cases import OPTIONS, names, write_rows

from quantlab.calibration.quantize import quantize_checkpoint
from quantlab.training import finetune as training
from quantlab.training.trainer import NextTokenTrainer


@pytest.fixture(scope="module")
def base(llama_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "q4_1"
    quantize_checkpoint(llama_model, folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data"))


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [*QUANTLAB, "finetune", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), preexec_fn=heed_ctrl_c
    )


def stopped(process: subprocess.Popen[str], sign: str, folder: Path, number: int) -> tuple[str, str]:
    """What was printed by a process that gets the signal as soon as a file like `sign` is in `folder`."""
    deadline = time.monotonic() + PATIENCE
    with process:
        while not list(folder.glob(sign)):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "hung"
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate(timeout=PATIENCE)
    progress = "training: "  # where the machine is slow
    return out, "".join(line for line in err.splitlines(keepends=True) if not line.startswith(progress))


INTERRUPTED = "quantlab: interrupted; nothing was left half-written\n"


@pytest.mark.parametrize(("number", "status", "end"), [(signal.SIGINT, 130, INTERRUPTED), (signal.SIGTERM, 143, "")])
def test_stopped_says_how_to_resume_and_resumes(number, status, end, base: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = (base, data, out, *OPTIONS, "--max-steps", 60, "--eval-every", 5, "--threads", 1)
    process = start(*arguments)
    printed = stopped(process, "out.training/checkpoints/checkpoint-*/complete", tmp_path, number)
    note = f"note: checkpoints are kept in {out}.training: the same command with --resume goes on from there\n"
    assert (process.returncode, *printed) == (status, "", note + end)
    assert names(tmp_path) == ["out.training"]
    again = start(*arguments)
    assert again.communicate(timeout=PATIENCE)[1].endswith("go on with --resume, or remove the folder\n")
    assert again.returncode == 2
    resumed = start(*arguments, "--resume", "--json")
    found, _ = resumed.communicate(timeout=PATIENCE)
    assert resumed.returncode == 0
    assert '"steps": 60' in found
    assert names(tmp_path) == ["out"]


def test_stopped_before_any_checkpoint_leaves_nothing(base: Path, data: Path, tmp_path: Path) -> None:
    process = start(base, data, tmp_path / "out", *OPTIONS, "--max-steps", 100_000)
    printed = stopped(process, "out.training/run.json", tmp_path, signal.SIGINT)
    assert (process.returncode, *printed) == (130, "", INTERRUPTED)
    assert names(tmp_path) == []


FULL = """
import resource, sys
from quantlab import cli
from quantlab.training import trainer

room = int(sys.argv.pop(1))
mark = trainer.mark_complete
def mark_and_fill(checkpoint):  # from now on the disk takes so many bytes of a file
    mark(checkpoint)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
trainer.mark_complete = mark_and_fill
sys.exit(cli._run())
"""


@pytest.mark.parametrize(
    ("room", "words"),
    [(8000, "File too large"), (20_000, "")],
    ids=["safetensors fails", "torch.save fails"],
)
def test_a_full_disk_keeps_the_last_complete_checkpoint(
    room: int, words: str, run: Run, base: Path, data: Path, tmp_path: Path
) -> None:
    """safetensors and torch.save raise errors of their own."""
    out = tmp_path / "out"
    arguments = ["finetune", base, data, out, *OPTIONS, "--eval-every", 2, "--threads", 1]
    command = [sys.executable, "-c", FULL, room, *arguments]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"quantlab: {tmp_path}: cannot be written: {words}")
    kept = f"{out}.training/checkpoints/checkpoint-2"
    assert done.stderr.endswith(f"; the last good checkpoint is {kept}; make room, and run it again with --resume\n")
    assert done.stderr.count("\n") == 1
    assert names(Path(kept).parent) == ["checkpoint-2"]
    assert run(*arguments, "--resume", "--json").json["steps"] == 4


@pytest.mark.parametrize(
    "options", [(), ("--early-stopping", 1, "--learning-rate", 1e-12, "--eval-every", 1)], ids=["steps", "early"]
)
def test_a_disk_that_is_full_at_the_end_loses_nothing(
    options: tuple[object, ...], run: Run, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed behind its last step, the run ends as it would have: no step is taken beyond it."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    found = run("finetune", base, data, whole, *OPTIONS, *options, "--json").json
    arguments = ("finetune", base, data, out, *OPTIONS, *options)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(training, "write_adapter_files", full)
        outcome = run(*arguments)
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err == (
        f"quantlab: {tmp_path}: cannot be written: No space left on device; the last good checkpoint is "
        f"{out}.training/checkpoints/checkpoint-{found['steps']}; make room, and run it again with --resume\n"
    )
    assert names(tmp_path) == ["out.training", "whole"]
    resumed = run(*arguments, "--resume", "--json").json
    for key in ("steps", "train_loss", "eval_loss", "eval_loss_before"):
        assert resumed[key] == found[key]
    assert names(tmp_path) == ["out", "whole"]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_a_loss_that_is_no_number(run: Run, base: Path, data: Path, tmp_path: Path, monkeypatch) -> None:
    import torch

    original = NextTokenTrainer.training_step

    def poisoned(self, model, *args, **kwargs):
        if self.state.global_step == 2:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
        return original(self, model, *args, **kwargs)

    monkeypatch.setattr(NextTokenTrainer, "training_step", poisoned)
    outcome = run("finetune", base, data, tmp_path / "out", *OPTIONS, "--eval-every", 1)
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err == (
        f"quantlab: the loss of step 3 is nan; the last good checkpoint is {tmp_path}/out.training/checkpoints/"
        "checkpoint-2; lower --learning-rate or --gradient-clip, and look at the rows of that step\n"
    )
    assert names(tmp_path) == ["out.training"]


@pytest.mark.parametrize("kind", ["of the accelerator", "of the CPU", "of Python"])
def test_no_memory(kind: str, run: Run, base: Path, data: Path, tmp_path: Path, monkeypatch) -> None:
    import torch

    def no_room(self, *args, **kwargs):
        if kind == "of the CPU":
            torch.empty(1 << 60, dtype=torch.uint8)
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried") if kind == "of the accelerator" else MemoryError

    monkeypatch.setattr(NextTokenTrainer, "training_step", no_room)
    outcome = run("finetune", base, data, tmp_path / "out", *OPTIONS)
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err.startswith("quantlab: out of memory; no checkpoint was complete yet; use --gradient-check")
    assert outcome.err.count("\n") == 1
    assert names(tmp_path) == []
