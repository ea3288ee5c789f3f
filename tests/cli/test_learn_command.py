"""`quantlab merge --learn`: what it prints, and what it refuses in one line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command_processes import heed_ctrl_c
from safetensors.torch import load_file, save_file

OUT = "{tmp}/out"


@pytest.fixture(scope="module")
def config(make_model, tmp_path_factory) -> Path:
    """Of a model that is better than its base: with the base's last norm too small, all tokens are equally likely."""
    root = tmp_path_factory.mktemp("models")
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    bad, better = make_model(root / "bad", "llama", **shape), make_model(root / "better", "llama", **shape)
    tensors = load_file(better / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 0.01)
    save_file(tensors, better / "model.safetensors")
    (root / "config.yml").write_text(
        f"merge_method: task_arithmetic\nbase_model: {bad}\nmodels: [{{model: {better}, parameters: {{weight: 0}}}}]\n"
    )
    return root / "config.yml"


LEARN = ("--learn-by", "model", "--learn-steps", 3, "-t", 1)


def test_the_json_object(run, config, prose, tmp_path):
    found = run("merge", config, tmp_path / "out", "--learn", prose, *LEARN, "--json").json
    assert {"method", "tensors", "seconds", "peak_rss_bytes", "requantization_error", "learning"} <= found.keys()
    learning = found["learning"]
    assert learning["proven"]
    assert learning["steps"] == 3
    assert learning["gain_low"] > 0
    assert len(learning["coefficients"]) == 1
    assert (tmp_path / "out" / "merge_config.yml").read_text() == found["config"]


def test_what_is_printed(run, config, prose, tmp_path):
    outcome = run("merge", config, tmp_path / "out", "--learn", prose, *LEARN)
    assert outcome.status == 0, outcome.err
    assert "95 % interval" in outcome.out
    row = next(line for line in outcome.out.splitlines() if line.startswith("model") and "0.0000" in line)
    assert float(row.split()[-1]) > 0
    assert f"written: {tmp_path / 'out'}\n" in outcome.out


WRONG = {
    "a text that is not there": (["{config}", OUT, "--learn", "{tmp}/none.txt"], "none.txt"),
    "too little text": (["{config}", OUT, "--learn", "{config}"], "too short"),
    "no step": (["{config}", OUT, "--learn", "{prose}", "--learn-steps", "0"], "--learn-steps 0: at least 1 is needed"),
    "an unknown grain": (["{config}", OUT, "--learn", "{prose}", "--learn-by", "head"], "--learn-by head: choose one"),
    "nothing to learn by": (["{config}", OUT, "--learn-by", "layer"], "--learn-by: goes with --learn"),
    "nothing to learn in steps": (["{config}", OUT, "--learn-steps", "5"], "--learn-steps: goes with --learn"),
    "nothing to keep": (["{config}", OUT, "--keep-unproven"], "--keep-unproven: goes with --learn"),
    "statistics": (["{config}", OUT, "--learn", "{prose}", "--statistics", "a=b"], "--statistics: does not go with"),
    "a rank": (["{config}", OUT, "--learn", "{prose}", "--rank", "4"], "--rank: does not go with --learn"),
    "what is there": (["{config}", "{config}", "--learn", "{prose}"], "exists already"),
    "an unknown format": (["{config}", OUT, "--learn", "{prose}", "-f", "q9"], "q9"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests_are_one_line(case, refusal, config, prose, tmp_path):
    arguments, expected = WRONG[case]
    said = refusal("merge", *[argument.format(tmp=tmp_path, config=config, prose=prose) for argument in arguments])
    assert expected in said
    assert list(tmp_path.iterdir()) == []


def test_an_unproven_gain_ends_with_2(refusal, config, prose, tmp_path, monkeypatch):
    monkeypatch.setattr("quantlab.search.learning_job.student_quantile", lambda probability, freedom: 1e9)
    said = refusal("merge", config, tmp_path / "out", "--learn", prose, *LEARN)
    assert said.startswith("--learn: unproven: ")
    assert "which includes zero; nothing was written" in said
    assert list(tmp_path.iterdir()) == []


# Learning that takes its time.
SLOW = """
import sys, time
from quantlab.search.coefficient_model import MergedModel
gradient = MergedModel.gradient
def slowly(self, windows):
    print("step", flush=True)
    time.sleep(0.2)
    return gradient(self, windows)
MergedModel.gradient = slowly
from quantlab.cli import main
sys.argv = ["quantlab", "merge", *sys.argv[1:]]
main()
"""


def test_ctrl_c_ends_clean_and_says_how_to_go_on(config, prose, tmp_path):
    arguments = [str(config), str(tmp_path / "out"), "--learn", str(prose), "--learn-by", "model", "-t", "1"]
    command = [sys.executable, "-c", SLOW, *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c
    )
    assert process.stdout is not None
    for _ in range(2):
        assert process.stdout.readline() == "step\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert "--resume" in said
    assert [path.name for path in tmp_path.iterdir()] == ["out.learning"]
    state = json.loads((tmp_path / "out.learning" / "state.json").read_text())
    assert state["step"] >= 1
