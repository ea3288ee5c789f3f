"""From config and models to the plan: parts, parameters, config.json, and refusals that list everything."""

import json

import numpy as np
import pytest
from merge_models import INNER, LAYERS, LETTERS, WIDTH, by_name, llama, opened_for, planned
from safetensors.numpy import load_file, save_file

from quantlab.checkpoint.export import export_checkpoint
from quantlab.merging.config import read_config
from quantlab.merging.faults import MergeError
from quantlab.merging.plan import plan_merge
from quantlab.merging.plan_types import Part
from quantlab.merging.references import ModelReference

UP = "model.layers.{}.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: llama(root / name, seed=i) for i, name in enumerate(("base", "a", "b"))}


def models(*folders, **keys):
    listed = "".join(f"  - model: {folder}\n" for folder in folders)
    return f"models:\n{listed}" + "".join(f"{key}: {value}\n" for key, value in keys.items())


def linear(*folders, **keys):
    return models(*folders, **{"merge_method": "linear", "parameters": "{weight: 1.0}", **keys})


def faults_of(text):
    with pytest.raises(MergeError) as caught:
        planned(text)
    return list(caught.value.faults)


def reference(folder):
    return ModelReference(str(folder))


# ---- ordinary merges


def test_a_linear_merge(folders):
    a, b = folders["a"], folders["b"]
    plan = planned(linear(a, b))
    tensors = by_name(plan)
    assert list(tensors) == sorted(tensors, key=list(tensors).index)
    assert set(tensors) == set(load_file(a / "model.safetensors"))
    up = tensors[UP.format(2)]
    assert up.parts == (Part(reference(a), UP.format(2)), Part(reference(b), UP.format(2)))
    assert (up.shape, up.dtype, up.method, up.base) == ((INNER, WIDTH), "F32", "linear", None)
    assert up.parameters == {"weight": (1.0, 1.0), "normalize": True}
    assert plan.companions == reference(a)
    assert plan.config["num_hidden_layers"] == LAYERS
    assert plan.config["vocab_size"] == len(LETTERS)
    assert plan.config["tie_word_embeddings"] is False
    assert plan.config["dtype"] == "float32"
    assert (plan.vocabulary, plan.files, plan.notes) == (None, {}, ())


def test_embeddings_come_first_and_the_head_last(folders):
    names = [tensor.name for tensor in planned(linear(folders["a"], folders["b"])).tensors]
    assert names[0] == "model.embed_tokens.weight"
    assert set(names[-2:]) == {"lm_head.weight", "model.norm.weight"}


def test_gradients_run_from_the_embedding_to_the_head(folders):
    parameters = "{weight: [0, 1, 0.4], normalize: false}"
    text = models(folders["a"], folders["b"], merge_method="linear", parameters=parameters)
    tensors = by_name(planned(text))
    weights = [tensors[UP.format(layer)].parameters["weight"][0] for layer in range(LAYERS)]
    assert weights == pytest.approx([0, 2 / 3, 0.8, 0.4])
    assert tensors["model.embed_tokens.weight"].parameters["weight"] == (0.0, 0.0)
    assert tensors["model.norm.weight"].parameters["weight"] == (0.4, 0.4)
    assert tensors["lm_head.weight"].parameters["weight"] == (0.4, 0.4)


def test_models_own_parameters_win_and_filters_fall_through(folders):
    text = f"""
models:
  - model: {folders["a"]}
    parameters:
      weight: [{{filter: mlp, value: 0.25}}]
  - model: {folders["b"]}
merge_method: linear
parameters: {{weight: 0.75, normalize: [{{filter: norm, value: false}}]}}
"""
    tensors = by_name(planned(text))
    assert tensors[UP.format(0)].parameters == {"weight": (0.25, 0.75), "normalize": True}
    assert tensors["model.norm.weight"].parameters == {"weight": (0.75, 0.75), "normalize": False}


def test_a_filter_that_matches_nothing_is_noted(folders):
    text = models(folders["a"], merge_method="linear", parameters="{weight: [{filter: mpl, value: 2}, {value: 1}]}")
    assert planned(text).notes == ("weight: no tensor's name has 'mpl' in it, which a filter asks for",)


@pytest.mark.parametrize("listed", [False, True])
def test_the_base_of_deltas_is_no_merged_model(folders, listed):
    base, a, b = folders["base"], folders["a"], folders["b"]
    named = (base, a, b) if listed else (a, b)
    plan = planned(models(*named, merge_method="task_arithmetic", base_model=base, parameters="{weight: 0.5}"))
    up = by_name(plan)[UP.format(1)]
    assert up.base == Part(reference(base), UP.format(1))
    assert [part.model for part in up.parts] == [reference(a), reference(b)]
    assert up.parameters["weight"] == (0.5, 0.5)
    assert plan.companions == reference(base)


