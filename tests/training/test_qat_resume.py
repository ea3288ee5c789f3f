"""A killed run of quantization-aware training, resumed, is an uninterrupted one, byte for byte."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tuning_cases import COUNTING, kill_again_and_again, write_split

from quantlab.errors import InputError
from quantlab.training.finetune_settings import FinetuneSettings
from quantlab.training.qat import qat
from quantlab.training.qat_settings import QatSettings

pytest.importorskip("accelerate")

SCRIPT = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from quantlab.training.finetune_settings import FinetuneSettings
from quantlab.training.qat import qat
from quantlab.training.qat_settings import QatSettings

base, data, out = map(Path, sys.argv[1:4])
settings, training, teacher = eval(sys.argv[4])
report = lambda done, total, note: print(note, flush=True)
qat(base, data, out, settings=QatSettings(**settings), training=FinetuneSettings(**training), teacher=teacher,
    resume="--resume" in sys.argv, progress=report)
"""
TRAINING = {"rank": 4, "context": 64, "batch_size": 2, "max_steps": 10, "learning_rate": 0.003, "eval_every": 2,
            "accumulation": 2}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_split(tmp_path_factory.mktemp("data"), COUNTING, 26)


def contents(out: Path) -> tuple[bytes, dict]:
    result = json.loads((out / "training_log.json").read_text())["result"]
    figures = {name: result[name] for name in ("steps", "eval_loss", "eval_loss_before", "kld_before", "kld_after")}
    return (out / "model.safetensors").read_bytes(), figures


@pytest.mark.parametrize(
    ("settings", "taught"),
    [({"float_steps": 4}, False), ({"train": "lora"}, True), ({"train": "scales"}, True)],
    ids=["full", "lora", "scales"],
)
def test_killed_at_any_step_and_resumed_ends_with_the_same_bytes(settings, taught, llama_model, data, tmp_path) -> None:
    teacher = str(llama_model) if taught else None
    whole = tmp_path / "whole"
    qat(
        llama_model, data, whole, settings=QatSettings(**settings), training=FinetuneSettings(**TRAINING),
        teacher=teacher,
    )  # fmt: skip
    out = tmp_path / "killed"
    arguments = [
        sys.executable,
        "-c",
        SCRIPT,
        str(llama_model),
        str(data),
        str(out),
        repr((settings, TRAINING, teacher)),
    ]
    kill_again_and_again(arguments, times=2, fewest=2, most=4)
    assert not out.exists()
    with pytest.raises(InputError, match="another settings"):
        qat(llama_model, data, out, training=FinetuneSettings(**{**TRAINING, "seed": 5}), resume=True,
            settings=QatSettings(**settings), teacher=teacher)  # fmt: skip
    subprocess.run([*arguments, "--resume"], check=True, stdout=subprocess.DEVNULL)
    assert contents(out) == contents(whole)
    assert not out.with_name("killed.training").exists()
