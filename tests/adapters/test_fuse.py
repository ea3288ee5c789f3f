"""Fusing into float and packed files: exact bytes, errors, several adapters, and the way back."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize
from test_peft_folder import tuned_by_peft

from quantlab.adapters.adapter import Adapter, LowRankPair, Training
from quantlab.adapters.fusing import Fusion, block_factors, fused_blocks
from quantlab.adapters.peft_folder import write_peft_folder
from quantlab.calibration.fuse import fuse_adapter, undo_fuse
from quantlab.calibration.quantize import quantize_checkpoint
from quantlab.checkpoint import open_checkpoint
from quantlab.checkpoint.checksums import model_digest
from quantlab.errors import InputError
from quantlab.formats import FORMATS

OWN_SCALES = [name for name, row in FORMATS.items() if row.scale_of == "block"]

RANK = 3
SCALE = 1.5


def made(model: Path, method: str, folder: Path, seed: int = 0, size: float = 0.05, **training: object) -> Path:
    """An adapter for the attention projections of `model`, written as training writes it."""
    checkpoint, generator = open_checkpoint(model), np.random.default_rng(seed)
    pairs = {}
    for name in checkpoint.names:
        if "attn" in name and name.endswith(("proj.weight", "c_attn.weight")):
            out, columns = checkpoint.shape(name)
            a = generator.normal(0, 1, (RANK, columns)).astype(np.float32)
            if method == "block-sum":
                a = np.repeat(a[:, ::32], 32, axis=1)
            b = generator.normal(0, size, (out, RANK)).astype(np.float32)
            pairs[name] = LowRankPair(a, b, SCALE)
    note = Training(**{"base": model_digest(checkpoint), "device": "cpu", **training})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK * SCALE, "target_modules": ["q_proj"]}
    write_peft_folder(Adapter(folder, method, pairs, note), config, folder)
    return folder


def packed(base: Path, out: Path, format: str = "q4_1") -> Path:
    quantize_checkpoint(base, out, format=format)
    return out


def decoded(checkpoint, name: str) -> np.ndarray:
    """By gguf, not by us."""
    kind = Type[checkpoint.format(name).name.upper()]
    return dequantize(checkpoint.read_bytes(name).reshape(checkpoint.entry(name).shape), kind)


def all_bytes(path: Path) -> dict[str, bytes]:
    checkpoint = open_checkpoint(path)
    return {name: checkpoint.read_bytes(name).tobytes() for name in checkpoint.names}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_into_float_weights_as_peft_merges_them(family: str, make_model, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", family)
    targets = ["q_proj", "down_proj"] if family == "llama" else ["attn.c_attn", "mlp.c_proj"]
    live = tuned_by_peft(base, tmp_path / "a", r=4, target_modules=targets, fan_in_fan_out=family == "gpt2")
    report = fuse_adapter(base, tmp_path / "a", tmp_path / "out")
    assert report.exact
    assert {t.how for t in report.tensors} == {"float"}
    merged, fused, before = live.merge_and_unload().state_dict(), open_checkpoint(tmp_path / "out"), all_bytes(base)
    changed = {t.name for t in report.tensors}
    assert len(changed) == 4
    for name in fused.names:
        if name not in changed:
            assert fused.read_bytes(name).tobytes() == before[name]
            continue
        theirs = merged[name].T if fused.family.is_transposed(name) else merged[name]
        torch.testing.assert_close(fused.read(name), theirs, rtol=1e-5, atol=1e-6)


def test_dora_into_float_weights_as_peft_merges_it(llama_model: Path, tmp_path: Path) -> None:
    live = tuned_by_peft(llama_model, tmp_path / "a", r=4, use_dora=True, target_modules=["q_proj"])
    fuse_adapter(llama_model, tmp_path / "a", tmp_path / "out")
    merged, fused = live.merge_and_unload().state_dict(), open_checkpoint(tmp_path / "out")
    for layer in (0, 1):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        torch.testing.assert_close(fused.read(name), merged[name], rtol=1e-5, atol=1e-6)


def test_several_adapters_add_up_with_their_weights(llama_model: Path, tmp_path: Path) -> None:
    one = tuned_by_peft(llama_model, tmp_path / "one", r=4, target_modules=["q_proj"])
    del one
    tuned_by_peft(llama_model, tmp_path / "two", r=2, lora_alpha=3, target_modules=["q_proj", "k_proj"])
    fuse_adapter(llama_model, [(tmp_path / "one", 0.5), (tmp_path / "two", -2.0)], tmp_path / "out")
    from quantlab.adapters.reading import read_adapter

    base, fused = open_checkpoint(llama_model), open_checkpoint(tmp_path / "out")
    first, second = read_adapter(tmp_path / "one").pairs, read_adapter(tmp_path / "two").pairs
    for name in second:
        wanted = base.read(name).numpy() - 2 * second[name].scale * second[name].b @ second[name].a
        if name in first:
            wanted += 0.5 * first[name].scale * first[name].b @ first[name].a
        np.testing.assert_allclose(fused.read(name).numpy(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("suffix", ["", ".gguf"])
@pytest.mark.parametrize("format", ["q4_1", "q5_1"])
def test_block_sums_change_minima_alone_and_come_back(format: str, suffix: str, llama_model: Path, tmp_path) -> None:
    base = packed(llama_model, tmp_path / f"base{suffix}", format)
    adapter = made(base, "block-sum", tmp_path / "a")
    report = fuse_adapter(base, adapter, tmp_path / f"out{suffix}")
    assert report.exact
    assert {t.how for t in report.tensors} == {"minimums"}
    before, after = open_checkpoint(base), open_checkpoint(tmp_path / f"out{suffix}")
    from quantlab.adapters.reading import read_adapter

    block_bytes = FORMATS[format].block_bytes
    for name, pair in read_adapter(adapter).pairs.items():
        old = before.read_bytes(name).reshape(pair.shape[0], -1, block_bytes)
        new = after.read_bytes(name).reshape(pair.shape[0], -1, block_bytes)
        assert np.array_equal(old[..., :2], new[..., :2])
        assert np.array_equal(old[..., 4:], new[..., 4:])
        update = SCALE * pair.b.astype(np.float64) @ pair.a[:, ::32]
        minima = old[..., 2:4].copy().view(np.float16)[..., 0]
        np.testing.assert_allclose(new[..., 2:4].copy().view(np.float16)[..., 0], minima + update, rtol=1e-3, atol=1e-3)
    names = undo_fuse(tmp_path / f"out{suffix}", adapter, tmp_path / f"back{suffix}")
    assert set(names) == {t.name for t in report.tensors}
    assert all_bytes(tmp_path / f"back{suffix}") == all_bytes(base)


@pytest.mark.parametrize("format", OWN_SCALES)
def test_merge_aware_codes_move_and_scales_stay(format: str, llama_model: Path, tmp_path: Path) -> None:
    base = packed(llama_model, tmp_path / "base", format)
    adapter = made(base, "merge-aware", tmp_path / "a", size=0.01)
    report = fuse_adapter(base, adapter, tmp_path / "out")
    assert report.exact
    before, after = open_checkpoint(base), open_checkpoint(tmp_path / "out")
    from quantlab.adapters.reading import read_adapter

    row = FORMATS[format]
    for name, pair in read_adapter(adapter).pairs.items():
        old = before.read_bytes(name).reshape(pair.shape[0], -1, row.block_bytes)
        new = after.read_bytes(name).reshape(pair.shape[0], -1, row.block_bytes)
        assert np.array_equal(old[..., row.scale_bytes], new[..., row.scale_bytes])
        assert not np.array_equal(old, new)
        wanted = decoded(before, name) + SCALE * pair.b @ pair.a
        scales = old[..., :2].copy().view(np.float16)[..., 0].astype(np.float64)
        error = np.abs(decoded(after, name) - wanted).reshape(pair.shape[0], -1, 32)
        inside = error <= np.abs(scales)[..., None] * 0.5001
        assert inside.mean() > 0.95  # the others were clamped to the ends of the codes
    tensor = report.tensors[0]
    wanted = (
        decoded(before, tensor.name)
        + SCALE * (pairs := read_adapter(adapter).pairs)[tensor.name].b @ pairs[tensor.name].a
    )
    error = np.linalg.norm(decoded(after, tensor.name) - wanted)
    assert tensor.relative_error == pytest.approx(error / np.linalg.norm(wanted), rel=1e-4)
    update = np.linalg.norm(wanted - decoded(before, tensor.name))
    assert tensor.update_error == pytest.approx(error / update, rel=1e-4)


@pytest.mark.parametrize(("method", "regrid"), [("block-sum", False), ("merge-aware", False)])
def test_a_zero_update_leaves_every_byte(method: str, regrid: bool, llama_model: Path, tmp_path: Path) -> None:
    base = packed(llama_model, tmp_path / "base")
    fuse_adapter(base, made(base, method, tmp_path / "a", size=0.0, regrid=regrid), tmp_path / "out")
    assert all_bytes(tmp_path / "out") == all_bytes(base)


def test_regrid_is_rounding_to_nearest_of_the_sum(llama_model: Path, tmp_path: Path) -> None:
    base = packed(llama_model, tmp_path / "base")
    adapter = made(base, "merge-aware", tmp_path / "a", regrid=True)
    fuse_adapter(base, adapter, tmp_path / "out")
    from gguf.quants import quantize

    from quantlab.adapters.reading import read_adapter

    before, after = open_checkpoint(base), open_checkpoint(tmp_path / "out")
    for name, pair in read_adapter(adapter).pairs.items():
        total = np.zeros(pair.shape, np.float32)
        for k in range(RANK):
            total = total + pair.b[:, k : k + 1] * pair.a[k]
        expected = quantize(decoded(before, name) + total * np.float32(SCALE), Type.Q4_1)
        assert np.array_equal(after.read_bytes(name), expected.reshape(-1))


@pytest.mark.parametrize(("method", "regrid"), [("block-sum", False), ("merge-aware", False), ("merge-aware", True)])
def test_bytes_do_not_depend_on_threads(method: str, regrid: bool) -> None:
    generator = np.random.default_rng(5)
    format = FORMATS["q4_1"]
    blocks = format.quantize(torch.from_numpy(generator.normal(size=(300, 256)).astype(np.float32))).blocks.numpy()
    a, b = generator.normal(size=(4, 256)).astype(np.float32), generator.normal(size=(300, 4)).astype(np.float32)
    a = block_factors(a) if method == "block-sum" else a
    one, many = (
        fused_blocks(format, blocks, a, b, 0.03, Fusion(method, regrid), threads=threads) for threads in (1, 3)
    )
    assert np.array_equal(one, many)


def test_a_plain_lora_is_quantized_again_and_the_report_tells(llama_model: Path, prose, tmp_path) -> None:
    from quantlab.calibration.calibrated import CalibrationOptions
    from quantlab.calibration.samples import request_of

    base = packed(llama_model, tmp_path / "base")
    adapter = made(base, "lora", tmp_path / "a")
    options = {"rtn": None, "search": CalibrationOptions(request=request_of(prose, 4, 32, 0))}
    reports = {m: fuse_adapter(base, adapter, tmp_path / m, method=m, calibration=o) for m, o in options.items()}
    before = all_bytes(base)
    for method, report in reports.items():
        assert not report.exact
        assert "--merge-aware" in report.notes[0]
        assert {t.how for t in report.tensors} == {method}
        assert all(0 < t.relative_error < 0.3 for t in report.tensors)
        after = all_bytes(tmp_path / method)
        assert {name for name in before if before[name] != after[name]} == {t.name for t in report.tensors}
    assert not list(tmp_path.glob(".*fusing"))


def test_exactness_is_not_claimed_for_another_base_weight_or_device(llama_model: Path, tmp_path: Path) -> None:
    base = packed(llama_model, tmp_path / "base")
    other = made(base, "merge-aware", tmp_path / "other", base="0123")
    gpu = made(base, "merge-aware", tmp_path / "gpu", device="cuda")
    good = made(base, "merge-aware", tmp_path / "good")
    for number, (adapters, reason) in enumerate(
        [(other, "another base"), (gpu, "trained on cuda"), ([(good, 0.5)], "weight"), ([good, gpu], "several")]
    ):
        report = fuse_adapter(base, adapters, tmp_path / f"out{number}")
        assert not report.exact
        assert reason in report.notes[0]


def test_blocks_without_a_minimum_are_refused_with_the_way_out(llama_model: Path, tmp_path: Path) -> None:
    base = packed(llama_model, tmp_path / "base", "q8_0")
    with pytest.raises(InputError, match="q4_1 or q5_1"):
        fuse_adapter(base, made(base, "block-sum", tmp_path / "a"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_to_undo_is_said(llama_model: Path, tmp_path: Path) -> None:
    base = packed(llama_model, tmp_path / "base")
    adapter = made(base, "block-sum", tmp_path / "a")
    with pytest.raises(InputError, match="keeps nothing"):
        undo_fuse(base, adapter, tmp_path / "out")


def test_a_minimum_beyond_fp16_is_refused(llama_model: Path, tmp_path: Path) -> None:
    base = packed(llama_model, tmp_path / "base")
    with pytest.raises(InputError, match="half precision"):
        fuse_adapter(base, made(base, "block-sum", tmp_path / "a", size=1e6), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ternary_bases_are_rounded_again_as_a_whole(make_model, tmp_path: Path) -> None:
    """One scale a tensor: no update goes into single blocks, and no method chooses their scales."""
    sizes = {"hidden_size": 256, "num_hidden_layers": 1}
    base = packed(make_model(tmp_path / "model", "llama", **sizes), tmp_path / "base", "ternary")
    plain = made(base, "lora", tmp_path / "plain", size=0.2)
    with pytest.raises(InputError, match=r"^--method search needs blocks with scales of their own, and tq2_0 has one"):
        fuse_adapter(base, plain, tmp_path / "out")
    with pytest.raises(InputError, match="--merge-aware needs blocks with scales of their own, and tq2_0 has one"):
        fuse_adapter(base, made(base, "merge-aware", tmp_path / "aware"), tmp_path / "out")
    with pytest.raises(InputError, match="tq2_0 blocks have no minimum that could take up a block-sum update"):
        fuse_adapter(base, made(base, "block-sum", tmp_path / "sums"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = fuse_adapter(base, plain, tmp_path / "out", method="rtn")
    assert (report.exact, {t.how for t in report.tensors}) == (False, {"rtn"})
    assert "--merge-aware" not in report.notes[0]
    from quantlab.adapters.reading import read_adapter

    before, after = open_checkpoint(base), open_checkpoint(tmp_path / "out")
    for name, pair in read_adapter(plain).pairs.items():
        wanted = decoded(before, name) + SCALE * pair.b @ pair.a
        gamma = np.float16(np.abs(wanted.astype(np.float64)).mean())
        assert np.unique(np.abs(decoded(after, name))).tolist() == [0, gamma]
