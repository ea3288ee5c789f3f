"""Whole merges: numbers worked by hand, every kind of input and output, and bytes that depend on nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from streamed_models import WIDTH, config_of, files_of, same, save_model, shapes, stored, weights, write_model

from quantlab import merge_checkpoints, open_checkpoint, quantize_checkpoint
from quantlab.adapters.adapter import Adapter, LowRankPair
from quantlab.adapters.fuse import write_fused
from quantlab.adapters.peft_config import peft_config
from quantlab.adapters.peft_folder import write_peft_folder
from quantlab.adapters.reading import read_adapter
from quantlab.checkpoint.export import export_checkpoint
from quantlab.errors import InputError
from quantlab.merging import memory
from quantlab.merging.methods.table import METHODS

NORM, QUERY, UP = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory):
    """A base and three models that were made of it, fp32."""
    root = tmp_path_factory.mktemp("family")
    base = write_model(root / "base", 0)
    return {"base": base, **{name: write_model(root / name, i, start=base) for i, name in enumerate("abc", 1)}}


def norm(*values: float) -> torch.Tensor:
    """A norm's weights that begin with some numbers."""
    return torch.tensor([*values, *[0.0] * (WIDTH - len(values))])


def test_linear_by_hand(tmp_path):
    """0.25 * 1 + 0.75 * 3 = 2.5: exact in bf16; without normalizing the weights are taken as they are."""
    one = write_model(tmp_path / "one", 0, dtype=torch.bfloat16, replaced={NORM: norm(1, -2, 8)})
    other = write_model(tmp_path / "other", 1, dtype=torch.bfloat16, replaced={NORM: norm(3, 2, 0)})
    text = config_of("linear", (one, {"weight": 1}), (other, {"weight": 3}))
    report = merge_checkpoints(text, tmp_path / "out")
    assert weights(tmp_path / "out")[NORM][:4].tolist() == [2.5, 1.0, 2.0, 0.0]
    assert open_checkpoint(tmp_path / "out").entry(NORM).dtype == "BF16"
    assert (report.method, report.tensors, report.requantization_error) == ("linear", len(shapes()), None)
    merge_checkpoints(
        config_of("linear", (one, {"weight": 1}), (other, {"weight": 3}), normalize=False), tmp_path / "sum"
    )
    assert weights(tmp_path / "sum")[NORM][:4].tolist() == [10.0, 4.0, 8.0, 0.0]


def test_ties_by_hand(tmp_path):
    """Of 64 elements a density of 2 / 64 keeps two of each; signs are elected by their sum; lambda is 0.5.

    Deltas 4 -3 . 1 and -1 -5 6 .5 become 4 -3 0 0 and 0 -5 6 0; all agree, and agreeing ones are averaged: 4 -4 6 0.
    """
    base = write_model(tmp_path / "base", 0, replaced={NORM: norm(1, 1, 1, 1)})
    one = write_model(tmp_path / "one", 1, replaced={NORM: norm(5, -2, 1, 2)})
    other = write_model(tmp_path / "other", 2, replaced={NORM: norm(0, -4, 7, 1.5)})
    text = config_of("ties", one, other, base=base, density=2 / WIDTH, weight=1, **{"lambda": 0.5})
    merge_checkpoints(text, tmp_path / "out")
    assert weights(tmp_path / "out")[NORM][:5].tolist() == [3.0, -1.0, 4.0, 1.0, 0.0]


def test_a_base_that_is_bf16_does_not_round_the_deltas(tmp_path):
    """1 + 2^-9 is no bf16 number; the sum of two such deltas is one with 1."""
    base = write_model(tmp_path / "base", 0, dtype=torch.bfloat16, replaced={NORM: norm(1)})
    tuned = [
        write_model(tmp_path / name, 0, replaced={**weights(base), NORM: norm(1 + 2.0**-9)}) for name in ("one", "two")
    ]
    text = config_of("task_arithmetic", *tuned, base=base, weight=1)
    merge_checkpoints(json.dumps({**json.loads(text), "dtype": "float32"}), tmp_path / "out")
    assert weights(tmp_path / "out")[NORM][0] == 1 + 2.0**-8


CASES = {
    "linear": {"weight": 0.7},
    "task_arithmetic": {"weight": 0.7},
    "ties": {"density": 0.3, "weight": 1},
    "dare_linear": {"density": 0.3, "weight": 1},
    "dare_ties": {"density": 0.3, "weight": 1},
    "della": {"density": 0.3, "weight": 1, "epsilon": 0.1},
    "breadcrumbs": {"density": 0.3, "gamma": 0.1, "weight": 1},
    "karcher": {},
    "model_stock": {},
    "nuslerp": {"weight": 1},
    "slerp": {"t": 0.3},
}