def test_parameters_of_the_base_are_noted(folders):
    base, a = folders["base"], folders["a"]
    text = f"models: [{{model: {base}, parameters: {{weight: 1}}}}, {{model: {a}}}]\nmerge_method: task_arithmetic\n"
    plan = planned(f"{text}base_model: {base}\nparameters: {{weight: 1}}\n")
    assert plan.notes == (f"parameters of {base} count for nothing: it is the base, and has no delta",)


def test_linear_counts_a_base_that_is_listed(folders):
    base, a = folders["base"], folders["a"]
    up = by_name(planned(linear(base, a, base_model=base)))[UP.format(1)]
    assert up.base is None
    assert [part.model for part in up.parts] == [reference(base), reference(a)]


def test_negative_weights_make_analogies(folders):
    base, a, b = folders["base"], folders["a"], folders["b"]
    text = f"""
merge_method: task_arithmetic
base_model: {base}
models:
  - {{model: {a}, parameters: {{weight: 1.0}}}}
  - {{model: {b}, parameters: {{weight: -0.5}}}}
"""
    assert by_name(planned(text))["model.norm.weight"].parameters["weight"] == (1.0, -0.5)


def test_slerp_goes_from_the_base(folders):
    a, b = folders["a"], folders["b"]
    for text in (
        models(b, a, merge_method="slerp", base_model=a, parameters="{t: 0.25}"),
        models(b, merge_method="slerp", base_model=a, parameters="{t: 0.25}"),
    ):
        up = by_name(planned(text))[UP.format(0)]
        assert [part.model for part in up.parts] == [reference(a), reference(b)]
        assert up.parameters["t"] == 0.25


@pytest.mark.parametrize(
    ("words", "dtype"), [({"dtype": "bfloat16"}, "BF16"), ({"dtype": "bfloat16", "out_dtype": "float16"}, "F16")]
)
def test_output_types(folders, words, dtype):
    plan = planned(linear(folders["a"], folders["b"], **words))
    assert {tensor.dtype for tensor in plan.tensors} == {dtype}
    assert plan.config["dtype"] == {"BF16": "bfloat16", "F16": "float16"}[dtype]


def test_the_inputs_type_stays(tmp_path, folders):
    half = llama(tmp_path / "half", dtype=np.float16, seed=5)
    assert {tensor.dtype for tensor in planned(linear(half, folders["a"])).tensors} == {"F16"}


# ---- what is missing or wrong


def test_a_base_is_needed(folders):
    (fault,) = faults_of(models(folders["a"], merge_method="task_arithmetic", parameters="{weight: 1}"))
    assert fault == "task_arithmetic merges differences from a base, and there is none; name it as base_model"


def test_required_parameters(folders):
    text = models(folders["a"], folders["b"], merge_method="slerp")
    assert "slerp needs t for model.embed_tokens.weight, and there is none; give it below parameters: {t: ...}" in (
        faults_of(text)
    )


def test_too_many_models(folders):
    (fault,) = faults_of(models(*folders.values(), merge_method="slerp", parameters="{t: 0.5}"))
    assert fault == "slerp: 3 models to merge: this method takes 2, the base not counted"


def test_no_model_but_the_base(folders):
    base = folders["base"]
    (fault,) = faults_of(models(base, merge_method="ties", base_model=base, parameters="{weight: 1, density: 1}"))
    assert fault == "ties: 0 models to merge: this method takes 1 or more, the base not counted"


def test_other_widths_list_all_shapes(tmp_path, folders):
    wide = {"mlp.up_proj.weight": (20, WIDTH), "mlp.gate_proj.weight": (20, WIDTH), "mlp.down_proj.weight": (WIDTH, 20)}
    other = llama(tmp_path / "wide", shapes=wide)
    (fault,) = faults_of(linear(folders["a"], other, folders["b"]))
    assert (
        f"model.layers.*.mlp.up_proj.weight is [12, 8] in {folders['a']} and {folders['b']}, [20, 8] in {other}"
        in fault
    )
    assert "model.layers.*.mlp.down_proj.weight is [8, 12]" in fault
    assert fault.count(" is [") == 3
    assert fault.endswith("merge models of one family and size, or leave the odd one out")


