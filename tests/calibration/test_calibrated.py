"""Calibrated quantization from end to end: what it gains, what it sees, its records, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from calibrated_runs import METHODS, refusal, spread
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantlab import load_model, open_checkpoint, quantize_checkpoint
from quantlab.calibration import blockwise
from quantlab.calibration.activations import ActivationFile
from quantlab.calibration.fingerprint import overlap
from quantlab.calibration.samples import CalibrationRequest, open_calibration
from quantlab.formats import FORMATS

FAMILIES = ("llama", "gpt2", "mistral", "qwen2", "qwen3", "gpt_neox", "phi3", "gemma2", "gemma3_text")


# What comes out.


@torch.inference_mode()
def output_error(model, twin, windows: torch.Tensor) -> float:
    """Mean squared difference of logits."""
    return float((model(windows).logits - twin(windows).logits).square().mean())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_quantized_better_with_each_method(family, tied, make_model, quantize, request_, tmp_path):
    """On the text that it was calibrated with, at three levels, where differences are large."""
    model = make_model(tmp_path / "model", family, tied=tied)
    samples = open_calibration(open_checkpoint(model), request_)
    windows = torch.tensor([window for window in samples.windows if len(window) == 64])
    original, errors = load_model(model), {}
    quantize_checkpoint(model, tmp_path / "rtn", levels=4)
    errors["rtn"] = output_error(original, load_model(tmp_path / "rtn"), windows)
    for method in METHODS:
        report = quantize(model, tmp_path / method, method, levels=4)
        errors[method] = output_error(original, load_model(tmp_path / method), windows)
        assert {tensor.note for tensor in report.tensors} == {None}
        packed = [tensor for tensor in report.tensors if tensor.format in FORMATS]
        assert all(0 < tensor.weighted_error < 1 and 0 < tensor.relative_error < 1 for tensor in packed)
    assert errors["search"] < 0.8 * errors["rtn"]
    assert errors["gptq"] < 0.95 * errors["search"]


@pytest.mark.parametrize("method", METHODS)
def test_sizes_and_shapes_are_those_of_rounding(untied, method, quantize, tmp_path):
    rounded = quantize_checkpoint(untied, tmp_path / "rtn", recipe="q4_1-mixed")
    report = quantize(untied, tmp_path / "out", method, recipe="q4_1-mixed")
    assert (report.bytes, report.bits_per_weight) == (rounded.bytes, rounded.bits_per_weight)
    plans = [[(t.name, t.shape, t.format) for t in each.tensors] for each in (report, rounded)]
    assert plans[0] == plans[1]
    theirs, ours = load_file(tmp_path / "rtn" / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for tensor in report.tensors:
        assert torch.equal(theirs[tensor.name], ours[tensor.name]) == (tensor.format == "f32")


@torch.inference_mode()
def hooked_moments(model, windows) -> dict[str, torch.Tensor]:
    """E[x x^T] of every linear layer's inputs, a window at a time."""
    totals: dict[str, torch.Tensor] = {}

    def hook(name: str):
        def add(module, arguments) -> None:
            rows = arguments[0][0].to(torch.float64)
            totals[name] = totals.get(name, 0) + rows.T @ rows

        return add

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(hook(f"{name}.weight"))
    for window in windows:
        model(input_ids=torch.tensor([window]), use_cache=False)
    return {name: total / sum(map(len, windows)) for name, total in totals.items()}


