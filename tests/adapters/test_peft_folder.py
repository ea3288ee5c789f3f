"""peft's files, read and written: against peft itself."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from quantlab.adapters.adapter import Adapter, LowRankPair, Training, check_fits
from quantlab.adapters.peft_folder import write_peft_folder
from quantlab.adapters.reading import read_adapter
from quantlab.checkpoint import open_checkpoint
from quantlab.errors import InputError

NAME = "model.layers.0.self_attn.q_proj.weight"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], "bias": "none"}


def tuned_by_peft(base: Path, folder: Path, **options: object):
    """A peft model with random factors, saved to `folder`."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"]}),
        ("llama", {"r": 4, "lora_alpha": 12, "use_rslora": True, "target_modules": "all-linear"}),
        ("llama", {"r": 4, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2},
                   "alpha_pattern": {"layers.1.self_attn.q_proj": 5}}),
        ("gpt2", {"r": 3, "target_modules": ["attn.c_attn", "c_fc"], "fan_in_fan_out": True}),
        ("gpt_neox", {"r": 3, "target_modules": ["query_key_value"]}),
    ],
    ids=["plain", "rslora", "patterns", "conv1d", "neox"],
)  # fmt: skip
def test_updates_are_those_that_peft_merges(family: str, options: dict, make_model, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", family)
    peft_model = tuned_by_peft(base, tmp_path / "adapter", **options)
    adapter = read_adapter(tmp_path / "adapter")
    checkpoint = open_checkpoint(base)
    check_fits(adapter, checkpoint)
    assert adapter.method == "lora"
    merged = peft_model.merge_and_unload().state_dict()
    changed = set()
    for name in checkpoint.names:
        original = checkpoint.read(name)
        theirs = merged[name].T if checkpoint.family.is_transposed(name) else merged[name]
        if not torch.equal(original, theirs):
            changed.add(name)
            pair = adapter.pairs[name]
            ours = original + torch.from_numpy(pair.scale * pair.b @ pair.a)
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert changed == set(adapter.pairs)


def test_peft_loads_what_we_write(llama_model: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    live = tuned_by_peft(llama_model, tmp_path / "theirs", r=4, lora_alpha=12, target_modules=["q_proj", "v_proj"])
    adapter = read_adapter(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    write_peft_folder(adapter, config, tmp_path / "ours")
    ids = torch.arange(5, 25)[None]
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama_model), str(tmp_path / "ours")).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, live(ids).logits)
    theirs, ours = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(np.array_equal(theirs[key], ours[key]) for key in theirs)


def test_dora_comes_with_its_magnitudes(llama_model: Path, tmp_path: Path) -> None:
    tuned_by_peft(llama_model, tmp_path / "dora", r=4, use_dora=True, target_modules=["q_proj"])
    adapter = read_adapter(tmp_path / "dora")
    assert adapter.has_magnitudes
    norms = open_checkpoint(llama_model).read(NAME).norm(dim=1)
    np.testing.assert_allclose(adapter.pairs[NAME].magnitude, norms, rtol=0.2)


def hand_made(**training: object) -> Adapter:
    a = np.repeat(np.arange(4, dtype=np.float32).reshape(2, 2), 32, axis=1)
    b = np.linspace(-1, 1, 128, dtype=np.float32).reshape(64, 2)
    return Adapter(Path("x"), "block-sum", {NAME: LowRankPair(a, b, 3.0)}, Training(**training))


def test_what_quantlab_notes_comes_back(tmp_path: Path) -> None:
    adapter = hand_made(base="abc", regrid=True, levels=4, device="cpu")
    write_peft_folder(adapter, CONFIG, tmp_path / "a")
    again = read_adapter(tmp_path / "a")
    assert (again.method, again.training) == ("block-sum", Training("abc", True, 4, "cpu"))
    assert again.fingerprint() == adapter.fingerprint()
    assert again.pairs[NAME].scale == 3.0
    assert again.parameters == 2 * 64 + 64 * 2


def test_the_fingerprint_tells_scales_and_factors_apart() -> None:
    adapter = hand_made()
    pair = adapter.pairs[NAME]
    others = [LowRankPair(pair.a, pair.b, 2.0), LowRankPair(pair.a + 1, pair.b, 3.0), LowRankPair(pair.a, -pair.b, 3.0)]
    prints = {Adapter(Path("x"), "lora", {NAME: other}).fingerprint() for other in (pair, *others)}
    assert len(prints) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "only LORA"),
        ({"bias": "all"}, "trains biases"),
        ({"lora_bias": True}, "trains biases"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 0}, "r is 0"),
        ({"lora_alpha": "much"}, "lora_alpha is 'much'"),
        ({"lora_alpha": float("inf")}, "JSON"),
        ({"use_dora": True}, "magnitude"),
        ({"alpha_pattern": {"(": 1}}, "regular expression"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
    ],
)
def test_configurations_that_mean_something_else_are_refused(change: dict, message: str, tmp_path: Path) -> None:
    write_peft_folder(hand_made(), CONFIG, tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**CONFIG, **change}))
    with pytest.raises(InputError, match=message):
        read_adapter(tmp_path / "a")


PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = np.zeros((2, 64), np.float32), np.zeros((64, 2), np.float32)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{PREFIX}.lora_A.weight": A}, "lora_B is missing"),
        ({f"{PREFIX}.lora_A.weight": A, f"{PREFIX}.lora_B.weight": np.zeros((64, 3), np.float32)}, "do not fit"),
        ({f"{PREFIX}.lora_A.weight": A, f"{PREFIX}.lora_B.weight": B * np.float32("nan")}, "NaN"),
        ({f"{PREFIX}.lora_A.weight": A, f"{PREFIX}.lora_B.weight": B.astype(np.int32)}, "not a LoRA factor"),
        ({f"{PREFIX}.lora_A.weight": A[0], f"{PREFIX}.lora_B.weight": B}, "not a LoRA factor"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": A}, "no factor of a linear layer"),
        ({"base_model.model.lm_head.weight": A}, "no factor of a linear layer"),
    ],
)
def test_tensors_that_are_no_low_rank_update_are_refused(tensors: dict, message: str, tmp_path: Path) -> None:
    write_peft_folder(hand_made(), CONFIG, tmp_path / "a")
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(InputError, match=message):
        read_adapter(tmp_path / "a")


def test_a_block_sum_adapter_that_varies_within_a_block_is_damaged(tmp_path: Path) -> None:
    adapter = hand_made()
    adapter.pairs[NAME].a[0, 5] += 1
    write_peft_folder(adapter, CONFIG, tmp_path / "a")
    with pytest.raises(InputError, match="varies within a block"):
        read_adapter(tmp_path / "a")


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such adapter"):
        read_adapter(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is no folder"):
        read_adapter(tmp_path / "file")
    with pytest.raises(InputError, match="holds no adapter_config"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(InputError, match="holds no adapter_model"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_model.bin").write_text("x")
    with pytest.raises(InputError, match="a pickle"):
        read_adapter(tmp_path)


def test_an_adapter_of_another_model_is_refused(make_model, llama_model: Path, tmp_path: Path) -> None:
    adapter = hand_made()
    check_fits(adapter, open_checkpoint(llama_model))
    with pytest.raises(InputError, match="is not in the model"):
        check_fits(adapter, open_checkpoint(make_model(tmp_path / "g", "gpt2")))
    wider = make_model(tmp_path / "w", "llama", hidden_size=128)
    with pytest.raises(InputError, match=r"\[128, 128\] in the model"):
        check_fits(adapter, open_checkpoint(wider))
