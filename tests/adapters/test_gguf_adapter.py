"""GGUF adapters, read back by gguf: names, shapes, order of rows, scales."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from test_peft_folder import tuned_by_peft

from quantlab.adapters.gguf_adapter import export_adapter
from quantlab.adapters.reading import is_adapter, read_adapter
from quantlab.checkpoint import open_checkpoint
from quantlab.checkpoint.export import export_checkpoint
from quantlab.errors import InputError


def fields(path: Path) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    reader = gguf.GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return values, {t.name: t.data.reshape(tuple(map(int, t.shape))[::-1]) for t in reader.tensors}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_updates_are_those_of_the_base_in_gguf(family: str, make_model, tmp_path: Path) -> None:
    """W + BA with the adapter's rows in GGUF's order is the export of the model that the update was added to."""
    base = make_model(tmp_path / "base", family)
    targets = {"llama": ["q_proj", "k_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"],
               "gpt_neox": ["query_key_value"], "phi3": ["qkv_proj"]}[family]  # fmt: skip
    live = tuned_by_peft(base, tmp_path / "a", r=4, lora_alpha=6, target_modules=targets)
    adapter, checkpoint = read_adapter(tmp_path / "a"), open_checkpoint(base)
    report = export_adapter(adapter, checkpoint, tmp_path / "a.gguf")
    assert report.lossless
    values, factors = fields(tmp_path / "a.gguf")
    assert values["general.type"] == "adapter"
    assert values["adapter.type"] == "lora"
    assert values["adapter.lora.alpha"] == 6
    assert values["general.architecture"] == checkpoint.family.gguf.architecture
    merged = live.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        if (base / name).is_file():
            (tmp_path / "merged" / name).write_bytes((base / name).read_bytes())
    export_checkpoint(base, tmp_path / "base.gguf", "gguf")
    export_checkpoint(tmp_path / "merged", tmp_path / "merged.gguf", "gguf")
    _, before = fields(tmp_path / "base.gguf")
    _, after = fields(tmp_path / "merged.gguf")
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert {name.removesuffix(".lora_a") for name in factors if name.endswith("a")} == changed
    for name in changed:
        update = 6 / 4 * factors[f"{name}.lora_b"] @ factors[f"{name}.lora_a"]
        np.testing.assert_allclose(before[name] + update, after[name], rtol=1e-4, atol=1e-5)


def test_scales_that_differ_go_into_b(llama_model: Path, tmp_path: Path) -> None:
    options = {"r": 4, "target_modules": ["q_proj"], "alpha_pattern": {"layers.1.self_attn.q_proj": 5}}
    tuned_by_peft(llama_model, tmp_path / "a", **options)
    adapter = read_adapter(tmp_path / "a")
    report = export_adapter(adapter, open_checkpoint(llama_model), tmp_path / "a.gguf")
    assert [pair.scale for pair in adapter.pairs.values()] == [8 / 4, 5 / 4]
    assert (report.lossless, report.tensors_changed) == (False, 2)
    values, _ = fields(tmp_path / "a.gguf")
    assert values["adapter.lora.alpha"] == 0


def test_dora_and_foreign_bases_are_refused(llama_model: Path, make_model, tmp_path: Path) -> None:
    tuned_by_peft(llama_model, tmp_path / "dora", r=4, use_dora=True, target_modules=["q_proj"])
    with pytest.raises(InputError, match="DoRA"):
        export_adapter(read_adapter(tmp_path / "dora"), open_checkpoint(llama_model), tmp_path / "a.gguf")
    tuned_by_peft(llama_model, tmp_path / "a", r=4, target_modules=["q_proj"])
    with pytest.raises(InputError, match="is not in the model"):
        export_adapter(
            read_adapter(tmp_path / "a"), open_checkpoint(make_model(tmp_path / "g", "gpt2")), tmp_path / "b"
        )
    assert not list(tmp_path.glob("*.gguf"))


def test_folders_with_an_adapter_are_told_apart(llama_model: Path, tmp_path: Path) -> None:
    assert not is_adapter(llama_model)
    assert not is_adapter(tmp_path / "nowhere")
    (tmp_path / "adapter_config.json").write_text(json.dumps({}))
    assert is_adapter(tmp_path)
