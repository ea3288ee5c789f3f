"""`quantize` with calibrated methods as a user types it: fields, notes, interruption and resumption, statistics."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from command_processes import PATIENCE, QUANTLAB, environment, heed_ctrl_c

from quantlab.formats import FORMATS

CALIBRATION = ("--calibration-samples", 24, "--calibration-length", 64, "-t", 1)


@pytest.fixture
def calibrated(prose: Path) -> tuple[object, ...]:
    return ("--calibration", prose, *CALIBRATION)


def spread(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_json_has_weighted_errors_and_notes(run, llama_model, calibrated, tmp_path):
    report = run("quantize", llama_model, tmp_path / "out", "--method", "gptq", *calibrated, "--json").json
    for tensor in report["tensors"]:
        assert {"name", "format", "relative_error", "weighted_error", "note"} <= set(tensor)
        assert (tensor["weighted_error"] is None) == (tensor["format"] not in FORMATS)
    assert report["notes"] == []


def test_the_table_shows_weighted_errors(run, llama_model, calibrated, tmp_path):
    outcome = run("quantize", llama_model, tmp_path / "out", "--method", "search", *calibrated)
    assert outcome.status == 0
    assert "weighted error" in outcome.out
    assert f"written: {tmp_path / 'out'}" in outcome.out


def test_the_bundled_text_needs_no_option(run, llama_model, tmp_path):
    outcome = run("quantize", llama_model, tmp_path / "out", "--method", "search", "--calibration-samples", 8, "-t", 1)
    assert outcome.status == 0
    told = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["calibration"]
    assert told["text"] == "bundled"


def test_fallbacks_are_told_on_stderr(run, llama_model, calibrated, tmp_path):
    """The tiny model's 2,000 tokens are enough for 64 inputs; those of one window are not."""
    few = (*calibrated[:2], "--calibration-samples", 1, "--calibration-length", 16, "-t", 1)
    outcome = run("quantize", llama_model, tmp_path / "out", "--method", "gptq", *few, "--json")
    name = "model.layers.0.mlp.down_proj.weight"
    assert f"note: {name}: 16 calibration tokens for 96 inputs" in outcome.err.splitlines()
    assert {t["note"] for t in outcome.json["tensors"] if t["name"] == name} == {"16 calibration tokens for 96 inputs"}


def test_a_yaml_file_names_options_as_the_command_line_does(run, llama_model, prose, tmp_path):
    """And a seed is no request for calibration: rounding to nearest ignores it."""
    options = {"calibration": str(prose), "calibration-samples": 24, "calibration-length": 64, "method": "search"}
    (tmp_path / "options.yaml").write_text(json.dumps({**options, "refit-rounds": 1}))
    assert run("quantize", llama_model, tmp_path / "out", "-c", tmp_path / "options.yaml", "-t", 1).status == 0
    told = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (told["method"], told["calibration"]["length"], told["refit_rounds"]) == ("search", 64, 1)
    assert run("quantize", llama_model, tmp_path / "rounded", "--seed", 7).status == 0


def test_recipes_and_levels(run, llama_model, tmp_path):
    (tmp_path / "recipe.yaml").write_text("rules:\n  - ['*.down_proj.weight', q5_1]\nbase: q4_1\n")
    report = run("quantize", llama_model, tmp_path / "out", "--recipe", tmp_path / "recipe.yaml", "--json").json
    formats = {tensor["name"].split(".")[-2]: tensor["format"] for tensor in report["tensors"]}
    assert (formats["down_proj"], formats["up_proj"], formats["embed_tokens"]) == ("q5_1", "q4_1", "q8_0")
    errors = []
    for levels in (16, 8, 4):
        report = run("quantize", llama_model, tmp_path / f"{levels}", "--levels", levels, "--json").json
        errors.append({tensor["name"]: tensor["relative_error"] for tensor in report["tensors"]})
    assert errors[0]["model.embed_tokens.weight"] == errors[2]["model.embed_tokens.weight"]
    name = "model.layers.0.mlp.up_proj.weight"
    assert 1.8 * errors[0][name] < errors[1][name] < errors[2][name] / 1.8


