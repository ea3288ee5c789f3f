"""Whole searches on tiny models: what they find, what they write, and how they go on."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import yaml
from evolve_cases import OPTIMUM, genome, nearness, write_config, write_family, write_texts
from safetensors.torch import load_file

from quantlab.errors import InputError
from quantlab.evaluation.perplexity import perplexity
from quantlab.merging.merge import merge_checkpoints
from quantlab.search.evolve import evolve
from quantlab.search.evolve_config import EvolveConfig, Genome
from quantlab.search.fitness import Term
from quantlab.search.workshop import Workshop


@pytest.fixture(scope="module")
def models(llama_model, tmp_path_factory) -> dict[str, Path]:
    return write_family(llama_model, tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def texts(prose, tmp_path_factory) -> tuple[Path, Path]:
    return write_texts(prose, tmp_path_factory.mktemp("texts"))


def near(models: dict[str, Path], **changes: object) -> EvolveConfig:
    """A search for the target's weights, without a text."""
    names = str(models["a"]), str(models["b"])
    term = Term("call", "test:nearness", function=lambda model: nearness(model, models["target"]))
    settings = {"base": str(models["base"]), "method": "task_arithmetic", **changes}
    return EvolveConfig(Genome(names, **settings), (term,))


def values_of(out: Path) -> list[dict[str, float]]:
    return [trial["values"] for trial in json.loads((out / "evolution.json").read_text())["trials"]]


