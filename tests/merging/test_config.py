"""Reading merge configs: what users write, and everything that is wrong with it, by line."""

import json
import random

import pytest

from quantlab.errors import InputError
from quantlab.merging.config import MergedModel, TokenSource, read_config
from quantlab.merging.faults import MergeError
from quantlab.merging.references import ModelReference
from quantlab.merging.values import Alternative, Setting

A, B, BASE = ModelReference("org/a"), ModelReference("org/b"), ModelReference("org/base")


def one(value):
    return Setting((Alternative(value),))


def faults_of(text):
    with pytest.raises(MergeError) as caught:
        read_config(text)
    return list(caught.value.faults)


def test_models_with_weights():
    config = read_config(
        """
models:
  - model: org/a
    parameters: {weight: 0.3}
  - model: org/b
    parameters:
      weight: [0.0, 0.5, 1.0]
merge_method: linear
dtype: bfloat16
parameters:
  normalize: true
"""
    )
    assert config.method == "linear"
    assert config.models == (MergedModel(A, {"weight": one(0.3)}), MergedModel(B, {"weight": one((0.0, 0.5, 1.0))}))
    assert config.parameters == {"normalize": one(True)}
    assert config.dtype == "BF16"
    assert config.references == (A, B)
    assert config.base is None
    assert config.tokenizer is None
    assert config.chat_template is None


def test_slices_with_filters():
    config = read_config(
        """
slices:
  - sources:
      - model: org/a
        layer_range: [0, 32]
      - model: org/b@main+org/lora
        layer_range: [0, 32]
        parameters:
          weight:
            - filter: self_attn
              value: [0, 0.5, 0.3]
            - filter: mlp
              value: 1
            - value: 0.5 # for the others
    parameters: {weight: 1}
merge_method: task_arithmetic
base_model: org/a
out_dtype: float16
dtype: float32
"""
    )
    lora = ModelReference("org/b", "main", "org/lora")
    (piece,) = config.slices
    assert piece.sources[0] == MergedModel(A, {}, (0, 32))
    assert piece.sources[1].layers == (0, 32)
    assert piece.sources[1].parameters["weight"].alternatives == (
        Alternative((0.0, 0.5, 0.3), "self_attn"),
        Alternative(1.0, "mlp"),
        Alternative(0.5),
    )
    assert piece.parameters == {"weight": one(1.0)}
    assert config.references == (A, lora)
    assert config.dtype == "F16"


def test_one_module_is_the_model():
    config = read_config("merge_method: linear\nmodules: {text: {models: [{model: org/a}]}}\n")
    assert config.models == (MergedModel(A),)


def test_tokenizer_settings():
    config = read_config(
        """
merge_method: linear
models: [{model: org/a}, {model: org/b}]
base_model: org/base
tokenizer:
  source: union
  pad_to_multiple_of: 64
  tokens:
    <|im_start|>: {source: org/b}
    <unk>: {source: {kind: zero}, force: true}
    <pad>: {source: {kind: model_token, model: org/a, token: </s>}}
    <x>: {source: {kind: model_token, model: org/a, token_id: 7}}
chat_template: chatml
"""
    )
    assert config.tokenizer.source == "union"
    assert config.tokenizer.multiple == 64
    assert config.tokenizer.tokens == {
        "<|im_start|>": TokenSource(B),
        "<unk>": TokenSource(None, None, True),
        "<pad>": TokenSource(A, "</s>"),
        "<x>": TokenSource(A, 7),
    }
    assert config.chat_template == "chatml"
    assert config.references == (BASE, A, B)


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("tokenizer_source: union", "union"),
        ("tokenizer_source: base", "base"),
        ("tokenizer_source: org/other", ModelReference("org/other")),
        ("tokenizer_source: model:org/other", ModelReference("org/other")),
        ("tokenizer: {source: org/other}", ModelReference("org/other")),
        ("tokenizer: {pad_to_multiple_of: 8}", "union"),
    ],
)
def test_tokenizer_sources(text, source):
    config = read_config(f"merge_method: linear\nmodels: [{{model: org/a}}]\n{text}\n")
    assert config.tokenizer.source == source
    assert set(config.references) == {A} | ({source} if isinstance(source, ModelReference) else set())


def test_long_references():
    text = "merge_method: linear\nmodels:\n- model: {model: {path: org/a, revision: v1}, lora: {path: org/l}}\n"
    assert read_config(text).models[0].reference == ModelReference("org/a", "v1", "org/l")