def test_statistics_are_inspected_and_used_again(run, llama_model, calibrated, tmp_path):
    file, first, again = tmp_path / "statistics.safetensors", tmp_path / "first", tmp_path / "again"
    run("quantize", llama_model, first, "--method", "gptq", *calibrated, "--statistics-out", file, "--json")
    summary = run("inspect", file, "--json").json
    assert summary["tokens"] == summary["calibration"]["tokens"] >= 24 * 64
    weights = [weight for layer in summary["layers"] for weight in layer["weights"]]
    report = run("quantize", llama_model, again, "--method", "gptq", "--statistics", file, "-t", 1, "--json").json
    assert set(weights) == {tensor["name"] for tensor in report["tensors"] if tensor["format"] in FORMATS}
    assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    table = run("inspect", file).out
    assert "model.layers.1.mlp.gate_proj.weight, model.layers.1.mlp.up_proj.weight" in table
    assert "input statistics for gptq" in table


def test_learned_gives_the_same_bytes_for_any_threads(run, llama_model, calibrated, tmp_path):
    """Also where a run is stopped while it learns and goes on with other threads."""
    *calibration, _, _ = calibrated
    learned = ["--method", "learned", *calibration, "--learn-steps", 20]
    out, work = tmp_path / "out", tmp_path / "out.quantizing"
    process = subprocess.Popen(
        [*QUANTLAB, *map(str, ["quantize", llama_model, out, *learned, "-t", 3])],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), preexec_fn=heed_ctrl_c,
    )  # fmt: skip
    end = time.monotonic() + PATIENCE
    while not (work / "learned-teacher").exists() and time.monotonic() < end:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, err
    assert not out.exists()
    assert run("quantize", llama_model, out, *learned, "-t", 2, "--resume").status == 0
    assert run("quantize", llama_model, tmp_path / "twin", *learned, "-t", 1).status == 0
    assert spread(out) == spread(tmp_path / "twin")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "twin"]


def test_requests_that_make_no_sense(refusal, llama_model, prose, tmp_path):
    out = tmp_path / "out"
    message = refusal("quantize", llama_model, out, "--calibration", prose)
    assert message == "--calibration: method rtn uses none; choose --method search or gptq"
    message = refusal("quantize", llama_model, out, "--calibration-samples", 9)
    assert message == "--calibration: method rtn uses none; choose --method search or gptq"
    message = refusal("quantize", llama_model, out, "--method", "search", "--calibration-samples", 0)
    assert message == "--calibration-samples 0: at least 1 is needed"
    message = refusal("quantize", llama_model, out, "--recipe", "q4_1", "--uniform")
    assert message == "--uniform goes with --format; a recipe names the embedding's and head's formats itself"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill -9"])
def test_a_broken_run_is_resumed_to_the_same_bytes(number, run, make_model, calibrated, tmp_path):
    """A process that is stopped once the first of ten blocks is done."""
    model = make_model(tmp_path / "model", "llama", num_hidden_layers=10)
    out, work = tmp_path / "out", tmp_path / "out.quantizing"
    arguments = ["quantize", model, out, "--method", "gptq", *calibrated]
    process = subprocess.Popen(
        [*QUANTLAB, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), preexec_fn=heed_ctrl_c,
    )  # fmt: skip
    end = time.monotonic() + PATIENCE
    while not (work / "block-0000.safetensors").exists() and time.monotonic() < end:
        time.sleep(0.002)
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE)
    assert not out.exists()
    assert (work / "block-0000.safetensors").exists()
    if number == signal.SIGINT:
        assert process.returncode == 130
        hint = f"note: finished layers are kept in {work}: the same command with --resume goes on from there"
        assert hint in err.splitlines()
        assert not list(tmp_path.glob(".out*"))
    assert run(*arguments, "--resume").status == 0
    assert run(*arguments[:2], tmp_path / "twin", *arguments[3:]).status == 0
    assert spread(out) == spread(tmp_path / "twin")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "twin"]