def saved_statistics(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        layers = json.loads(file.metadata()["layers"])
        return {name: file.get_tensor(key) for name, key in layers.items()}


def test_gptq_sees_every_layer_behind_its_quantized_predecessors(untied, quantize, request_, tmp_path):
    """The finished model, run as a whole, has the second moments that it was quantized with."""
    statistics = tmp_path / "statistics.safetensors"
    quantize(untied, tmp_path / "out", "gptq", levels=4, activations="float", statistics_out=statistics)
    windows = open_calibration(open_checkpoint(untied), request_).windows
    expected = hooked_moments(load_model(tmp_path / "out"), windows)
    original = hooked_moments(load_model(untied), windows)
    found = saved_statistics(statistics)
    assert set(found) == set(expected)
    for name, moment in found.items():
        scale = float(expected[name].diagonal().mean())
        torch.testing.assert_close(moment.double(), expected[name], rtol=1e-4, atol=1e-4 * scale)
        assert not torch.allclose(moment.double(), original[name], rtol=1e-3, atol=1e-3 * scale)


def test_so_does_search_which_keeps_the_tiles(untied, quantize, request_, tmp_path):
    statistics = tmp_path / "statistics.safetensors"
    quantize(untied, tmp_path / "out", "search", levels=4, activations="float", statistics_out=statistics)
    windows = open_calibration(open_checkpoint(untied), request_).windows
    expected = hooked_moments(load_model(tmp_path / "out"), windows)
    found = saved_statistics(statistics)
    assert set(found) == set(expected)
    for name, tiles in found.items():
        blocks = torch.arange(expected[name].shape[0]).reshape(-1, 32)
        parts = torch.stack([expected[name][part][:, part] for part in blocks])
        torch.testing.assert_close(
            tiles.double(), parts, rtol=1e-4, atol=1e-4 * float(expected[name].diagonal().mean())
        )


@pytest.mark.parametrize("method", METHODS)
def test_int8_activations_find_nearly_the_same_statistics(untied, method, quantize, tmp_path):
    """Those of a layer's first inputs are the same; behind it, rounding to int8 moves them by less than 5 %."""
    found = {}
    options = {"correct_drift": False} if method == "gptq" else {}  # what follows weights that depend on the inputs
    for activations in ("float", "int8"):
        path = tmp_path / f"{activations}.safetensors"
        chosen = {"activations": activations, "statistics_out": path, "method_options": options}
        quantize(untied, tmp_path / activations, method, **chosen)
        found[activations] = saved_statistics(path)
    first = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(found["float"].pop(first), found["int8"].pop(first))
    moved = [float((other - found["float"][name]).norm() / other.norm()) for name, other in found["int8"].items()]
    assert 0 < max(moved) < 0.05


def test_parts_of_a_large_matrix_give_the_whole(llama_model, quantize, monkeypatch, tmp_path):
    """Embedding and head are quantized some rows at a time; bytes and errors are those of all at once."""
    from quantlab.calibration import vocabulary

    whole = quantize(llama_model, tmp_path / "whole", uniform=True)
    monkeypatch.setattr(vocabulary, "PART", 64 * 100)
    parts = quantize(llama_model, tmp_path / "parts", uniform=True)
    assert spread(tmp_path / "whole") == spread(tmp_path / "parts")
    for one, other in zip(whole.tensors, parts.tensors, strict=True):
        assert one.relative_error == pytest.approx(other.relative_error, rel=1e-5)
        assert one.weighted_error is None or one.weighted_error == pytest.approx(other.weighted_error, rel=1e-4)
    assert whole.tensors[0].weighted_error > 0


# The same bytes, whatever happens.


@pytest.mark.parametrize("method", METHODS)
def test_threads_do_not_change_the_bytes(llama_model, method, quantize, tmp_path):
    for threads in (1, 3):
        quantize(llama_model, tmp_path / f"{threads}", method, threads=threads)
    assert spread(tmp_path / "1") == spread(tmp_path / "3")


# What the output says of itself.


def test_a_folder_tells_how_it_was_made(llama_model, quantize, request_, tmp_path):
    quantize(llama_model, tmp_path / "out", "gptq", levels=8, method_options={"refit_rounds": 1})
    samples = open_calibration(open_checkpoint(llama_model), request_)
    told = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (told["method"], told["levels"], told["refit_rounds"]) == ("gptq", 8, 1)
    assert told["calibration"] == samples.provenance()
    assert told["calibration"]["hash"] == samples.digest()
    record = open_checkpoint(tmp_path / "out").sidecar("calibration")
    assert overlap(record["fingerprint"], samples.windows) == 1
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()


def test_so_does_a_gguf_file_which_holds_the_same_blocks(llama_model, quantize, request_, tmp_path):
    quantize(llama_model, tmp_path / "out", "search")
    quantize(llama_model, tmp_path / "out.gguf", "search")
    folder, file = open_checkpoint(tmp_path / "out"), open_checkpoint(tmp_path / "out.gguf")
    for name in folder.names:
        assert torch.equal(folder.read(name), file.read(name))
    assert file.sidecar("calibration") == folder.sidecar("calibration")
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert fields["quantlab.method"].contents() == "search"
    assert json.loads(fields["quantlab.quantization"].contents()) == folder.config["quantization_config"]


@pytest.mark.parametrize("method", METHODS)
def test_a_dry_run_of_a_method_knows_the_size_of_a_gguf_file(llama_model, method, quantize, tmp_path):
    """Its metadata tell what it was calibrated with."""
    out = tmp_path / "out.gguf"
    dry = quantize(llama_model, out, method, dry_run=True)
    assert list(tmp_path.iterdir()) == []
    assert dry.file_bytes == quantize(llama_model, out, method).file_bytes == out.stat().st_size


def test_progress_counts_weights(llama_model, quantize, tmp_path):
    calls: list[tuple[int, int, str]] = []
    report = quantize(llama_model, tmp_path / "out", progress=lambda *call: calls.append(call))
    done, totals, _ = zip(*calls, strict=True)
    assert list(done) == sorted(done)
    assert set(totals) == {report.parameters}
    assert 0.4 * report.parameters < done[-1] <= report.parameters


# Refusals and fallbacks.


def copy_of(model: Path, folder: Path, change) -> Path:
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight", "model.norm.weight"]
)
def test_damaged_weights_are_named(llama_model, method, name, quantize, tmp_path):
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[7] = float("nan")

    model = copy_of(llama_model, tmp_path / "model", damage)
    message = refusal(quantize, model, tmp_path / "out", method)
    assert message == f"{model}: {name}: holds NaN or infinity; the checkpoint is damaged"
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.quantizing").exists() == ("layers.1" in name)  # the first block was finished by then


