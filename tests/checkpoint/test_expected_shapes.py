"""A configuration that does not fit the weights is refused before anything is written, without torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from quantlab import InputError, open_checkpoint, quantize_checkpoint
from quantlab.checkpoint.expected_shapes import check_shapes
from quantlab.checkpoint.export import export_checkpoint
from quantlab.checkpoint.families import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_sound_models_of_every_family_fit(family, make_model, tmp_path):
    check_shapes(open_checkpoint(make_model(tmp_path / "model", family, tied=FAMILIES[family].tied_by_default)))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hidden_size": 128}, "model.embed_tokens.weight is [512, 64] instead of [512, 128] (and "),
        ({"intermediate_size": 64}, "model.layers.0.mlp.down_proj.weight is [64, 96] instead of [64, 64] (and 5 more)"),
        ({"num_key_value_heads": 4}, "model.layers.0.self_attn.k_proj.weight is [32, 64] instead of [64, 64]"),
        ({"num_hidden_layers": 3}, "model.layers.2.self_attn.k_proj.weight is missing (and 8 more)"),
        ({"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight is of layer 1, and there are 1"),
        ({"vocab_size": 500}, "model.embed_tokens.weight is [512, 64] instead of [500, 64]"),
    ],
)
@pytest.mark.parametrize("out", ["out", "out.gguf"])
def test_sizes_that_disagree(changes, told, out, llama_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(llama_model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"head_dim": 16} | changes))
    for write in (quantize_checkpoint, lambda m, o: export_checkpoint(m, o, "gguf" if o.suffix else "hf")):
        with pytest.raises(InputError) as error:
            write(model, tmp_path / out)
        assert str(error.value).startswith(f"{model}: the files are not those of its config.json: ")
        assert told in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_a_tensor_that_is_missing(name, llama_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(llama_model, model)
    weights = load_file(model / "model.safetensors")
    del weights[name]
    save_file(weights, model / "model.safetensors")
    with pytest.raises(InputError, match=f"{name} is missing"):
        check_shapes(open_checkpoint(Path(model)))