def test_other_families(tmp_path, folders):
    other = llama(tmp_path / "qwen", model_type="qwen2")
    (fault,) = faults_of(linear(folders["a"], other))
    assert f"models of 2 families (llama: {folders['a']}, qwen2: {other}); merge models of one family" in fault


def test_other_heads_of_equal_shapes(tmp_path, folders):
    other = llama(tmp_path / "heads", num_attention_heads=4, num_key_value_heads=2)
    faults = faults_of(linear(folders["a"], other))
    assert [fault.split(":")[0] for fault in faults] == ["heads", "heads of keys and values", "width of a head"]
    assert f"heads: 2 in {folders['a']}, 4 in {other}: their weights do not mean the same" in faults[0]


def test_another_rotary_embedding_is_noted(tmp_path, folders):
    other = llama(tmp_path / "long", rope_theta=1e6, max_position_embeddings=64)
    assert planned(linear(folders["a"], other)).notes == (
        f"context length as in {folders['a']}; {other} differ",
        f"rotary embedding as in {folders['a']}; {other} differ",
    )


def test_unequal_depths(tmp_path, folders):
    deep = llama(tmp_path / "deep", layers=6)
    (fault,) = faults_of(linear(folders["a"], deep))
    listed = f"unequal numbers of layers: {LAYERS} of {folders['a']}, 6 of {deep}"
    assert fault == f"{listed}; choose layers with slices and their layer_range"
    faults = faults_of(models(folders["a"], merge_method="task_arithmetic", base_model=deep, parameters="{weight: 1}"))
    assert (
        f"the base {deep} has 6 layers, the models {LAYERS}; choose layers with slices and their layer_range" in faults
    )


def test_missing_tensors(tmp_path, folders):
    holed = llama(tmp_path / "holed")
    tensors = load_file(holed / "model.safetensors")
    for name in [UP.format(1), UP.format(2), UP.format(3), "model.norm.weight"]:
        del tensors[name]
    save_file(tensors, holed / "model.safetensors")
    (fault,) = faults_of(linear(folders["a"], holed))
    assert fault.startswith(
        f"{holed} lacks tensors that others have: model.layers.1-3.mlp.up_proj.weight, model.norm.weight; merge models"
    )


def test_layers_that_config_json_does_not_count(tmp_path, folders):
    odd = llama(tmp_path / "odd", num_hidden_layers=3)
    (fault,) = faults_of(linear(folders["a"], odd))
    assert fault == (
        f"{odd}: its tensors are of 4 layers, and config.json says 3; mend its config.json or download it again"
    )


def test_odd_names_stay_as_they_are(tmp_path):
    odd = llama(tmp_path / "odd")
    names = ("model.layers.1.{x}.weight", "model.layers.00.up.weight", "model.extra.{}.weight")
    tensors = load_file(odd / "model.safetensors") | dict.fromkeys(names, np.ones(3, np.float32))
    save_file(tensors, odd / "model.safetensors")
    plan = by_name(planned(linear(odd, odd)))
    assert all(plan[name].parts[0].name == name for name in names)
    assert len(plan) == len(tensors)


def test_biases_that_one_model_lacks(tmp_path, folders):
    biased = llama(tmp_path / "biased", biases=True)
    (fault,) = faults_of(linear(folders["a"], biased))
    assert fault.startswith(f"{folders['a']} lacks biases that others have: model.layers.0-3.self_attn.")
    assert all(f"model.layers.0-3.self_attn.{kind}_proj.bias" in fault for kind in "qkvo")
    assert fault.endswith("let zeros stand for them: missing_biases: zero")
    plan = planned(linear(folders["a"], biased, missing_biases="zero"))
    name = "model.layers.2.self_attn.v_proj.bias"
    bias = by_name(plan)[name]
    assert bias.parts == (Part(reference(folders["a"]), name, zeros=True), Part(reference(biased), name))
    assert bias.shape == (4,)
    assert plan.config["attention_bias"] is True


def test_faults_of_all_kinds_come_together(tmp_path, folders):
    other = llama(tmp_path / "other", shapes={"mlp.up_proj.weight": (20, WIDTH)}, tokens=(*LETTERS, "g"), biases=True)
    faults = faults_of(models(folders["a"], other, merge_method="linear"))
    kinds = ("different tokens", "lacks biases", "tensors have other shapes")
    assert all(any(kind in fault for fault in faults) for kind in kinds)
    assert not any("embed_tokens" in fault for fault in faults if "shapes" in fault)


# ---- heads


