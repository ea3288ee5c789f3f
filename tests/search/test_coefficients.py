"""Groups of coefficients, and the config that they are written to."""

from __future__ import annotations

import numpy as np
import pytest
import yaml
from coefficient_models import SMALL, config_text, moved, noise

from quantlab.errors import InputError
from quantlab.merging.config import read_config
from quantlab.merging.plan import plan_merge
from quantlab.merging.sources import open_sources
from quantlab.search.coefficients import agrees, check_learnable, coefficients_of, learned_config


@pytest.fixture(scope="module")
def models(make_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    base = make_model(root / "base", "llama", tied=False, num_hidden_layers=12, **SMALL)
    return base, *(moved(base, root / f"model-{i}", noise(base, i)) for i in (1, 2))


def planned(text: str):
    config = read_config(text)
    sources = open_sources(config.references)
    return config, sources, plan_merge(config, sources)


@pytest.mark.parametrize(("grain", "groups"), [("model", 1), ("layer", 14), ("tensor", 12 * 9 + 3)])
@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
def test_a_learned_config_plans_to_what_was_learned(models, method, grain, groups):
    """Layers 1 and 11, `norm` and `post_attention_layernorm`: no filter takes another's tensor."""
    base, one, two = models
    text = "# mine\n" + config_text(method, base, {one: 0.5, two: 0.25})
    config, sources, plan = planned(text)
    coefficients = coefficients_of(config, plan, grain)
    assert coefficients.start.shape == (groups, 2)
    values = np.random.default_rng(0).uniform(-1, 2, (groups, 2)).round(6)
    made = learned_config(config, coefficients, values, "learned\nwell")
    assert agrees(plan_merge(made, sources), coefficients, values)
    assert not agrees(plan, coefficients, values)
    assert made.text.startswith("# learned\n# well\nmerge_method: ")
    assert read_config(made.text).models == made.models


def test_effective_weights_are_where_it_starts(models):
    """lambda and normalize are in the coefficients of differences; an average's are shares, and stay so."""
    base, one, two = models
    listed = config_text("task_arithmetic", base, {base: 9, one: 3, two: 1}, **{"lambda": 2, "normalize": True})
    config, _, plan = planned(listed)
    found = coefficients_of(config, plan, "model")
    assert found.start.tolist() == [[1.5, 0.5]]
    assert (found.entries, found.models, found.keeps_sum) == ((1, 2), (str(one), str(two)), False)
    made = yaml.safe_load(learned_config(config, found, found.start, "").text)
    assert made["parameters"] == {"lambda": 1.0, "normalize": False}
    assert [model["parameters"]["weight"] for model in made["models"]] == [9, 1.5, 0.5]
    config, _, plan = planned(config_text("linear", None, {one: 3, two: 1}))
    found = coefficients_of(config, plan, "model")
    assert (found.start.tolist(), found.keeps_sum) == ([[0.75, 0.25]], True)
    np.testing.assert_allclose(found.gradient(np.array([[3.0, 1.0]])), [[1, -1]])


def test_what_the_config_says_besides_stays(models):
    base, one, two = models
    text = (
        f"merge_method: task_arithmetic\nbase_model: {base}\ndtype: bfloat16\nchat_template: chatml\n"
        f"modules:\n  text:\n    models:\n    - {{model: {one}}}\n    - {{model: {two}, parameters: {{weight: 1}}}}\n"
        "parameters: {weight: 0.5}\n"
    )
    config, _, plan = planned(text)
    coefficients = coefficients_of(config, plan, "layer")
    made = learned_config(config, coefficients, coefficients.start, "")
    assert (made.dtype, made.chat_template) == ("BF16", "chatml")
    data = yaml.safe_load(made.text)
    assert list(data) == ["merge_method", "base_model", "dtype", "chat_template", "modules", "parameters"]
    assert {each["value"] for each in data["modules"]["text"]["models"][0]["parameters"]["weight"]} == {0.5}


def test_weights_by_layer_are_a_start_by_layer(models):
    base, one, _ = models
    config, _, plan = planned(config_text("task_arithmetic", base, {one: [0.0, 1.1]}))
    found = coefficients_of(config, plan, "layer")
    np.testing.assert_allclose(found.start[:, 0], [0, *np.arange(12) / 10, 1.1])
    with pytest.raises(InputError, match=r"--learn-by model: .* different weights within model; learn by layer or"):
        coefficients_of(config, plan, "model")


def test_configs_that_are_not_learned(models):
    base, one, two = models
    ties = read_config(config_text("ties", base, {one: 1, two: 1}, density=0.5))
    with pytest.raises(InputError, match="learns weights of task_arithmetic and linear; the merge config has ties"):
        check_learnable(ties, "layer")
    slices = read_config(
        f"merge_method: linear\nslices: [{{sources: [{{model: {one}, layer_range: [0, 4]}}]}}]\n"
        "parameters: {weight: 1}\n"
    )
    with pytest.raises(InputError, match="has slices, write models instead"):
        check_learnable(slices, "layer")
    linear = read_config(config_text("linear", None, {one: 1}))
    with pytest.raises(InputError, match="--learn-by block: choose one of: model, layer, tensor"):
        check_learnable(linear, "block")
    with pytest.raises(InputError, match="averages one model; there is nothing to learn"):
        coefficients_of(linear, planned(linear.text)[2], "model")