def test_numbers_that_yaml_takes_for_text_and_flags_as_numbers():
    text = "merge_method: linear\nmodels: [{model: org/a, parameters: {weight: 1e-5}}]\nparameters: {normalize: 0.0}\n"
    config = read_config(text)
    assert config.models[0].parameters["weight"] == one(1e-5)
    assert config.parameters["normalize"] == one(False)


def test_aliases_and_merge_keys():
    text = "merge_method: linear\nmodels:\n- &a {model: org/a, parameters: {weight: 2}}\n- {<<: *a, model: org/b}\n"
    models = read_config(text).models
    assert [model.reference for model in models] == [A, B]
    assert models[1].parameters == {"weight": one(2.0)}


def test_a_file(tmp_path):
    path = tmp_path / "merge.yml"
    path.write_text("merge_method: linear\nmodels: [{model: org/a}]\n")
    assert read_config(path).text == path.read_text()
    assert read_config(str(path)).source == str(path)
    assert read_config("{merge_method: linear, models: [{model: org/a}]}").models == (MergedModel(A),)


def test_what_has_no_effect_is_noted():
    text = (
        "merge_method: linear\nmodels: [{model: org/a, parameters: {int8_mask: true}}]\nparameters: {int8_mask: true}"
    )
    assert read_config(text).notes == (
        "int8_mask has no effect: masks are never kept whole, so there is nothing to save",
    )


def test_all_faults_at_once():
    faults = faults_of(
        """
merge_methode: linear
merge_method: lienar
models:
  - modle: org/a
  - model: org/b
    weight: 1
dtype: bf16
tokenizer: {source: union, pad_to_multiple_of: no}
chat_template: chatlm
"""
    )
    assert len(faults) == 8
    assert any(each.startswith("line 2: merge_methode: ") and "did you mean merge_method?" in each for each in faults)
    assert any("line 3: merge_method: 'lienar' is not known; did you mean linear?" in each for each in faults)
    assert any("'modle' is no key here; did you mean model?" in each for each in faults)
    assert any("names no model" in each for each in faults)
    assert any("chat_template" in each and "did you mean chatml?" in each for each in faults)
    assert any("pad_to_multiple_of: is False instead of a whole number" in each for each in faults)


def test_the_error_counts_and_names_the_file(tmp_path):
    path = tmp_path / "merge.yml"
    path.write_text("merge_method: linear\nmodels: [{model: org/a, weight: 1, layer_range: [0, 1]}]\n")
    with pytest.raises(InputError) as caught:
        read_config(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: 2 faults: (1) ")
    assert "\n" not in message
    assert "line 2: models[0].weight: 'weight' is no key here; move it below parameters: {weight: ...}" in message


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("parameters: {wieght: 1}", "linear has no parameter 'wieght'; did you mean weight?"),
        ("parameters: {weight: much}", "parameters.weight: 'much' is not a number"),
        ("parameters: {weight: []}", "parameters.weight: is an empty list instead of a number"),
        ("parameters: {weight: [1, x]}", "parameters.weight[1]: 'x' is not a number"),
        ("parameters: {weight: .nan}", "nan is not a number"),
        ("parameters: {weight: true}", "True is not a number"),
        ("parameters: {weight: [{filter: a, value: 1}, 2]}", "weight[1]: has no value; write {filter: part"),
        ("parameters: {weight: [{filter: a}]}", "weight[0]: has no value; write {filter: part"),
        ("parameters: {weight: [{filtre: a, value: 1}]}", "'filtre' is no key here; did you mean filter?"),
        ("parameters: {weight: [{filter: 3, value: 1}]}", "3 is no part of a tensor's name"),
        ("parameters: {normalize: [0, 1]}", "normalize: is a list instead of true or false"),
        ("parameters: {normalize: yes please}", "'yes please' is not true or false"),
        ("parameters: [1]", "parameters: is no mapping of parameters"),
        ("dtype: int8", "dtype: 'int8' is not known; known: float32, bfloat16, float16"),
        ("base_model: [a]", "base_model: is no model; write path_or_repo"),
        ("base_model: '@x'", "'@x': is no model"),
        ("missing_biases: one", "missing_biases: 'one' is not known; known: refuse, zero"),
        ("slices: [{sources: [{model: org/a}]}]", "exactly one of models, slices, modules is expected"),
        ("tokenizer_source: base\ntokenizer: {source: base}", "tokenizer_source: tokenizer is there too"),
        ("tokenizer: {source: base, tokens: {x: {force: true}}}", "tokens.x: names no source; give a model"),
        ("tokenizer: {tokens: {x: {source: {kind: zeros}}}}", "'zeros' is not known; did you mean zero?"),
        ("tokenizer: {tokens: {x: {source: {kind: model_token, model: org/a}}}}", "is no token of a model; write"),
        ("tokenizer: {tokens: {x: {source: org/a, force: 1}}}", "force: is 1 instead of true or false"),
        ("tokenizer: union", "tokenizer: is 'union' instead of a mapping"),
    ],
)
def test_single_faults(line, fault):
    found = faults_of(f"merge_method: linear\nmodels: [{{model: org/a}}]\n{line}\n")
    assert any(fault in each for each in found)
    assert found[0].startswith("line 3: ") or "line 1: exactly" in found[0]


