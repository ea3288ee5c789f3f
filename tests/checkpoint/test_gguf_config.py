"""config.json through GGUF metadata and back: the same config, or one that computes the same."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from gguf_cases import CASES, gguf_shapes, make_model, model_of, no_tensor, transformers_config
from transformers import AutoModelForCausalLM

from quantlab.checkpoint.gguf_config import CONFIG_KEY, config_of, metadata_of


def way_back(config: dict[str, Any], model, *, forget: bool) -> dict[str, Any]:
    """Through a file's numbers: floats become fp32, lists of flags arrays."""
    made = metadata_of(config, config.get("vocab_size", 0), "config.json")
    metadata: dict[str, Any] = {}
    for key, value in made.metadata.items():
        assert isinstance(value, bool | int | float | str | list)
        metadata[key] = float(np.float32(value)) if isinstance(value, float) else value
        metadata[key] = np.array(value) if isinstance(value, list) else metadata[key]
    if forget:
        del metadata[CONFIG_KEY]
    metadata |= {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    shapes = gguf_shapes(model, config) | {name: tensor.shape for name, tensor in made.tensors.items()}
    return config_of(metadata, shapes, made.tensors.__getitem__, "model.gguf")


def logits(model, tokens: int) -> torch.Tensor:
    ids = torch.arange(tokens)[None] * 7 % 96
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("case", CASES)
def test_a_config_made_from_the_metadata_alone_computes_the_same(case):
    config = CASES[case]
    model = model_of(case)
    found = json.loads(json.dumps(way_back(config, model, forget=True)))
    assert found != config
    again = AutoModelForCausalLM.from_config(transformers_config(found)).eval()
    again.load_state_dict(model.state_dict())
    for tokens in (40, 12):
        assert torch.equal(logits(again, tokens), logits(model, tokens))
    assert again.config.bos_token_id == 1
    assert again.config.eos_token_id == 2


STRETCHED = [case for case, config in CASES.items() if "rope_scaling" in config or "rope_parameters" in config]


@pytest.mark.parametrize("case", STRETCHED)
def test_the_stretching_in_these_cases_shows(case):
    """Or else the test above would not see it lost."""
    config = CASES[case]
    plain = {key: value for key, value in config.items() if key not in ("rope_scaling", "rope_parameters")}
    assert not torch.equal(logits(make_model(plain), 40), logits(model_of(case), 40))


@pytest.mark.parametrize("case", CASES)
def test_the_config_itself_comes_back(case):
    config = CASES[case] | {"quantization_config": {"quant_method": "quantlab"}, "x": [None, 0.1, "\ud800 é"]}
    found = way_back(config, model_of(case), forget=False)
    tied = transformers_config(CASES[case]).tie_word_embeddings
    del config["quantization_config"]
    assert found == config | {"tie_word_embeddings": tied}


def llama_file(**more: Any) -> tuple[dict[str, Any], dict[str, tuple[int, ...]], Any]:
    """A Llama's metadata, shapes and reader, the stored config with a mark on it."""
    config = CASES["llama-llama3"] | {"mark": True, **more}
    made = metadata_of(config, 96, "config.json")
    shapes = gguf_shapes(model_of("llama-llama3"), config)
    return made.metadata, shapes | {"rope_freqs.weight": (8,)}, made.tensors.__getitem__


def test_an_edited_file_forgets_the_stored_config():
    metadata, shapes, read = llama_file()
    assert config_of(metadata, shapes, read, "f")["mark"]
    for key, value in (
        ("llama.context_length", 32),
        ("llama.rope.freq_base", 10001.0),
        ("llama.attention.layer_norm_rms_epsilon", 2e-6),
        ("llama.rope.scaling.type", "none"),  # another key
        ("llama.vocab_size", 95),
    ):
        assert "mark" not in config_of(metadata | {key: value}, shapes, read, "f")
    assert "mark" not in config_of({k: v for k, v in metadata.items() if k != "llama.vocab_size"}, shapes, read, "f")
    assert "mark" not in config_of(metadata, shapes, lambda name: read(name) * np.float32(1.5), "f")
    assert "mark" not in config_of(
        metadata, shapes | {f"blk.0.ffn_{n}.bias": (1,) for n in ("gate", "up", "down")}, read, "f"
    )
    del shapes["rope_freqs.weight"]
    assert "mark" not in config_of(metadata, shapes, read, "f")


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", "7", "[" * 100_000, '{"a": NaN}', 7, None, b"{}"),
        *('{"model_type": "llama"}', '{"model_type": "mamba"}', '{"model_type": ["llama"]}'),
        '{"model_type": "llama", "hidden_size": 1e999}',
        '{"model_type": "llama", "num_attention_heads": 1, "hidden_size": 2147483646, "num_hidden_layers": 2000000000}',
    ],
    ids=lambda text: str(text)[:30],
)
def test_a_damaged_stored_config_is_ignored(text):
    metadata, shapes, read = llama_file()
    found = config_of(metadata | {CONFIG_KEY: text}, shapes, read, "f")
    assert found["rope_parameters"]["rope_type"] == "llama3"
    assert "mark" not in found


def test_a_stored_config_cannot_bring_a_quantization_config():
    metadata, shapes, read = llama_file()
    stored = json.loads(metadata[CONFIG_KEY]) | {"quantization_config": {"quant_method": "other"}}
    found = config_of(metadata | {CONFIG_KEY: json.dumps(stored)}, shapes, read, "f")
    assert found["mark"]
    assert "quantization_config" not in found


def test_the_embedding_and_the_head_have_the_last_word_on_the_stored_config():
    metadata, shapes, read = llama_file()
    rows = {"token_embd.weight": (100, 32), "output.weight": (100, 32)}
    found = config_of(metadata | {"llama.vocab_size": 100}, shapes | rows, read, "f")
    assert found["mark"]
    assert found["vocab_size"] == 100
    del shapes["output.weight"]
    assert config_of(metadata, shapes, read, "f")["tie_word_embeddings"]


def test_neox_keeps_a_tied_head_although_its_files_hold_it():
    config = CASES["neox-tied-linear"]
    shapes = gguf_shapes(model_of("neox-tied-linear"), config) | {"output.weight": (96, 64)}
    metadata = metadata_of(config, 96, "f").metadata
    assert config_of(metadata, shapes, no_tensor, "f")["tie_word_embeddings"]