def test_all_tied(tmp_path):
    tied = [llama(tmp_path / name, tied=True, seed=i) for i, name in enumerate("ab")]
    plan = planned(linear(*tied))
    assert "lm_head.weight" not in by_name(plan)
    assert plan.config["tie_word_embeddings"] is True


def test_a_tied_models_head_is_its_embedding(tmp_path, folders):
    tied = llama(tmp_path / "tied", tied=True)
    for order in ((tied, folders["a"]), (folders["a"], tied)):
        plan = planned(linear(*order))
        parts = {part.model: part.name for part in by_name(plan)["lm_head.weight"].parts}
        assert parts == {
            reference(tied): "model.embed_tokens.weight",
            reference(folders["a"]): "lm_head.weight",
        }
        assert plan.config["tie_word_embeddings"] is False


# ---- slices


def stacked(folder, *ranges, method="passthrough", **keys):
    pieces = "".join(f"- sources: [{{model: {folder}, layer_range: [{a}, {b}]}}]\n" for a, b in ranges)
    return f"slices:\n{pieces}merge_method: {method}\n" + "".join(f"{key}: {value}\n" for key, value in keys.items())


def test_layers_may_repeat(folders):
    plan = planned(stacked(folders["a"], (0, 3), (1, 3), (3, 4)))
    tensors = by_name(plan)
    assert plan.config["num_hidden_layers"] == 6
    assert [tensors[UP.format(layer)].parts[0].name for layer in range(6)] == [
        UP.format(layer) for layer in (0, 1, 2, 1, 2, 3)
    ]
    assert tensors["lm_head.weight"].parts == (Part(reference(folders["a"]), "lm_head.weight"),)


def test_slices_of_several_models(folders):
    base, a, b = folders["base"], folders["a"], folders["b"]
    text = f"""
slices:
  - sources:
      - {{model: {a}, layer_range: [0, 2], parameters: {{weight: 0.9}}}}
      - {{model: {b}, layer_range: [2, 4]}}
    parameters: {{weight: [0.2, 0.4]}}
  - sources:
      - {{model: {b}, layer_range: [1, 4]}}
merge_method: task_arithmetic
base_model: {base}
parameters: {{weight: [1, 2, 4]}}
"""
    with pytest.raises(MergeError, match=r"slices\[0\]: sources have other ranges, so that the base's is not known"):
        planned(text)
    listed = text.replace(
        "    parameters: {weight", f"      - {{model: {base}, layer_range: [0, 2]}}\n    parameters: {{weight"
    )
    plan = planned(listed)
    tensors = by_name(plan)
    assert plan.config["num_hidden_layers"] == 5
    assert [tensors[UP.format(i)].parameters["weight"] for i in range(5)] == [
        (0.9, 0.2), (0.9, 0.4), (1.0,), (2.0,), (4.0,)
    ]  # fmt: skip
    assert [[part.name for part in tensors[UP.format(i)].parts] for i in (1, 2)] == [
        [UP.format(1), UP.format(3)], [UP.format(1)]
    ]  # fmt: skip
    assert [tensors[UP.format(i)].base.name for i in range(5)] == [UP.format(i) for i in (0, 1, 1, 2, 3)]
    assert [part.model for part in tensors["model.embed_tokens.weight"].parts] == [reference(a), reference(b)]
    assert [part.model for part in tensors["lm_head.weight"].parts] == [reference(b)]
    assert tensors["lm_head.weight"].parameters["weight"] == (4.0,)
    assert any("embeddings are merged of the first slice's models" in note for note in plan.notes)


def test_one_model_twice_in_a_slice(folders):
    a = folders["a"]
    sources = f"[{{model: {a}, layer_range: [0, 2]}}, {{model: {a}, layer_range: [2, 4]}}]"
    plan = planned(f"slices: [{{sources: {sources}}}]\nmerge_method: linear\nparameters: {{weight: 1}}\n")
    assert [part.name for part in by_name(plan)[UP.format(1)].parts] == [UP.format(1), UP.format(3)]


def test_layers_that_are_not_there(folders):
    (fault,) = faults_of(stacked(folders["a"], (0, 9)))
    assert fault == f"slices[0]: {folders['a']} has {LAYERS} layers, and layer_range is [0, 9]; mend it"


def test_unequal_slices(folders):
    a, b = folders["a"], folders["b"]
    sources = f"[{{model: {a}, layer_range: [0, 2]}}, {{model: {b}, layer_range: [0, 3]}}]"
    (fault,) = faults_of(f"slices: [{{sources: {sources}}}]\nmerge_method: linear\nparameters: {{weight: 1}}\n")
    assert fault == f"slices[0]: unequal numbers of layers: 2 of {a}, 3 of {b}; give ranges of equal length"


