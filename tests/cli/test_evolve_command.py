"""`quantlab evolve`: what it prints, workers that share a search, and what it refuses in one line."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml
from command_processes import PATIENCE, QUANTLAB, environment, heed_ctrl_c
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def tuned(llama_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The tiny Llama, and two models that were made of it."""
    root = tmp_path_factory.mktemp("tuned")
    for seed, name in enumerate("ab"):
        shutil.copytree(llama_model, root / name)
        generator = torch.Generator().manual_seed(seed)
        tensors = load_file(llama_model / "model.safetensors")
        moved = {name: each + 0.05 * torch.randn(each.shape, generator=generator) for name, each in tensors.items()}
        save_file(moved, root / name / "model.safetensors", {"format": "pt"})
    return llama_model, root / "a", root / "b"


@pytest.fixture
def config(tuned: tuple[Path, Path, Path], text: Path, tmp_path: Path) -> Path:
    base, *models = map(str, tuned)
    lines = [line for line in text.read_text(encoding="utf-8").splitlines() if len(line) > 40]
    for name, chosen in (("fitness", lines[:4]), ("test", lines[4:8])):
        (tmp_path / f"{name}.txt").write_text("\n".join(chosen), encoding="utf-8")
    content = {
        "genome": {"models": models, "base_model": base, "merge_method": "task_arithmetic"},
        "fitness": [{"loss": str(tmp_path / "fitness.txt"), "context": 32}],
        "test": [{"loss": str(tmp_path / "test.txt"), "context": 32}],
    }
    file = tmp_path / "evolve.yml"
    file.write_text(yaml.safe_dump(content))
    return file


def changed(config: Path, **changes: object) -> Path:
    """The config with other values; a name with a dot is of the genome."""
    content = yaml.safe_load(config.read_text())
    for key, value in changes.items():
        (content["genome"] if key in ("space", "merge_method", "models") else content)[key] = value
    config.write_text(yaml.safe_dump(content))
    return config


def test_the_json_object(run, config, tuned, tmp_path):
    found = run("evolve", config, tmp_path / "out", "--trials", 3, "--json").json
    assert {"best_score", "baseline_scores", "trials", "config"} <= found.keys()
    assert list(found["baseline_scores"]) == [*map(str, tuned), "untuned"]
    assert found["best_score"] >= found["baseline_scores"]["untuned"]
    assert (found["trials"], found["failed"], found["config"]) == (3, 0, str(tmp_path / "out" / "merge_config.yml"))
    assert set(found["test_scores"]) == {"best", *found["baseline_scores"]}
    measured = run("perplexity", tmp_path / "out", tmp_path / "fitness.txt", "--context", 32, "--json").json
    assert found["best_score"] == -measured["nll"]
    assert run("merge", found["config"], tmp_path / "again").status == 0
    history = json.loads((tmp_path / "out" / "evolution.json").read_text())
    assert max(trial["score"] for trial in history["trials"]) == found["best_score"]


def test_what_is_printed(run, config, tmp_path):
    outcome = run("evolve", config, tmp_path / "out", "--trials", 2, "--sampler", "random", "-t", 1)
    assert outcome.status == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[0].split() == ["fitness", "test"]
    assert [line.split()[0] for line in lines[1:6]] == ["best", *[line.split()[0] for line in lines[2:5]], "untuned"]
    assert " +- " in lines[1]
    assert any(line.startswith("2 trials, ") and line.endswith("higher scores are better") for line in lines)
    assert lines[-1].startswith(f"written: {tmp_path / 'out'} (2 layers; merge config: ")


def worker(config: Path, out: Path, *arguments: object) -> subprocess.Popen[str]:
    command = [*QUANTLAB, "evolve", *map(str, (config, out, *arguments))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=environment(), preexec_fn=heed_ctrl_c, **pipes)


