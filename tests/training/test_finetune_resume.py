"""Interrupted and resumed is uninterrupted, byte for byte; two processes train as one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tuning_cases import COUNTING, kill_again_and_again, write_split

from quantlab.calibration.quantize import quantize_checkpoint
from quantlab.errors import InputError
from quantlab.training.checkpoints import mark_complete, newest_complete, remove_incomplete, remove_older
from quantlab.training.finetune import finetune
from quantlab.training.finetune_settings import FinetuneSettings

pytest.importorskip("accelerate")

SCRIPT = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from quantlab.training.finetune import finetune
from quantlab.training.finetune_settings import FinetuneSettings

base, data, out, options = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), eval(sys.argv[4])
report = lambda done, total, note: print(note, flush=True)
finetune(base, data, out, settings=FinetuneSettings(**options), resume="--resume" in sys.argv, progress=report)
"""
# What a process group leaves running while the interpreter is finalized may abort it: see leave_group_at_exit.
THREADS_AT_EXIT = """
import atexit
from pathlib import Path

def threads():
    tasks = Path("/proc/self/task")
    print("threads at exit:", *[(task / "comm").read_text() for task in (tasks.iterdir() if tasks.is_dir() else ())])

atexit.register(threads)
"""
OPTIONS = {"rank": 4, "context": 64, "batch_size": 2, "max_steps": 12, "learning_rate": 0.02, "eval_every": 2,
           "dropout": 0.1, "accumulation": 2}  # fmt: skip


@pytest.fixture(scope="module")
def base(llama_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "q4_1"
    quantize_checkpoint(llama_model, folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_split(tmp_path_factory.mktemp("data"), COUNTING, 26)


def command(base: Path, data: Path, out: Path, options: dict, *more: str) -> list[str]:
    return [sys.executable, "-c", SCRIPT, str(base), str(data), str(out), repr(options), *more]


def adapter(out: Path) -> bytes:
    return (out / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("options", [{}, {"dropout": 0.0, "merge_aware": True, "packing": True}], ids=["lora", "merge"])
def test_killed_at_any_step_and_resumed_ends_with_the_same_bytes(options: dict, base, data, tmp_path: Path) -> None:
    settings = {**OPTIONS, **options}
    finetune(base, data, tmp_path / "whole", settings=FinetuneSettings(**settings))
    out = tmp_path / "killed"
    kill_again_and_again(command(base, data, out, settings), times=3, fewest=1, most=5)
    assert not out.exists()
    subprocess.run(command(base, data, out, settings, "--resume"), check=True, stdout=subprocess.DEVNULL)
    assert adapter(out) == adapter(tmp_path / "whole")
    assert not out.with_name("killed.training").exists()


def test_a_run_of_other_settings_is_not_resumed(base, data, tmp_path: Path) -> None:
    work = tmp_path / "out.training"
    work.mkdir()
    (work / "run.json").write_text("{}")
    with pytest.raises(InputError, match="--resume"):
        finetune(base, data, tmp_path / "out", settings=FinetuneSettings(**OPTIONS))
    with pytest.raises(InputError, match="another model, data, settings, threads"):
        finetune(base, data, tmp_path / "out", settings=FinetuneSettings(**OPTIONS), resume=True)


def test_only_marked_checkpoints_count(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert newest_complete(tmp_path) is None
    for step in (9, 2):
        mark_complete(tmp_path / f"checkpoint-{step}")
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-9"


def test_older_checkpoints_go_by_steps_and_the_best_stays(tmp_path: Path) -> None:
    for step in (2, 4, 10, 6, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
        mark_complete(tmp_path / f"checkpoint-{step}")
    remove_older(tmp_path, 3, best="elsewhere/checkpoint-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-6", "checkpoint-8"]
    remove_older(tmp_path, 2, best=str(tmp_path / "checkpoint-6"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-6"]


def test_a_checkpoint_whose_removal_was_cut_short_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (2, 4, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "weights").touch()
        mark_complete(tmp_path / f"checkpoint-{step}")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **_: (path / "weights").unlink())
        remove_older(tmp_path, 1)
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-6"
    remove_incomplete(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]


def test_two_processes_train_as_one(base, data, tmp_path: Path) -> None:
    """Data parallel over gloo: the loss curve of one process at the same global batch."""
    script = tmp_path / "train.py"
    script.write_text(THREADS_AT_EXIT + SCRIPT)
    curves = {}
    for processes, batch in ((1, 4), (2, 2)):
        options = {**OPTIONS, "dropout": 0.0, "batch_size": batch, "accumulation": 1, "max_steps": 6,
                   "activations": "float", "learning_rate": 2e-3}  # fmt: skip  # int8 would turn last bits into steps
        out = tmp_path / f"out{processes}"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        arguments = [str(script), str(base), str(data), str(out), repr(options)]
        done = subprocess.run([*launch, *arguments], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-20000:]
        assert done.stdout.count("threads at exit") == processes
        assert "gloo" not in done.stdout
        log = json.loads((out / "training_log.json").read_text())["log"]
        curves[processes] = [entry[key] for entry in log for key in ("loss", "eval_loss") if key in entry]
    assert len(curves[1]) > 5
    np.testing.assert_allclose(curves[2], curves[1], rtol=3e-6)
    one, two = (load_file(tmp_path / f"out{n}" / "adapter_model.safetensors") for n in (1, 2))
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-3, atol=1e-4)


def test_sharding_on_cpus_is_refused(base, data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="share the data"):
        finetune(base, data, tmp_path / "out", settings=FinetuneSettings(**OPTIONS), device="cpu")