QWEN = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
GEMMA = {"model_type": "gemma2", "tie_word_embeddings": True, "query_pre_attn_scalar": 4, "head_dim": 4}


@pytest.mark.parametrize(
    ("config", "types"),
    [
        ({"model_type": "qwen3", "head_dim": 4, "layer_types": ["s", "f", "s", "f"]}, ["s", "f", "f", "s"]),
        (QWEN, ["full_attention", "full_attention", "full_attention", "sliding_attention"]),
        (GEMMA, ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]),
    ],
)
def test_layer_types_go_with_their_layers(tmp_path, config, types):
    folder = llama(tmp_path / "kinds", **config)
    plan = planned(stacked(folder, (0, 2), (1, 3)))
    assert plan.config["layer_types"] == types
    unchanged = planned(stacked(folder, (0, 4)))
    assert unchanged.config.get("layer_types") == config.get("layer_types")


def test_layers_of_two_kinds_do_not_merge(tmp_path):
    folder = llama(tmp_path / "kinds", **QWEN)
    sources = f"[{{model: {folder}, layer_range: [0, 2]}}, {{model: {folder}, layer_range: [2, 4]}}]"
    faults = faults_of(f"slices: [{{sources: {sources}}}]\nmerge_method: linear\nparameters: {{weight: 1}}\n")
    assert faults[0] == (
        f"layer 0 would be of two kinds: full_attention in layer 0 of {folder}, "
        f"sliding_attention in layer 2 of {folder}; choose layers of one kind"
    )


def test_lists_by_layer_that_nobody_knows_are_refused(tmp_path):
    folder = llama(tmp_path / "lists", per_layer=[1, 2, 3, 4], eos_token_id=[1, 2, 3, 4])
    (fault,) = faults_of(stacked(folder, (0, 2), (3, 4)))
    assert f"{folder}: per_layer in config.json has as many entries as there are layers; config.json cannot" in fault
    assert planned(stacked(folder, (0, 4))).config["per_layer"] == [1, 2, 3, 4]


def gpt2(folder, layers=3, **config):
    """No more than a few tensors, under names without the prefix, with the number of layers under the other key."""
    kinds = {"ln_1.weight": (WIDTH,), "attn.c_attn.weight": (WIDTH, 3 * WIDTH), "attn.c_attn.bias": (3 * WIDTH,)}
    shapes = {f"h.{layer}.{kind}": shape for layer in range(layers) for kind, shape in kinds.items()}
    shapes |= {"wte.weight": (8, WIDTH), "wpe.weight": (32, WIDTH), "ln_f.weight": (WIDTH,)}
    folder.mkdir()
    save_file({name: np.ones(shape, np.float32) for name, shape in shapes.items()}, folder / "model.safetensors")
    sizes = {"n_embd": WIDTH, "n_head": 2, "n_positions": 32, "vocab_size": 8, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes, **config}))
    return folder


def test_gpt2s_layers(tmp_path):
    plan = planned(stacked(gpt2(tmp_path / "gpt2"), (0, 2), (1, 3)))
    tensors = by_name(plan)
    assert [tensor.name for tensor in plan.tensors][:2] == ["transformer.wpe.weight", "transformer.wte.weight"]
    assert plan.tensors[-1].name == "transformer.ln_f.weight"
    assert tensors["transformer.h.3.attn.c_attn.weight"].shape == (3 * WIDTH, WIDTH)
    assert tensors["transformer.h.3.attn.c_attn.weight"].parts[0].name == "transformer.h.2.attn.c_attn.weight"
    assert plan.config["n_layer"] == 4
    assert "num_hidden_layers" not in plan.config
    assert plan.config["tie_word_embeddings"] is True


def test_gpt2s_scaling_by_layer_is_refused(tmp_path):
    folder = gpt2(tmp_path / "gpt2", scale_attn_by_inverse_layer_idx=True)
    (fault,) = faults_of(stacked(folder, (0, 2), (1, 3)))
    assert fault.startswith(
        "scale_attn_by_inverse_layer_idx divides attention by the layer's number; config.json cannot"
    )
    assert planned(stacked(folder, (0, 3))).config["n_layer"] == 3


# ---- what models are made of


