"""A float checkpoint becomes a ternary one: one scale a tensor, gguf's bytes, the same model in a GGUF file."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from model_folders import copy_of, logits, tensors_of
from safetensors.torch import load_file, save_file

from quantlab import InputError, load_model, open_checkpoint, quantize_checkpoint
from quantlab.adapters.fusing import Fusion
from quantlab.calibration.verify import verify_checkpoint
from quantlab.checkpoint import read_ahead
from quantlab.checkpoint.export import export_checkpoint
from quantlab.checkpoint.gguf_file import GgufFile
from quantlab.checkpoint.summary import summarize
from quantlab.evaluation.tensor_errors import tensor_errors
from quantlab.formats import FORMATS
from quantlab.quantization.methods import quantize_weight

TERNARY = gguf.GGMLQuantizationType.TQ2_0
SIZES = {"hidden_size": 256, "intermediate_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2}
DOWN = "model.layers.{}.mlp.down_proj.weight"  # its rows are no multiple of 256
QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def source(make_model, tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("wide"), "llama", num_hidden_layers=2, **SIZES)


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("ternary") / "model"
    quantize_checkpoint(source, out, format="ternary")
    return out


def ternary_by_hand(weights: np.ndarray) -> np.ndarray:
    """RoundClip(W / (gamma + eps), -1, 1) * gamma, gamma the mean magnitude in fp16."""
    gamma = np.float32(np.float16(np.abs(weights.astype(np.float64)).mean()))
    return np.clip(np.rint(weights / (gamma + np.float32(1e-5))), -1, 1) * gamma + np.float32(0)


def spread(folder: Path) -> dict[str, bytes]:
    return {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in tensors_of(folder).items()}


def test_linear_weights_become_what_gguf_writes_for_the_rounded_ones(source, packed):
    written, originals = tensors_of(packed), tensors_of(source)
    formats = {name: open_checkpoint(packed).stored_type(name) for name in originals}
    assert formats.pop("model.embed_tokens.weight") == "q8_0"
    floats = {DOWN.format(layer) for layer in (0, 1)} | {name for name in formats if "norm" in name}
    assert {formats.pop(name) for name in floats} == {"f32"}
    assert (len(formats), set(formats.values())) == (12, {"tq2_0"})
    for name in formats:
        rounded = ternary_by_hand(originals[name].numpy())
        assert np.unique(rounded).size == 3
        np.testing.assert_array_equal(written[name].numpy(), gguf.quants.quantize(rounded, TERNARY))
        np.testing.assert_array_equal(open_checkpoint(packed).read(name).numpy(), rounded)


def test_the_model_is_the_dequantized_model_to_the_last_bit(packed, float_twin):
    assert torch.equal(logits(load_model(packed)), logits(float_twin(packed)))


def test_the_report_tells_errors_and_what_stayed(source, tmp_path):
    report = quantize_checkpoint(source, tmp_path / "out", format="ternary")
    dry = quantize_checkpoint(source, tmp_path / "dry", format="ternary", dry_run=True)
    assert (dry.bytes, dry.bits_per_weight) == (report.bytes, report.bits_per_weight)
    by_name = {tensor.name: tensor for tensor in report.tensors}
    assert by_name[DOWN.format(0)].note == "rows of 320 are no multiple of 256"
    assert [tensor.name for tensor in report.tensors if tensor.note] == [DOWN.format(0), DOWN.format(1)]
    measured = {error.name: error.relative_error for error in tensor_errors(source, tmp_path / "out")}
    for tensor in report.tensors:
        if tensor.format == "tq2_0":
            assert 0.4 < tensor.relative_error < 0.6  # Gaussian weights: the square root of 0.26
            assert tensor.relative_error == pytest.approx(measured[tensor.name], rel=1e-6)
    inspected = summarize(tmp_path / "out")
    assert (inspected.bytes, inspected.bits_per_weight) == (report.bytes, report.bits_per_weight)
    assert next(t for t in inspected.tensors if t.name == QUERY).bytes == 256 * 66


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_sources_of_every_float_type_are_read_in_parts(source, dtype, tmp_path, monkeypatch):
    """Twice: first for the scale, then for the codes; however many rows are read at a time."""
    shutil.copytree(source, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    quantize_checkpoint(tmp_path / "model", tmp_path / "whole", format="ternary")
    monkeypatch.setattr(read_ahead, "PART_BYTES", 5000)
    quantize_checkpoint(tmp_path / "model", tmp_path / "parts", format="ternary")
    assert spread(tmp_path / "parts") == spread(tmp_path / "whole")
    original = load_file(file)[QUERY].to(torch.float32).numpy()
    expected = gguf.quants.quantize(ternary_by_hand(original), TERNARY)
    np.testing.assert_array_equal(tensors_of(tmp_path / "whole")[QUERY].numpy(), expected)


def test_gguf_and_back_is_the_same_model(source, packed, tmp_path):
    """llama.cpp's rotary row order is another: the packed rows of queries and keys change places and come back."""
    file, back = tmp_path / "model.gguf", tmp_path / "back"
    for start, destination, kind in ((packed, file, "gguf"), (file, back, "hf")):
        report = export_checkpoint(start, destination, kind)
        assert (report.lossless, report.tensors_changed) == (True, 0)
    assert spread(back) == spread(packed)
    reader = gguf.GGUFReader(file)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    query = stored["blk.0.attn_q.weight"]
    assert (query.tensor_type, stored["token_embd.weight"].tensor_type.name) == (TERNARY, "Q8_0")
    theirs = gguf.quants.dequantize(np.array(query.data), TERNARY)
    ours = open_checkpoint(packed).read(QUERY).numpy()
    np.testing.assert_array_equal(theirs.reshape(4, 32, 2, 256).swapaxes(1, 2).reshape(256, 256), ours)
    assert torch.equal(logits(load_model(file)), logits(load_model(packed)))
    quantize_checkpoint(source, tmp_path / "direct.gguf", format="ternary")
    direct, exported = GgufFile(tmp_path / "direct.gguf"), GgufFile(file)
    assert all((direct.read(name) == exported.read(name)).all() for name in exported.entries)


