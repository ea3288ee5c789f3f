"""Swapping replaces exactly the modules whose weights a recipe names, on any device, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from quantlab.formats import FORMATS, Recipe
from quantlab.nn import QuantEmbedding, QuantLinear, swap_modules

CONFIGS = {
    "llama": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
}
EVERYTHING = Recipe((("*", "q4_1"),))
HEAD = "lm_head.weight"
EMBEDDINGS = {"llama": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}
LAYERS = {"llama": "model.layers.*.weight", "gpt2": "transformer.h.*.weight"}

every_family = pytest.mark.parametrize("family", CONFIGS)
every_device = pytest.mark.parametrize("device", ["meta", "cpu"])
tied_or_not = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def config_of(family: str, tied: bool = True, **settings):
    return AutoConfig.for_model(family, vocab_size=128, tie_word_embeddings=tied, **(CONFIGS[family] | settings))


def new_model(family: str, *, device: str = "meta", tied: bool = True, auto=AutoModelForCausalLM, **settings):
    with torch.device(device):
        return auto.from_config(config_of(family, tied, **settings))


def matrices(model: nn.Module) -> dict[str, nn.Module]:
    """The modules with a matrix for a weight."""
    kinds = (nn.Linear, nn.Embedding, Conv1D)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}


@every_family
@every_device
@tied_or_not
def test_every_named_matrix_becomes_a_packed_module_of_its_shape_and_device(family, device, tied):
    model = new_model(family, device=device, tied=tied)
    before = matrices(model)
    assert sorted(swap_modules(model, EVERYTHING)) == sorted(before)
    for name, plain in before.items():
        packed = model.get_submodule(name)
        rows, columns = plain.weight.shape[::-1] if isinstance(plain, Conv1D) else plain.weight.shape
        assert type(packed) is (QuantEmbedding if isinstance(plain, nn.Embedding) else QuantLinear)
        assert packed.format is FORMATS["q4_1"]
        assert packed.packed_weight().shape == (rows, columns)
        assert packed.weight.device.type == device
        if isinstance(packed, QuantLinear):
            assert packed.transposed == isinstance(plain, Conv1D)
            assert (packed.out_features, packed.in_features) == (rows, columns)
            assert (packed.bias is None) == (plain.bias is None)


@every_family
@tied_or_not
def test_only_what_the_rules_name_is_swapped(family, tied):
    model = new_model(family, tied=tied)
    expected = [name for name in matrices(model) if ".0." in name]
    layer = LAYERS[family].replace("*", "0.*", 1)
    assert swap_modules(model, Recipe(((layer, "q5_1"),))) == expected
    assert {type(module) for name, module in matrices(model).items() if name not in expected} == (
        {nn.Linear, nn.Embedding} if family == "llama" else {nn.Linear, nn.Embedding, Conv1D}
    )


@every_family
def test_a_recipe_without_a_match_changes_nothing(family):
    model = new_model(family)
    before = shapes(model)
    assert swap_modules(model, Recipe((("*.weight.none", "q4_1"),))) == []
    assert shapes(model) == before


@every_family
def test_a_second_swap_finds_nothing_left(family):
    model = new_model(family)
    swap_modules(model, EVERYTHING)
    before = list(model.modules())
    assert swap_modules(model, Recipe((("*", "q8_0"),))) == []
    assert list(model.modules()) == before


def test_subclasses_of_linear_and_embedding_are_left_alone():
    """They compute something of their own: adapters, for example."""

    class Adapted(nn.Linear):
        pass

    class Scaled(nn.Embedding):
        pass

    model = new_model("llama")
    adapted = model.model.layers[0].mlp.up_proj = Adapted(64, 96, bias=False, device="meta")
    scaled = model.model.embed_tokens = Scaled(128, 64, device="meta")
    swapped = swap_modules(model, EVERYTHING)
    assert model.model.layers[0].mlp.up_proj is adapted
    assert model.model.embed_tokens is scaled
    assert "model.layers.1.mlp.up_proj" in swapped
    assert not {"model.layers.0.mlp.up_proj", "model.embed_tokens"} & set(swapped)


@pytest.mark.parametrize(("width", "swapped"), [(72, False), (96, True)])
def test_a_matrix_without_rows_of_whole_blocks_stays(width, swapped):
    """down_proj has rows of `intermediate_size` weights, up_proj of `hidden_size`."""
    names = swap_modules(new_model("llama", intermediate_size=width), EVERYTHING)
    assert ("model.layers.0.mlp.down_proj" in names) is swapped
    assert "model.layers.0.mlp.up_proj" in names


@every_family
def test_a_tied_head_takes_the_embeddings_format_and_blocks(family):
    model = new_model(family, device="cpu")
    swap_modules(model, Recipe(((EMBEDDINGS[family], "q8_0"), (HEAD, "q4_0"))))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (type(embedding), type(head)) == (QuantEmbedding, QuantLinear)
    assert embedding.format is head.format is FORMATS["q8_0"]
    model.tie_weights()
    assert head.weight is embedding.weight


@every_family
def test_a_tied_head_stays_float_with_its_embedding(family):
    model = new_model(family)
    assert swap_modules(model, Recipe(((HEAD, "q4_0"),))) == []


@every_family
def test_an_untied_head_takes_its_own_format(family):
    model = new_model(family, tied=False)
    swap_modules(model, Recipe(((EMBEDDINGS[family], "q8_0"), (HEAD, "q4_0"))))
    assert model.get_input_embeddings().format is FORMATS["q8_0"]
    assert model.get_output_embeddings().format is FORMATS["q4_0"]


@every_family
@tied_or_not
def test_a_bare_model_is_matched_by_the_causal_language_models_names(family, tied):
    """AutoModel's modules are called `layers.0...`; recipes say `model.layers.0...` all the same."""
    recipe = Recipe(((LAYERS[family], "q4_1"), (EMBEDDINGS[family], "q8_0")))
    full, bare = new_model(family, tied=tied), new_model(family, tied=tied, auto=AutoModel)
    prefix = {"llama": "model.", "gpt2": "transformer."}[family]
    names = [name for name in swap_modules(full, recipe) if name != "lm_head"]
    assert len(names) == {"llama": 2 * 7, "gpt2": 2 * 4}[family] + 1
    assert [prefix + name for name in swap_modules(bare, recipe)] == names


@every_family
def test_the_packed_model_computes_in_the_models_dtype(family):
    settings = {"attention_bias": True} if family == "llama" else {}
    model = new_model(family, device="cpu", dtype=torch.bfloat16, **settings)
    swap_modules(model, EVERYTHING)
    dtypes = {parameter.dtype for parameter in model.parameters()}
    assert dtypes == {torch.uint8, torch.bfloat16}
    assert model.get_input_embeddings()(torch.tensor([1])).dtype == torch.bfloat16
    assert any(module.bias is not None for module in model.modules() if isinstance(module, QuantLinear))
    assert model(torch.tensor([[1, 2]])).logits.dtype == torch.bfloat16