@pytest.mark.parametrize("method", CASES)
def test_bytes_depend_neither_on_parts_nor_on_threads(method, family, tmp_path, monkeypatch):
    row = METHODS[method]
    models = [family[name] for name in "abc"][: row.models[1]]
    text = config_of(method, *models, base=family["base"] if row.base != "unused" else None, **CASES[method])
    merge_checkpoints(text, tmp_path / "whole", threads=1)
    monkeypatch.setattr(memory, "PART_ELEMENTS", 23 * WIDTH)
    merge_checkpoints(text, tmp_path / "parts", threads=2)
    assert files_of(tmp_path / "whole")["model.safetensors"] == files_of(tmp_path / "parts")["model.safetensors"]
    assert not same(weights(tmp_path / "whole"), weights(models[0]))


def test_the_trim_over_the_whole_model_is_one_threshold(family, tmp_path, monkeypatch):
    """The paper's: the 20 % largest of all deltas together; a tensor with small deltas keeps none."""
    base = weights(family["base"])
    tuned = {name: value + (0.001 if name == UP else 0.1) * torch.randn(value.shape) for name, value in base.items()}
    model = save_model(tmp_path / "tuned", tuned, open_checkpoint(family["base"]).config)
    text = config_of("ties", model, base=family["base"], density=0.2, weight=1, trim="model")
    merge_checkpoints(text, tmp_path / "out", threads=2)
    out = weights(tmp_path / "out")
    deltas = {name: tuned[name] - base[name] for name in base}
    every = torch.cat([delta.flatten().abs() for delta in deltas.values()]).sort(descending=True).values
    threshold = every[int(0.2 * len(every)) - 1]
    for name, delta in deltas.items():
        kept = torch.where(delta.abs() >= threshold, delta, 0.0)
        torch.testing.assert_close(out[name], base[name] + kept, rtol=0, atol=1e-6)
    assert torch.equal(out[UP], base[UP])
    monkeypatch.setattr(memory, "PART_ELEMENTS", 23 * WIDTH)
    merge_checkpoints(text, tmp_path / "parts", threads=1)
    assert stored(tmp_path / "out") == stored(tmp_path / "parts")


def test_a_trim_over_the_whole_model_has_one_density(family, tmp_path):
    text = config_of("ties", family["a"], base=family["base"], density=[0.2, 0.4], weight=1, trim="model")
    with pytest.raises(InputError, match="density differ"):
        merge_checkpoints(text, tmp_path / "out")


def test_draws_follow_the_seed(family, tmp_path):
    text = config_of("dare_linear", family["a"], base=family["base"], density=0.5, weight=1)
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        merge_checkpoints(text, tmp_path / name, seed=seed)
    assert stored(tmp_path / "one") == stored(tmp_path / "again")
    assert stored(tmp_path / "one") != stored(tmp_path / "other")


@pytest.mark.parametrize("method", ["iso_c", "tsv_m", "wudi"])
def test_methods_on_whole_tensors(method, family, tmp_path):
    """A single model's difference comes back, whatever is done to several: WUDI exactly."""
    more = {"iterations": 5} if method == "wudi" else {}
    text = config_of(method, family["a"], family["b"], base=family["base"], **more)
    merge_checkpoints(text, tmp_path / "one", threads=1)
    merge_checkpoints(text, tmp_path / "two", threads=2)
    assert stored(tmp_path / "one") == stored(tmp_path / "two")
    assert not same(weights(tmp_path / "one"), weights(family["base"]))


def test_packed_inputs_are_what_they_stand_for(family, tmp_path):
    """Folders and GGUF files of the same blocks, merged as the floats that the blocks mean."""
    inputs = {}
    for name in "ab":
        quantize_checkpoint(family[name], tmp_path / name, format="q4_1")
        export_checkpoint(tmp_path / name, tmp_path / f"{name}.gguf", "gguf")
        inputs[name] = save_model(tmp_path / f"{name}-float", weights(tmp_path / name), _config(family[name]))
    for kind in ("", ".gguf", "-float"):
        models = [(tmp_path / f"{name}{kind}", {"weight": weight}) for name, weight in (("a", 1), ("b", 3))]
        text = json.dumps({**json.loads(config_of("linear", *models)), "out_dtype": "float32"})
        merge_checkpoints(text, tmp_path / f"out{kind}")
    expected = weights(tmp_path / "out-float")
    assert same(weights(tmp_path / "out"), expected)
    assert same(weights(tmp_path / "out.gguf"), expected)


def _config(model):
    return {key: value for key, value in open_checkpoint(model).config.items() if key != "quantization_config"}