def test_a_gguf_source_gives_its_folders_bytes(source, packed, tmp_path):
    export_checkpoint(source, tmp_path / "float.gguf", "gguf")
    quantize_checkpoint(tmp_path / "float.gguf", tmp_path / "out", format="ternary")
    assert spread(tmp_path / "out") == spread(packed)


def test_verify_derives_every_block_again(source, packed, tmp_path):
    assert verify_checkpoint(packed, source).ok
    export_checkpoint(packed, tmp_path / "model.gguf", "gguf")
    assert verify_checkpoint(tmp_path / "model.gguf", source).ok
    for what, place, problems in (
        ("codes", 66 * 7 + 3, ["is not what rounding the source to nearest gives"]),
        ("scale", 66 * 7 + 65, ["its scale is NaN or infinite", "is not what rounding the source to nearest gives"]),
    ):

        def damage(tensors: dict[str, torch.Tensor], place: int = place) -> None:
            tensors[QUERY].view(-1)[place] = 0x7C if place % 66 == 65 else 0xAA

        broken = copy_of(packed, tmp_path / what, damage)
        faults = [fault for fault in verify_checkpoint(broken, source).faults if fault.block is not None]
        assert [(fault.tensor, fault.block, fault.problem) for fault in faults] == [(QUERY, 7, p) for p in problems]


def test_uniform_makes_the_embedding_ternary_too(source, float_twin, tmp_path):
    report = quantize_checkpoint(source, tmp_path / "out", format="ternary", uniform=True)
    assert {tensor.name: tensor.format for tensor in report.tensors}["model.embed_tokens.weight"] == "tq2_0"
    assert torch.equal(logits(load_model(tmp_path / "out")), logits(float_twin(tmp_path / "out")))


# What cannot be had.


def refusal(source: Path, out: Path, **options) -> str:
    with pytest.raises(InputError) as error:
        quantize_checkpoint(source, out, format="ternary", **options)
    assert not out.exists()
    return str(error.value)


@pytest.mark.parametrize("method", ["search", "gptq", "learned"])
def test_methods_that_choose_scales_are_refused(source, method, tmp_path):
    assert refusal(source, tmp_path / "out", method=method) == (
        f"--method {method} needs blocks with scales of their own, and tq2_0 has one a tensor; "
        "use --method rtn, or train it (quantlab qat)"
    )


def test_a_model_without_a_wide_enough_row_is_refused(llama_model, tmp_path):
    """Its output would be the original under another name; one layer that fits is enough."""
    said = refusal(llama_model, tmp_path / "out")
    assert "no layer can be packed: model.layers.0." in said
    assert "and 13 more have no rows of a multiple of 256 (tq2_0); choose another format" in said


def test_fewer_levels_are_refused(source, tmp_path):
    message = refusal(source, tmp_path / "out", levels=2)
    assert message == "tq2_0 cannot use 2 levels: it has 3; leave out the levels"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_are_named(source, value, tmp_path):
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[QUERY][200, 3] = value

    broken = copy_of(source, tmp_path / "broken", damage)
    expected = f"{broken}: {QUERY}: row 200, column 3 is {value}; the checkpoint is damaged"
    assert refusal(broken, tmp_path / "out") == expected


def test_a_scale_beyond_fp16_is_named(source, tmp_path):
    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        tensors[QUERY] *= 1e7

    broken = copy_of(source, tmp_path / "broken", enlarge)
    assert refusal(broken, tmp_path / "out") == (
        f"{broken}: {QUERY}: the tq2_0 scale, the mean magnitude of its weights, overflows fp16; "
        "leave this tensor unquantized"
    )


def test_a_zero_matrix_stays_zero(source, tmp_path):
    def clear(tensors: dict[str, torch.Tensor]) -> None:
        tensors[QUERY].zero_()

    zeros = copy_of(source, tmp_path / "zeros", clear)
    report = quantize_checkpoint(zeros, tmp_path / "out", format="ternary")
    assert {tensor.name: tensor.relative_error for tensor in report.tensors}[QUERY] == 0
    assert not open_checkpoint(tmp_path / "out").read(QUERY).any()
    assert verify_checkpoint(tmp_path / "out", zeros).ok


def test_one_tensors_quantizers_refuse_it_but_for_rounding():
    weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    rounded = quantize_weight(weight, "ternary", "rtn", None)
    assert torch.equal(rounded.packed.blocks, FORMATS["tq2_0"].quantize(weight).blocks)
    for method in ("search", "gptq"):
        with pytest.raises(InputError, match=f"^w: method {method} needs blocks with scales of their own.*; use rtn$"):
            quantize_weight(weight, "ternary", method, None, name="w")


def test_no_update_enters_ternary_blocks():
    merge_aware = (
        "^w: --merge-aware needs blocks with scales of their own, and tq2_0 has one a tensor; train a plain LoRA"
    )
    with pytest.raises(InputError, match=merge_aware):
        Fusion("merge-aware").check_format(FORMATS["tq2_0"], "w")
    with pytest.raises(InputError, match=r"no minimum .* block-sum update; quantize the base to q4_1 or q5_1$"):
        Fusion("block-sum").check_format(FORMATS["tq2_0"], "w")