def test_a_parameter_of_the_whole_tensor_is_no_models_own():
    text = "merge_method: linear\nmodels: [{model: org/a, parameters: {normalize: false}}]\n"
    (fault,) = faults_of(text)
    assert "normalize is one for all models; move it to the parameters of the whole config" in fault


def test_ranges_of_numbers_are_checked_where_they_are_written():
    text = "merge_method: ties\nbase_model: org/base\nmodels: [{model: org/a, parameters: {weight: 1, density: 1.5}}]\n"
    (fault,) = faults_of(text)
    assert "models[0].parameters.density: 1.5 is not a number from 0 to 1" in fault


@pytest.mark.parametrize("layers", ["[0]", "[3, 1]", "[0, x]", "5", "[-1, 2]", "[1, 1]"])
def test_ranges_of_layers(layers):
    text = f"merge_method: passthrough\nslices: [{{sources: [{{model: org/a, layer_range: {layers}}}]}}]\n"
    (fault,) = faults_of(text)
    assert "layer_range: is no range of layers; write [first, last], the last one not included" in fault


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\nb: 2", "not a YAML file"),
        ("- 1\n- 2", "is no mapping of keys"),
        ("\n", "is empty"),
        ("models: 1\nmodels: 2", "line 2: models is there twice; keep one"),
        ("1: x\n2: y", "line 1: the key 1 is no text; put it in quotes"),
        ("a: &a [*a]\nb: 1", "nested too deeply"),
        ("a: !!python/object:os.system x\nb: 1", "not a YAML file"),
    ],
)
def test_no_yaml(text, message):
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        read_config(text)


def test_aliases_cannot_grow_without_end():
    levels = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 20))
    with pytest.raises(InputError, match="aliases make it too large"):
        read_config(f"a0: &a0 [1]\n{levels}\n")


def test_several_modules_are_refused():
    text = "merge_method: linear\nmodules: {text: {models: [{model: a}]}, vision: {models: [{model: b}]}}\n"
    (fault,) = faults_of(text)
    assert "2 modules (text, vision); a text model is one module" in fault


def test_no_file(tmp_path):
    with pytest.raises(InputError, match=r"no\.yml: cannot be opened: No such file"):
        read_config(tmp_path / "no.yml")


WHOLE = {
    "merge_method": "ties",
    "base_model": "org/base",
    "models": [
        {"model": "org/a", "parameters": {"weight": 1, "density": [{"filter": "mlp", "value": [0, 1]}, {"value": 1}]}},
        {"model": {"model": {"path": "org/b"}, "lora": {"path": "l"}}},
    ],
    "parameters": {"weight": 0.5, "normalize": True, "lambda": 1},
    "dtype": "float32",
    "tokenizer": {"source": "union", "tokens": {"x": {"source": {"kind": "zero"}}}, "pad_to_multiple_of": 8},
    "chat_template": "auto",
}
JUNK = (
    None,
    True,
    -1,
    2.5,
    float("nan"),
    "",
    "x",
    "{{",
    [],
    {},
    [None],
    {"model": 3},
    [[1]],
    {"value": {}},
    "2020-01-01",
)


def mutations(value):
    """The value with one thing in it replaced by junk, or one key misspelt, for all things and keys."""
    yield from JUNK
    if isinstance(value, dict):
        for key, below in value.items():
            rest = {k: v for k, v in value.items() if k != key}
            yield rest
            yield {**rest, f"{key}e": below}
            yield from ({**value, key: changed} for changed in mutations(below))
    elif isinstance(value, list):
        for i, below in enumerate(value):
            yield from ([*value[:i], changed, *value[i + 1 :]] for changed in mutations(below))


def test_whatever_is_wrong_is_said_in_a_line():
    said = []
    for changed in random.Random(8).sample(list(mutations(WHOLE)), 150):
        try:
            read_config(json.dumps(changed) + "\n")
        except InputError as error:
            said.append(str(error))
    assert len(said) > 75
    assert not any("\n" in message for message in said)
    assert read_config(json.dumps(WHOLE)).method == "ties"