def test_weights_of_a_merge_by_held_out_loss(models, texts, tmp_path):
    """The score is what perplexity says of OUT, OUT is the merge of its config, and the untuned merge is no better."""
    out, (fitness, test) = tmp_path / "out", texts
    content = {"genome": genome(models), "fitness": [{"loss": str(fitness), "context": 32}]}
    config = write_config(tmp_path / "evolve.yml", **content, test=[{"loss": str(test), "context": 32}])
    found = evolve(config, out, trials=6)
    assert (found.trials, found.failed, found.space, found.layers) == (6, 0, "parameters", 2)
    measured = perplexity(out, fitness, context=32)
    assert (found.best_score, found.best_stderr) == (-measured.nll, measured.stderr)
    names = [str(models[name]) for name in ("base", "a", "b")]
    assert list(found.baseline_scores) == [*names, "untuned"]
    assert found.baseline_scores[names[1]] == -perplexity(names[1], fitness, context=32).nll
    assert found.best_score >= found.baseline_scores["untuned"]
    judged = perplexity(out, test, context=32)
    assert (found.test_scores["best"].score, found.test_scores["best"].stderr) == (-judged.nll, judged.stderr)
    assert list(found.test_scores) == ["best", *found.baseline_scores]
    merge_checkpoints(Path(found.config), tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert [file.name for file in (tmp_path / "out.evolve").iterdir() if file.is_dir()] == []


def test_cma_es_comes_near_the_optimum(models, tmp_path):
    found = evolve(near(models), tmp_path / "out", trials=40)
    merged = yaml.safe_load(Path(found.config).read_text())
    weights = [model["parameters"]["weight"] for model in merged["models"]]
    assert weights == pytest.approx(OPTIMUM, abs=0.1)
    assert found.best_score > 0.3 * found.baseline_scores["untuned"]  # both are below 0


def test_a_search_goes_on_where_it_stopped(models, tmp_path, monkeypatch):
    """Interrupted in the middle of a trial, it draws what the uninterrupted one draws, and counts no trial twice."""
    straight = evolve(near(models), tmp_path / "straight", trials=12)
    calls = 0
    candidate = Workshop.candidate

    def interrupted(self, config, name):
        nonlocal calls
        calls += name.startswith("candidate")
        if calls == 5:
            raise KeyboardInterrupt
        return candidate(self, config, name)

    monkeypatch.setattr(Workshop, "candidate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evolve(near(models), tmp_path / "out", trials=12)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    resumed = evolve(near(models), tmp_path / "out", trials=12)
    assert resumed.trials == straight.trials == 12
    assert any("4 trials were there already" in note for note in resumed.notes)
    assert values_of(tmp_path / "out")[:4] == values_of(tmp_path / "straight")[:4]
    before = values_of(tmp_path / "straight")
    more = evolve(near(models), tmp_path / "straight", trials=14, overwrite=True)
    assert more.trials == 14
    assert values_of(tmp_path / "straight")[:12] == before


def test_layer_groups_have_weights_of_their_own(models, tmp_path):
    found = evolve(near(models, group=1), tmp_path / "out", trials=2)
    merged = yaml.safe_load(Path(found.config).read_text())
    assert [piece["sources"][1]["layer_range"] for piece in merged["slices"]] == [[0, 1], [1, 2]]
    assert len(values_of(tmp_path / "out")[1]) == 4
    assert len(set(values_of(tmp_path / "out")[1].values())) == 4


@pytest.mark.parametrize(
    ("order", "stack"),
    [  # all layers of both once, and the first's last
        ("passes", (("a", 0, 2), ("b", 0, 2), ("a", 1, 2))),
        ("depth", (("a", 0, 1), ("b", 0, 1), ("a", 1, 2), ("b", 1, 2), ("a", 1, 2))),
    ],
)
def test_paths_through_layers(order, stack, models, texts, tmp_path):
    """The first candidate is the first model as it is; what is written scores what the search says."""
    out, (fitness, _) = tmp_path / "out", texts
    terms = [{"loss": str(fitness), "context": 32}]
    layers = genome(models, space="layers", order=order, merge_method=None, base_model=None, start=0.0)
    found = evolve(write_config(tmp_path / "evolve.yml", genome=layers, fitness=terms), out, trials=4)
    first = found.baseline_scores[str(models["a"])]
    history = json.loads((out / "evolution.json").read_text())
    assert history["trials"][0]["score"] == first
    assert found.best_score >= first
    assert found.best_score == -perplexity(out, fitness, context=32).nll
    slices = [{"sources": [{"model": str(models[name]), "layer_range": [begin, end]}]} for name, begin, end in stack]
    write_config(tmp_path / "stack.yml", merge_method="passthrough", slices=slices)
    merge_checkpoints(tmp_path / "stack.yml", tmp_path / "stack")
    assert found.baseline_scores["untuned"] == -perplexity(tmp_path / "stack", fitness, context=32).nll


def test_both_spaces(models, texts, tmp_path):
    """Paths through the best merge and a model are no worse than that merge, which stays beside them."""
    out, (fitness, test) = tmp_path / "out", texts
    content = {"genome": genome(models, space="both"), "fitness": [{"loss": str(fitness), "context": 32}]}
    config = write_config(tmp_path / "evolve.yml", **content, test=[{"loss": str(test), "context": 32}])
    found = evolve(config, out, trials=3)
    assert (found.trials, found.space) == (6, "both")
    merged = found.baseline_scores["best merge"]
    assert found.best_score >= merged >= found.baseline_scores["untuned"]
    assert merged == -perplexity(tmp_path / "out-merged", fitness, context=32).nll
    assert found.best_score == -perplexity(out, fitness, context=32).nll
    assert found.test_scores["best merge"].score == -perplexity(tmp_path / "out-merged", test, context=32).nll
    sources = [piece["sources"][0]["model"] for piece in yaml.safe_load(Path(found.config).read_text())["slices"]]
    assert sources[0] == sources[-1] == str(tmp_path / "out-merged")


def test_candidates_that_cannot_be_scored_do_not_stop_a_search(models, tmp_path):
    calls = 0

    def sometimes(model: Path) -> float:
        nonlocal calls
        calls += 1
        return float("nan") if calls % 2 else float(load_file(model / "model.safetensors")["model.norm.weight"].sum())

    config = near(models)
    config = EvolveConfig(config.genome, (Term("call", "test:sometimes", function=sometimes),))
    with pytest.raises(InputError, match="call test:sometimes gives nan"):
        evolve(config, tmp_path / "out", trials=4)  # a model of the user's own: no search is worth beginning
    calls = 101  # the next four: base, a, b, untuned

    def later(model: Path) -> float:
        nonlocal calls
        calls += 1
        return 1.0 if calls < 106 or calls % 2 else float("nan")

    found = evolve(
        EvolveConfig(config.genome, (Term("call", "test:later", function=later),)), tmp_path / "out", trials=4
    )
    assert (found.trials, found.failed, found.best_score) == (4, 2, 1.0)


def test_a_search_without_hope_ends(models, tmp_path):
    calls = 0

    def never(model: Path) -> float:
        nonlocal calls
        calls += 1
        return 1.0 if calls <= 4 else float("inf")

    config = EvolveConfig(near(models).genome, (Term("call", "test:never", function=never),))
    with pytest.raises(InputError, match=r"no candidate could be scored: .*call test:never gives inf"):
        evolve(config, tmp_path / "out", trials=50)
    assert calls == 4 + 10
    assert not (tmp_path / "out").exists()


def test_what_is_refused_at_once(models, tmp_path):
    config = near(models)
    with pytest.raises(InputError, match="--trials 0"):
        evolve(config, tmp_path / "out", trials=0)
    with pytest.raises(InputError, match="--sampler grid: choose one of: cmaes, tpe, random"):
        evolve(config, tmp_path / "out", sampler="grid")
    with pytest.raises(InputError, match="writes a folder"):
        evolve(config, tmp_path / "out.gguf")
    with pytest.raises(InputError, match="exists already"):
        evolve(config, models["a"])
    with pytest.raises(InputError, match="--storage mysqlite:///x: cannot be opened"):
        evolve(config, tmp_path / "out", storage="mysqlite:///x")
    assert sorted(file.name for file in tmp_path.iterdir()) == []


def test_warnings_come_once_a_model(models, tmp_path, caplog):
    """Of the base, both models and the untuned merge; not of every candidate."""

    def warning(model: Path) -> float:
        logging.getLogger("quantlab.generation").warning("of %s", model.name)
        return 1.0

    config = EvolveConfig(near(models).genome, (Term("call", "test:warning", function=warning),))
    evolve(config, tmp_path / "out", trials=3)
    assert len(caplog.records) == 4
    logging.getLogger("quantlab.generation").warning("afterwards")
    assert caplog.records[-1].message == "afterwards"
