"""From genes to merge configs and paths, worked by hand; and what a search's config must not say."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from evolve_cases import write_config

from quantlab.errors import InputError
from quantlab.merging.config import read_config
from quantlab.merging.layer_path import Slot
from quantlab.search.evolve_config import Genome, read_evolve_config
from quantlab.search.fitness import Term
from quantlab.search.genome import Gene, ParameterSpace, PathSpace, open_models


@pytest.fixture(scope="module")
def opened(make_model, tmp_path_factory):
    """Two models of three layers, a and b."""
    root = tmp_path_factory.mktemp("models")
    folders = [make_model(root / name, "llama", num_hidden_layers=3, seed=seed) for seed, name in enumerate("ab")]
    return list(open_models([str(folder) for folder in folders]).values())


def genome(opened, **changes: object) -> Genome:
    return Genome(tuple(model.name for model in opened), **{"base": "base", "method": "ties", **changes})


def test_weights_and_densities_per_model(opened):
    space = ParameterSpace(genome(opened, fixed={"lambda": 0.9}, settings={"dtype": "bfloat16"}), opened)
    names = ("weight[0]", "weight[1]", "density[0]", "density[1]")
    assert space.genes == tuple(Gene(name, 0.0, 1.0) for name in names)
    assert space.start == dict.fromkeys(names, 0.5)
    a, b = (model.name for model in opened)
    config = space.config({"weight[0]": 0.1, "weight[1]": 0.2, "density[0]": 0.3, "density[1]": 0.4})
    assert yaml.safe_load(config) == {
        "merge_method": "ties",
        "base_model": "base",
        "dtype": "bfloat16",
        "models": [
            {"model": a, "parameters": {"weight": 0.1, "density": 0.3}},
            {"model": b, "parameters": {"weight": 0.2, "density": 0.4}},
        ],
        "parameters": {"lambda": 0.9},
    }
    assert read_config(config).method == "ties"


def test_groups_of_layers(opened):
    """Two layers, then the one that is left; a parameter that is one for all models belongs to the slice."""
    settings = {"method": "task_arithmetic", "group": 2, "ranges": {"lambda": (0.0, 2.0)}}
    space = ParameterSpace(genome(opened, **settings), opened)
    names = ("weight[0]", "weight[1]", "lambda", "weight[0].1", "weight[1].1", "lambda.1")
    assert [gene.name for gene in space.genes] == list(names)
    a, b = (model.name for model in opened)
    found = yaml.safe_load(space.config(dict(zip(names, range(6), strict=True))))
    assert found["slices"][1] == {
        "sources": [
            {"model": a, "layer_range": [2, 3], "parameters": {"weight": 3}},
            {"model": b, "layer_range": [2, 3], "parameters": {"weight": 4}},
        ],
        "parameters": {"lambda": 5},
    }
    assert found["slices"][0]["sources"][0]["layer_range"] == [0, 2]
    assert "models" not in found


def test_what_a_method_has_is_searched(opened):
    for method, names in (("slerp", ["t"]), ("linear", ["weight[0]", "weight[1]"])):
        space = ParameterSpace(genome(opened, method=method), opened)
        assert [gene.name for gene in space.genes] == names
    with pytest.raises(InputError, match=r"model_stock: has none of weight, density, t; name its genome.ranges"):
        ParameterSpace(genome(opened, method="model_stock"), opened)
    with pytest.raises(InputError, match=r"genome.merge_method 'tie' is not known; did you mean ties"):
        ParameterSpace(genome(opened, method="tie"), opened)
    with pytest.raises(InputError, match="ties has no parameter 'densty' to search; did you mean density"):
        ParameterSpace(genome(opened, ranges={"densty": (0, 1)}), opened)
    with pytest.raises(InputError, match=r"'weight' to search; is among genome.parameters"):
        ParameterSpace(genome(opened, ranges={"weight": (0, 1)}, fixed={"weight": 1}), opened)


def paths(opened, **changes: object) -> PathSpace:
    return PathSpace(genome(opened, space="layers", **changes), opened)


def test_a_path_begins_as_the_first_model(opened):
    """Slots: a's three layers, b's three, and both once more; the first one has no gene."""
    space = paths(opened, order="passes", repetitions=2)
    a, b = (model.name for model in opened)
    slots = [gene for gene in space.genes if gene.name.startswith("slot.")]
    assert [gene.middle for gene in slots] == [2.0] * 2 + [-1.5] * 9
    assert {gene.high - gene.low for gene in slots} == {6.0}  # a sixth of it is 1
    assert space.path(space.start) == tuple(Slot(a, layer) for layer in range(3))
    assert space.path(space.plain) == (*(Slot(m, layer) for m in (a, b) for layer in range(3)), Slot(a, 2))


def test_by_depth_a_repeated_and_a_replaced_layer_are_one_step_away(opened):
    """Slots: a0 b0 a0 b0 a1 b1 a1 b1 a2 b2 a2 b2."""
    space = paths(opened, repetitions=2)
    a, b = (model.name for model in opened)
    middles = {gene.name: gene.middle for gene in space.genes if gene.name.startswith("slot.")}
    assert [middles[f"slot.{at}"] for at in range(1, 12)] == [-1.5] * 3 + [2.0] + [-1.5] * 3 + [2.0] + [-1.5] * 3
    first = tuple(Slot(a, layer) for layer in range(3))
    assert space.path(space.start) == first
    assert space.path({**space.start, "slot.6": 0.1}) == (*first[:2], Slot(a, 1), first[2])
    replaced = {**space.start, "slot.4": -0.1, "slot.5": 0.1, "scale.0:0-1:1": 0.75, "scale.1:1-0:2": 1.25}
    assert space.path(replaced) == (first[0], Slot(b, 1, 0.75), Slot(a, 2, 1.25))
    stacked = [Slot(name, layer) for layer in range(3) for name in (a, b)]
    assert space.path(space.plain) == (*stacked, Slot(a, 2))


def test_scales_stand_between_layers_that_are_no_neighbours(opened):
    """a0 b0 b1 a2: W of a0 before b0, none of b0 before b1, W of b1 before a2, which closes the path."""
    space = paths(opened, order="passes", repetitions=1)
    a, b = (model.name for model in opened)
    values = dict.fromkeys((gene.name for gene in space.genes), -1.0)
    values |= {"slot.3": 0.1, "slot.4": 0.1, "scale.0:0-1:0": 0.75, "scale.1:1-0:2": 1.25}
    assert space.path(values) == (Slot(a, 0), Slot(b, 0, 0.75), Slot(b, 1), Slot(a, 2, 1.25))
    pairs = [gene for gene in space.genes if gene.name.startswith("scale.")]
    assert len(pairs) == 36 - 4
    assert {(gene.low, gene.high) for gene in pairs} == {(0.5, 1.5)}
    unscaled = paths(opened, order="passes", repetitions=1, scaling="none")
    assert [slot.scale for slot in unscaled.path(values)] == [1.0] * 4
    assert len(unscaled.genes) == 5
    by_place = paths(opened, order="passes", repetitions=1, scaling="slots")
    assert len(by_place.genes) == 5 + 6
    values |= {"scale.3": 0.6, "scale.4": 9.0, "scale.6": 0.7}
    assert [slot.scale for slot in by_place.path(values)] == [1.0, 0.6, 1.0, 0.7]
    assert yaml.safe_load(space.config(values))["dtype"] == "float32"


def test_post_norms_are_refused(make_model, tmp_path):
    folder = make_model(tmp_path / "gemma", "gemma2")
    with pytest.raises(InputError, match="gemma2: its layers have norms behind attention and MLP"):
        PathSpace(Genome((str(folder),), space="layers"), list(open_models([str(folder)]).values()))


# ---- the config


def read(tmp_path: Path, **content: object):
    return read_evolve_config(write_config(tmp_path / "evolve.yml", **content))


def test_a_config_is_read(tmp_path):
    found = read(
        tmp_path,
        genome={
            "models": ["a", "b"], "base_model": "c", "merge_method": "dare_ties", "layer_granularity": 4,
            "normalize": False, "parameters": {"rescale": True}, "ranges": {"density": [0.2, 0.9]},
            "allow_negative_weights": True, "dtype": "bfloat16", "tokenizer": {"source": "union"},
        },
        fitness={"loss": "x.txt", "context": 64},
        test=[{"task": "y.jsonl", "limit": 5, "weight": 2, "max_tokens": 9}, {"call": "m:f"}],
    )  # fmt: skip
    assert found.genome == Genome(
        models=("a", "b"),
        base="c",
        method="dare_ties",
        group=4,
        fixed={"rescale": True, "normalize": False},
        ranges={"weight": (-0.5, 1.5), "density": (0.2, 0.9)},
        settings={"dtype": "bfloat16", "tokenizer": {"source": "union"}},
    )
    assert found.fitness == (Term("loss", "x.txt", context=64),)
    assert found.test == (Term("task", "y.jsonl", 2.0, limit=5, max_tokens=9), Term("call", "m:f"))


GENOME = {"models": ["a"], "merge_method": "ties"}
FITNESS = {"loss": "x"}
WRONG = {
    "nothing": ({}, "genome is missing.*fitness is missing"),
    "no models": ({"genome": {"merge_method": "ties"}, "fitness": FITNESS}, "genome.models is missing"),
    "no method": ({"genome": {"models": ["a"]}, "fitness": FITNESS}, "genome.merge_method is missing"),
    "twice": ({"genome": GENOME | {"models": ["a", "a"]}, "fitness": FITNESS}, "names a model twice"),
    "its own base": ({"genome": GENOME | {"base_model": "a"}, "fitness": FITNESS}, "base_model a is among the models"),
    "a wrong key": (
        {"genome": GENOME | {"modles": 1}, "fitness": FITNESS},
        "line 5: genome.modles: 'modles' is no key",
    ),
    "a wrong space": ({"genome": GENOME | {"space": "layer"}, "fitness": FITNESS}, "did you mean layers"),
    "a range": ({"genome": GENOME | {"ranges": {"t": [1, 0]}}, "fitness": FITNESS}, "ranges.t: is no range; write"),
    "no use": ({"genome": GENOME | {"scaling": "none"}, "fitness": FITNESS}, "no effect with space: parameters"),
    "repetitions": (
        {"genome": {"models": ["a"], "space": "layers", "repetitions": 0}, "fitness": FITNESS},
        "repetitions 0: must be from 1 to 16",
    ),
    "scales": (
        {"genome": {"models": ["a"], "space": "layers", "scaling_range": [0, 1]}, "fitness": FITNESS},
        "must be above 0",
    ),
    "an order": (
        {"genome": {"models": ["a"], "space": "layers", "order": "deep"}, "fitness": FITNESS},
        "genome.order: 'deep' is not known.*depth",
    ),
    "a partner": (
        {"genome": GENOME | {"space": "both", "partner": "z"}, "fitness": FITNESS},
        "z is none of the models",
    ),
    "two kinds": ({"genome": GENOME, "fitness": {"loss": "x", "task": "y"}}, "names loss and task to score by"),
    "no kind": ({"genome": GENOME, "fitness": [{"weight": 1}]}, "names nothing to score by"),
    "a limit of loss": ({"genome": GENOME, "fitness": FITNESS | {"limit": 3}}, "fitness.limit: has no effect on loss"),
    "no function": ({"genome": GENOME, "fitness": {"call": "module"}}, "'module' is no function"),
    "a weight": ({"genome": GENOME, "fitness": FITNESS | {"weight": "much"}}, "'much' is no number"),
    "lm-eval": ({"genome": GENOME, "fitness": FITNESS, "tasks": [1]}, "tasks: are lm-eval's"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_configs(case, tmp_path):
    content, expected = WRONG[case]
    with pytest.raises(InputError, match=expected):
        read(tmp_path, **content)


def test_all_faults_at_once(tmp_path):
    with pytest.raises(InputError, match=r"3 faults: .*colour.*lisp.*genome.models is missing"):
        read(tmp_path, genome={"merge_method": "ties", "layer_granularity": "lisp"}, fitness=FITNESS, colour=1)