def test_a_gguf_output_holds_the_folders_weights(family, tmp_path):
    text = config_of("linear", family["a"], family["b"], weight=1)
    merge_checkpoints(text, tmp_path / "folder")
    merge_checkpoints(text, tmp_path / "file.gguf")
    assert same(weights(tmp_path / "file.gguf"), weights(tmp_path / "folder"))
    assert open_checkpoint(tmp_path / "file.gguf").sidecar("merge") == {"config": text}


@pytest.mark.parametrize("name", ["packed", "packed.gguf"])
def test_a_packed_output_is_the_float_merge_quantized(name, family, tmp_path):
    text = config_of("linear", family["a"], family["b"], weight=1)
    report = merge_checkpoints(text, tmp_path / name, format="q4_1")
    merge_checkpoints(text, tmp_path / "float")
    quantize_checkpoint(tmp_path / "float", tmp_path / "expected", format="q4_1")
    assert stored(tmp_path / name) == stored(tmp_path / "expected")
    wanted, written = weights(tmp_path / "float"), weights(tmp_path / name)
    packed = [outcome.name for outcome in report.details if outcome.requantization_error is not None]
    assert packed == [tensor for tensor in wanted if "norm" not in tensor]
    changed = sum(float((written[tensor] - wanted[tensor]).square().sum(dtype=torch.float64)) for tensor in packed)
    total = sum(float(wanted[tensor].square().sum(dtype=torch.float64)) for tensor in packed)
    assert report.requantization_error == pytest.approx((changed / total) ** 0.5, rel=1e-6)
    assert not [file for file in tmp_path.iterdir() if "merging" in file.name]


@pytest.mark.parametrize("name", ["out", "out.gguf"])
def test_weights_that_lie_otherwise_in_files(name, float_model, tmp_path, monkeypatch):
    """GPT-2's are transposed in folders, Llama's queries and keys permuted in GGUF: they are read and written whole."""
    monkeypatch.setattr(memory, "PART_ELEMENTS", 1000)
    stored_there = load_file(float_model / "model.safetensors")
    shutil.copytree(float_model, tmp_path / "other")
    save_file({key: 3 * value for key, value in stored_there.items()}, tmp_path / "other" / "model.safetensors")
    if name.endswith(".gguf"):
        export_checkpoint(tmp_path / "other", tmp_path / "other.gguf", "gguf")
    other = tmp_path / f"other{Path(name).suffix}"
    merge_checkpoints(config_of("linear", float_model, other, weight=1), tmp_path / name)
    found, expected = weights(tmp_path / name), weights(float_model)
    assert same(found, {key: 2 * value for key, value in expected.items()})
    assert open_checkpoint(tmp_path / name).tied == open_checkpoint(float_model).tied


def test_equal_tensors_are_copied(family, tmp_path):
    """Byte for byte: also where rounding would change them, and blocks where the formats agree."""
    base = open_checkpoint(family["base"])
    kept = {name: base.read(name) for name in base.names if name != QUERY}
    kept[NORM] = torch.full((WIDTH,), -0.0)
    models = [
        save_model(tmp_path / name, {**kept, QUERY: torch.full((WIDTH, WIDTH), value)}, base.config)
        for name, value in (("one", 1.0), ("two", 2.0))
    ]
    text = config_of("ties", models[1], base=models[0], density=0.1, weight=3)
    report = merge_checkpoints(text, tmp_path / "out")
    assert report.copied == len(kept)
    assert [outcome.name for outcome in report.details if outcome.how == "merged"] == [QUERY]
    found = stored(tmp_path / "out")
    assert all(found[name] == value for name, value in stored(models[0]).items() if name != QUERY)
    for model in models:
        quantize_checkpoint(model, model.with_suffix(".packed"), format="q4_0")
    text = config_of("linear", *[model.with_suffix(".packed") for model in models], weight=1)
    report = merge_checkpoints(text, tmp_path / "packed", format="q4_0")
    found, blocks = stored(tmp_path / "packed"), stored(models[0].with_suffix(".packed"))
    assert all(found[name] == blocks[name] for name in blocks if name != QUERY)
    errors = {outcome.name: outcome.requantization_error for outcome in report.details}
    assert {name for name, error in errors.items() if error} <= {QUERY}


def test_an_adapter_is_added_as_fusing_adds_it(family, tmp_path):
    generator = np.random.default_rng(0)
    pair = LowRankPair(*(generator.normal(size=size).astype(np.float32) for size in ((3, WIDTH), (WIDTH, 3))), 0.5)
    adapter = Adapter(tmp_path, "lora", {QUERY: pair})
    write_peft_folder(adapter, peft_config(adapter, str(family["a"])), tmp_path / "adapter")
    checkpoint = open_checkpoint(family["a"])
    write_fused(checkpoint, [(read_adapter(tmp_path / "adapter"), 1.0)], tmp_path / "fused")
    for name, model in (("out", f"{family['a']}+{tmp_path / 'adapter'}"), ("expected", tmp_path / "fused")):
        merge_checkpoints(config_of("linear", (model, {"weight": 1}), (family["b"], {"weight": 1})), tmp_path / name)
    assert stored(tmp_path / "out") == stored(tmp_path / "expected")