def test_layers_that_see_nothing_fall_back_and_say_so(llama_model, quantize, tmp_path):
    """A norm of zeros: the feed-forward layers of the second block get no inputs at all."""

    def silence(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.post_attention_layernorm.weight"].zero_()

    model = copy_of(llama_model, tmp_path / "model", silence)
    report = quantize(model, tmp_path / "out", "gptq")
    notes = {tensor.name: tensor.note for tensor in report.tensors if tensor.note}
    silent = {f"model.layers.1.mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")}
    assert set(notes) == silent
    assert all(note.startswith("no activations seen") for note in notes.values())
    assert torch.isfinite(load_model(tmp_path / "out")(torch.arange(64)[None]).logits).all()


def test_constant_inputs_are_damped(llama_model, quantize, tmp_path):
    """Weights of zero and a bias: a second moment of rank one."""

    def flatten(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("q_proj", "k_proj", "v_proj"):
            tensors[f"model.layers.0.self_attn.{name}.weight"].zero_()

    model = copy_of(llama_model, tmp_path / "model", flatten)
    quantize(model, tmp_path / "out", "gptq")
    assert torch.isfinite(load_model(tmp_path / "out")(torch.arange(64)[None]).logits).all()


def test_a_disk_that_is_too_small_is_told_at_once(llama_model, quantize, monkeypatch, tmp_path):
    monkeypatch.setattr(ActivationFile, "nbytes", 10**18)
    message = refusal(quantize, llama_model, tmp_path / "out")
    assert message.startswith(f"{tmp_path / 'out.quantizing'}: activations need 4000000000.00 GB, and the disk has ")
    assert message.endswith(" GB free; take fewer or shorter samples")
    assert list(tmp_path.iterdir()) == []


def test_infinite_activations_are_named(llama_model, quantize, tmp_path):
    def inflate(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"].mul_(1e30)
        tensors["model.layers.0.mlp.gate_proj.weight"].mul_(1e30)

    model = copy_of(llama_model, tmp_path / "model", inflate)
    message = refusal(quantize, model, tmp_path / "out", "gptq", recipe=str(recipe_of(tmp_path)))
    assert "its inputs are NaN or infinite on the calibration text" in message
    assert message.startswith("model.layers.0.mlp.down_proj.weight: ")


def recipe_of(folder: Path) -> Path:
    """Leaves alone what cannot be packed."""
    path = folder / "recipe.yaml"
    path.write_text("rules:\n  - ['*gate_proj.weight', null]\n  - ['*up_proj.weight', null]\nbase: q4_1\n")
    return path


NONE = "method rtn uses none; choose --method search or gptq"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "rtn"}, "--calibration: " + NONE),
        ({"method": "rtn", "request": None, "resume": True}, "--resume: " + NONE),
        ({"dtype": "float8"}, "--calibration-dtype float8: choose one of: float32, bfloat16"),
        ({"activations": "int4"}, "--calibration-activations int4: choose one of: int8, float"),
        (
            {"statistics": Path("x"), "request": CalibrationRequest()},
            "--statistics replaces --calibration and --statistics-out; give one or the other",
        ),
        ({"statistics": Path("none.safetensors")}, "none.safetensors: cannot be opened: No such file or directory"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(llama_model, options, message, quantize, tmp_path):
    assert refusal(quantize, llama_model, tmp_path / "out", **options) == message
    assert list(tmp_path.iterdir()) == []


def test_what_the_writer_refuses_is_refused_before_the_work(llama_model, quantize, monkeypatch, tmp_path):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(blockwise.BlockwiseQuantizer, "run", None)
    message = refusal(quantize, llama_model, tmp_path / "out")
    assert message == f"{tmp_path / 'out'}: exists already; choose another name or pass --overwrite"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_bfloat16_is_computed_in_on_request(llama_model, quantize, tmp_path):
    """With Q8_0, so that layers see nearly the same predecessors in both runs."""
    for name, dtype in (("full", "float32"), ("half", "bfloat16")):
        path = tmp_path / f"{name}.safetensors"
        quantize(llama_model, tmp_path / name, "search", format="q8_0", dtype=dtype, statistics_out=path)
    full, half = saved_statistics(tmp_path / "full.safetensors"), saved_statistics(tmp_path / "half.safetensors")
    for name in full:
        assert not torch.equal(full[name], half[name])
        squares = full[name].diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(full[name], half[name], rtol=0.1, atol=0.05 * float(squares.mean()))
