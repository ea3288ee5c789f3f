"""Configs as people write them for mergekit, planned over tiny models in the places of the published ones."""

import pytest
from merge_models import LAYERS, by_name, llama, planned

QUERY, DOWN, NORM = (
    "model.layers.{}.self_attn.q_proj.weight",
    "model.layers.{}.mlp.down_proj.weight",
    "model.layers.{}.input_layernorm.weight",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: llama(root / name, seed=i) for i, name in enumerate(("BASE", "MATH", "CODE", "CHAT"))}


def plan_of(text, folders):
    for name, folder in folders.items():
        text = text.replace(name, str(folder))
    return by_name(planned(text))


def test_slerp_with_gradients_by_kind(folders):
    tensors = plan_of(
        """
slices:
  - sources:
      - model: BASE
        layer_range: [0, 4]
      - model: CHAT
        layer_range: [0, 4]
merge_method: slerp
base_model: BASE
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
dtype: bfloat16
""",
        folders,
    )
    assert [tensors[QUERY.format(i)].parameters["t"] for i in range(LAYERS)] == pytest.approx(
        [0, 0.5 - 0.2 / 3, 0.3 + 0.4 * 2 / 3, 1]
    )
    assert tensors[DOWN.format(0)].parameters["t"] == 1
    assert tensors[NORM.format(2)].parameters["t"] == 0.5
    assert [part.model.model for part in tensors[NORM.format(2)].parts] == [
        str(folders["BASE"]),
        str(folders["CHAT"]),
    ]
    assert tensors[NORM.format(2)].dtype == "BF16"


def test_dare_ties(folders):
    tensors = plan_of(
        """
models:
  - model: BASE
    # No parameters necessary for base model
  - model: MATH
    parameters:
      density: 0.53
      weight: 0.4
  - model: CODE
    parameters:
      density: 0.53
      weight: 0.3
merge_method: dare_ties
base_model: BASE
parameters:
  int8_mask: true
dtype: bfloat16
""",
        folders,
    )
    tensor = tensors[DOWN.format(1)]
    assert tensor.base.model.model == str(folders["BASE"])
    assert tensor.parameters["weight"] == (0.4, 0.3)
    assert tensor.parameters["density"] == (0.53, 0.53)


def test_ties_with_gradients(folders):
    tensors = plan_of(
        """
models:
  - model: MATH
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: CODE
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: CHAT
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: BASE
parameters:
  normalize: true
  int8_mask: true
dtype: float16
""",
        folders,
    )
    assert tensors[DOWN.format(2)].parameters["weight"] == (1.0, 0.7, 0.5)
    assert tensors[QUERY.format(2)].parameters["weight"] == (1.0, 0.7, 0.0)
    assert tensors[QUERY.format(3)].parameters["density"] == pytest.approx((0.1, 0.5, 0.33))
    assert tensors[QUERY.format(0)].parameters["normalize"] is True


def test_stacked_layers(folders):
    tensors = plan_of(
        """
slices:
  - sources:
    - model: MATH
      layer_range: [0, 3]
  - sources:
    - model: CODE
      layer_range: [1, 4]
merge_method: passthrough
dtype: float16
""",
        folders,
    )
    layers = [tensors[QUERY.format(i)].parts[0] for i in range(6)]
    assert [part.model.model for part in layers] == [str(folders["MATH"])] * 3 + [str(folders["CODE"])] * 3
    assert [part.name for part in layers] == [QUERY.format(i) for i in (0, 1, 2, 1, 2, 3)]


def test_stacked_layers_with_scaled_outputs(folders):
    tensors = plan_of(
        """
slices:
  - sources: [{model: MATH, layer_range: [0, 2]}]
  - sources:
    - model: MATH
      layer_range: [1, 3]
      parameters:
        scale:
          - {filter: o_proj, value: 0.0}
          - {filter: down_proj, value: 0.0}
          - {value: 1.0}
merge_method: passthrough
""",
        folders,
    )
    assert [tensors[DOWN.format(i)].parameters["scale"] for i in range(4)] == [(1.0,), (1.0,), (0.0,), (0.0,)]
    assert tensors[QUERY.format(3)].parameters["scale"] == (1.0,)


def test_model_stock(folders):
    tensors = plan_of(
        """
models:
  - model: MATH
  - model: CODE
  - model: CHAT
merge_method: model_stock
base_model: BASE
parameters: {filter_wise: false}
dtype: bfloat16
""",
        folders,
    )
    assert len(tensors[QUERY.format(0)].parts) == 3
    assert tensors[QUERY.format(0)].parameters["filter_wise"] is False


def test_methods_with_epsilon_and_gamma(folders):
    for method, words in (("della", "epsilon: 0.1"), ("breadcrumbs_ties", "gamma: 0.01")):
        tensors = plan_of(
            f"""
models:
  - model: MATH
    parameters: {{weight: 0.5, density: 0.6, {words}}}
  - model: CODE
    parameters: {{weight: 0.5, density: 0.6, {words}}}
merge_method: {method}
base_model: BASE
parameters: {{lambda: 1.1}}
tokenizer_source: union
""",
            folders,
        )
        name, value = words.split(": ")
        assert tensors[QUERY.format(1)].parameters[name] == (float(value),) * 2
        assert tensors[QUERY.format(1)].parameters["lambda"] == 1.1


def test_nuslerp_with_and_without_a_base(folders):
    text = """
models:
  - {model: MATH, parameters: {weight: 0.3}}
  - {model: CODE, parameters: {weight: 0.7}}
merge_method: nuslerp
"""
    assert plan_of(text, folders)[QUERY.format(0)].base is None
    tensor = plan_of(f"{text}base_model: BASE\n", folders)[QUERY.format(0)]
    assert tensor.base.model.model == str(folders["BASE"])
    assert tensor.parameters["weight"] == (0.3, 0.7)