def test_adapters_alone_make_an_adapter(family, tmp_path):
    pairs = [LowRankPair(np.ones((1, WIDTH), np.float32), np.full((WIDTH, 1), v, np.float32), 1.0) for v in (1, 3)]
    for number, pair in enumerate(pairs):
        adapter = Adapter(tmp_path, "lora", {QUERY: pair})
        write_peft_folder(adapter, peft_config(adapter, str(family["a"])), tmp_path / str(number))
    text = config_of("linear", (tmp_path / "0", {"weight": 1}), (tmp_path / "1", {"weight": 3}))
    report = merge_checkpoints(text, tmp_path / "out")
    merged = read_adapter(tmp_path / "out").pairs[QUERY]
    assert np.array_equal(merged.scale * merged.b @ merged.a, np.full((WIDTH, WIDTH), 2.5))
    assert (report.tensors, report.notes) == (1, ("the sum is exact: its rank is 2",))
    with pytest.raises(InputError, match="is an adapter; name it with its base, as BASE"):
        merge_checkpoints(config_of("linear", family["a"], tmp_path / "0", weight=1), tmp_path / "other")


def test_the_config_and_a_card_lie_beside_the_weights(family, tmp_path):
    text = f"""# as it was written, comments too
merge_method: linear
models:
  - model: {family["a"]}
    parameters: {{weight: 1}}
  - model: {family["b"]}
    parameters: {{weight: 1}}
"""
    (tmp_path / "config.yml").write_text(text)
    merge_checkpoints(tmp_path / "config.yml", tmp_path / "out")
    assert (tmp_path / "out" / "merge_config.yml").read_text() == text
    card = (tmp_path / "out" / "README.md").read_text()
    front, body = card.split("---\n")[1:]
    assert yaml.safe_load(front) == {"library_name": "transformers", "tags": ["merge", "quantlab"]}
    assert text in body
    assert "`linear`" in body
    assert str(tmp_path) not in body.replace(text, "")


def test_a_conflict_report(family, tmp_path):
    text = config_of("task_arithmetic", family["a"], family["b"], base=family["base"], weight=1)
    report = merge_checkpoints(text, tmp_path / "out", report=tmp_path / "report", format="q8_0")
    assert (tmp_path / "report" / "conflicts.png").read_bytes().startswith(b"\x89PNG")
    rows = {row["name"]: row for row in json.loads((tmp_path / "report" / "conflicts.json").read_text())["tensors"]}
    a, b, base = (weights(family[name])[QUERY].double() for name in ("a", "b", "base"))
    one, two = a - base, b - base
    assert rows[QUERY]["cosine"][0][1] == pytest.approx(float((one * two).sum() / (one.norm() * two.norm())))
    assert rows[QUERY]["conflict"] == pytest.approx(float(((one * two) < 0).double().mean()))
    assert report.conflicts is not None
    assert {tensor.name for tensor in report.conflicts.tensors} == set(shapes())
    assert rows[QUERY]["requantization_error"] > 0


def test_a_dry_run_writes_nothing(family, tmp_path):
    text = config_of("linear", family["a"], family["b"], weight=1)
    report = merge_checkpoints(text, tmp_path / "out", dry_run=True, format="q4_1")
    assert report.bytes == merge_checkpoints(text, tmp_path / "packed", format="q4_1").bytes
    assert {outcome.how for outcome in report.details} == {"planned"}
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_what_is_not_finite_is_refused(family, tmp_path):
    broken = {**weights(family["a"]), QUERY: torch.full((WIDTH, WIDTH), float("nan"))}
    model = save_model(tmp_path / "broken", broken, open_checkpoint(family["a"]).config)
    with pytest.raises(InputError, match=f"{QUERY}: the merged weights hold NaN"):
        merge_checkpoints(config_of("linear", model, family["b"], weight=1), tmp_path / "out")
    big = {**weights(family["a"]), QUERY: torch.full((WIDTH, WIDTH), 3e4)}
    model = save_model(tmp_path / "big", big, open_checkpoint(family["a"]).config)
    text = json.loads(config_of("linear", model, normalize=False, weight=4))
    with pytest.raises(InputError, match=f"{QUERY}: merged weights are beyond F16; set out_dtype"):
        merge_checkpoints(json.dumps({**text, "out_dtype": "float16"}), tmp_path / "out")
    assert {file.name for file in tmp_path.iterdir()} == {"broken", "big"}  # no unfinished work: it would fail again