@pytest.mark.parametrize("storage", [None, "sqlite"])
def test_two_workers_of_one_search(storage, config, tmp_path):
    """The same command twice at the same time: they share the trials, and find the same."""
    out = tmp_path / "out"
    options = [] if storage is None else ["--storage", f"sqlite:///{tmp_path / 'study.db'}"]
    workers = [worker(config, out, "--trials", 16, "--json", *options) for _ in range(2)]
    ends = [each.communicate(timeout=3 * PATIENCE) for each in workers]
    assert [each.returncode for each in workers] == [0, 0], ends
    found = [json.loads(end) for end, _ in ends]
    history = json.loads((out / "evolution.json").read_text())
    numbers = [trial["number"] for trial in history["trials"]]
    assert sorted(set(numbers)) == numbers
    assert 16 <= len(numbers) <= 17  # both may ask for the last one at the same moment
    notes = [each.pop("notes") for each in found]
    assert sum("another process of this search has written it" in each for each in notes) == 1
    assert len({each.pop("seconds") for each in found}) == 2
    assert found[0] == found[1]


def test_ctrl_c_and_the_same_command_again(run, config, tmp_path):
    out = tmp_path / "out"
    process = worker(config, out, "--trials", 500)
    journal = tmp_path / "out.evolve" / "study.journal"
    end = time.monotonic() + PATIENCE
    while not (journal.is_file() and journal.read_text().count('"worker"') >= 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, error = process.communicate(timeout=PATIENCE)
    assert (process.returncode, said) == (130, "")
    assert "finished trials are kept: the same command goes on from there" in error
    assert not out.exists()
    assert [path.name for path in journal.parent.iterdir()] == ["study.journal"]
    found = run("evolve", config, out, "--trials", 4, "--json").json
    assert found["trials"] >= 4
    assert any("trials were there already" in note for note in found["notes"])


OUT = "{tmp}/out"
WRONG = {
    "no config": (["{tmp}/absent.yml", OUT], {}, "absent.yml: cannot be opened"),
    "no trial": (["{config}", OUT, "--trials", "0"], {}, "--trials 0: at least 1 is needed"),
    "a sampler": (["{config}", OUT, "--sampler", "grid"], {}, "--sampler grid: choose one of: cmaes, tpe, random"),
    "what is there": (["{config}", "{config}"], {}, "exists already; choose another name or pass --overwrite"),
    "a GGUF file": (["{config}", "{tmp}/out.gguf"], {}, "a search writes a folder"),
    "a method": (["{config}", OUT], {"merge_method": "tie"}, "'tie' is not known; did you mean ties"),
    "a model": (["{config}", OUT], {"models": ["{tmp}/absent"]}, "absent"),
    "a file": (["{config}", OUT], {"fitness": {"loss": "absent.txt"}}, "absent.txt: cannot be read"),
    "the same text": (["{config}", OUT], {"test": {"loss": "{tmp}/fitness.txt"}}, "of its rows are in"),
    "code": (["{config}", OUT], {"fitness": {"call": "os:getpid"}}, "runs code; allow it with --trust-code"),
    "a storage": (["{config}", OUT, "--storage", "nosql://x"], {}, "--storage nosql://x: cannot be opened"),
    "little memory": (["{config}", OUT, "--max-ram", "1MB"], {}, "--max-ram 0.01GB: task_arithmetic needs"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests_are_one_line(case, refusal, config, tmp_path):
    arguments, changes, expected = WRONG[case]
    changed(config, **json.loads(json.dumps(changes).replace("{tmp}", str(tmp_path))))
    before = sorted(tmp_path.rglob("*"))
    said = refusal("evolve", *[argument.format(tmp=tmp_path, config=config) for argument in arguments])
    assert expected in said
    assert sorted(tmp_path.rglob("*")) == before


def test_a_function_of_ones_own(run, config, tmp_path):
    (tmp_path / "scoring.py").write_text("def files(model):\n    return len(list(model.iterdir()))\n")
    changed(config, fitness={"call": f"{tmp_path / 'scoring.py'}:files"})
    found = run("evolve", config, tmp_path / "out", "--trials", 2, "--trust-code", "--json").json
    assert found["best_score"] == len(list((tmp_path / "out").iterdir())) - 1  # without the history
    assert found["best_stderr"] is None