def test_packed_weights_have_their_logical_shapes(tmp_path):
    kind = "self_attn.o_proj.weight"
    rules = {"quant_method": "quantlab", "rules_version": 1, "rules": [["*o_proj.weight", "q8_0"]]}
    flat = llama(tmp_path / "float", shapes={kind: (WIDTH, 64)}, dtype=np.float16)
    packed = llama(tmp_path / "packed", shapes={kind: (WIDTH, 64)}, quantization_config=rules, dtype=np.float16)
    tensors = load_file(packed / "model.safetensors")
    tensors |= {name: np.zeros((WIDTH, 2 * 34), np.uint8) for name in tensors if name.endswith(kind)}
    save_file(tensors, packed / "model.safetensors")
    plan = planned(linear(packed, flat))
    tensor = by_name(plan)[f"model.layers.0.{kind}"]
    assert (tensor.shape, tensor.dtype) == ((WIDTH, 64), "F32")  # as config.json says, where blocks have no type
    assert by_name(plan)["model.norm.weight"].dtype == "F16"
    assert "quantization_config" not in plan.config


def test_gguf_and_folder_together(tmp_path):
    file = tmp_path / "model.gguf"
    folder = llama(tmp_path / "a", tokens=None, rows=8)
    export_checkpoint(folder, file, "gguf")
    plan = planned(linear(file, folder))
    assert by_name(plan)[UP.format(1)].parts == (
        Part(reference(file), UP.format(1)),
        Part(reference(folder), UP.format(1)),
    )
    assert {tensor.dtype for tensor in plan.tensors} == {"F32"}


def test_integers_are_copied(tmp_path, folders):
    odd = llama(tmp_path / "odd")
    other = llama(tmp_path / "other", seed=2)
    for folder in (odd, other):
        tensors = load_file(folder / "model.safetensors") | {"model.layers.0.ids": np.arange(3)}
        save_file(tensors, folder / "model.safetensors")
    plan = planned(linear(odd, other))
    ids = by_name(plan)["model.layers.0.ids"]
    assert (ids.method, ids.dtype, ids.parameters) == ("passthrough", "I64", {})
    assert ids.parts == (Part(reference(odd), "model.layers.0.ids"),)
    assert plan.notes == ("model.layers.0.ids holds I64, no weights; it is copied",)


def test_floats_of_eight_bits_are_not_copied_in_silence(tmp_path):
    import torch
    from safetensors.torch import save_file as save_torch_file

    folder = llama(tmp_path / "eight")
    name = "model.norm.weight"
    tensors = {key: torch.from_numpy(value) for key, value in load_file(folder / "model.safetensors").items()}
    save_torch_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, folder / "model.safetensors")
    (fault,) = faults_of(linear(folder))
    assert fault == f"{folder}: {name} holds F8_E4M3; convert it to a type that is computed with"


def test_slices_may_have_bases_of_their_own(folders):
    base, a, b = folders["base"], folders["a"], folders["b"]
    pieces = "".join(
        f"- sources: [{{model: {one}, layer_range: [{first}, {first + 2}]}}]\n  base_model: {two}\n"
        for one, two, first in ((a, base, 0), (a, b, 2))
    )
    tensors = by_name(planned(f"slices:\n{pieces}merge_method: task_arithmetic\nparameters: {{weight: 1}}\n"))
    assert [tensors[UP.format(i)].base.model for i in (1, 2)] == [reference(base), reference(b)]
    assert tensors["model.embed_tokens.weight"].base.model == reference(base)
    assert tensors["lm_head.weight"].base.model == reference(b)


def test_slerp_in_slices_goes_from_the_base(folders):
    a, b = folders["a"], folders["b"]
    sources = f"[{{model: {b}, layer_range: [0, 4]}}, {{model: {a}, layer_range: [0, 4]}}]"
    text = f"slices: [{{sources: {sources}}}]\nmerge_method: slerp\nparameters: {{t: 0.1}}\n"
    for more, order in (("", [b, a]), (f"base_model: {a}\n", [a, b])):
        parts = by_name(planned(text + more))[UP.format(0)].parts
        assert [part.model for part in parts] == [reference(each) for each in order]


def test_an_adapter_is_another_model(folders):
    a = folders["a"]
    _, opened = opened_for(linear(a))
    with_adapter = ModelReference(str(a), None, "adapter")
    config = read_config(linear(a, f"{a}+adapter"))
    plan = plan_merge(config, {**opened, with_adapter: opened[reference(a)]})
    assert [part.model for part in by_name(plan)["model.norm.weight"].parts] == [reference(a), with_adapter]
