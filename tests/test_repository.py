"""What a clone promises: two commands in the README's first screen, declared floors, a model, no stray paths."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from safetensors import safe_open

REPOSITORY = Path(__file__).parents[1]
FABLE = REPOSITORY / "models" / "fable-9m"
MEGABYTE = 1_000_000


def tracked_files() -> list[Path]:
    """What git tracks; skips where this is no checkout."""
    if shutil.which("git") is None or not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=True)
    files = [REPOSITORY / name for name in listed.stdout.decode().split("\0") if name]
    return [file for file in files if file.is_file()]


def project() -> dict:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_first_screen_of_the_readme_shows_both_commands() -> None:
    """`make run` and `make test` stand in the first 40 lines."""
    first_screen = "\n".join((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()[:40])
    assert "make run" in first_screen
    assert "make test" in first_screen


def test_the_makefile_has_what_the_readme_shows() -> None:
    """run, test and lint are targets; test includes lint, and CI runs test."""
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = dict(re.findall(r"^(\w+):(?!=)(.*)$", makefile, flags=re.MULTILINE))
    assert {"run", "test", "lint"} <= set(targets)
    assert "lint" in targets["test"]
    assert "make test" in (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")


def test_the_readme_shows_what_each_format_costs() -> None:
    """Size, perplexity and KL divergence at fp16, Q8_0, Q5_1, Q4_1 and Q4_0: no row is missing, no blank unfilled."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    rows = [line.lower() for line in readme.splitlines() if re.search(r"\d\.\d", line)]
    for name in ("fp16|float16", "q8_0", "q5_1", "q4_1", "q4_0"):
        assert any(re.search(name, row) for row in rows), f"no numbers for {name}"
    for word in ("size", "perplexity", "KL divergence"):
        assert word.lower() in readme.lower()
    assert "{{" not in readme
    assert "TODO" not in readme


def test_links_in_the_readme_lead_somewhere() -> None:
    """Every relative link is a file of the repository."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", readme)
    assert [target for target in targets if not (REPOSITORY / target).exists()] == []


def test_floors_are_declared() -> None:
    """Python 3.11, transformers 5.20 below 6, torch and the other libraries without pins."""
    metadata = project()["project"]
    assert metadata["requires-python"] == ">=3.11"
    assert "transformers>=5.20,<6" in metadata["dependencies"]
    assert not [dependency for dependency in metadata["dependencies"] if "==" in dependency]
    assert metadata["scripts"] == {"quantlab": "quantlab.cli:main"}


def test_pins_can_be_had_on_the_oldest_python() -> None:
    """Every package of constraints.txt that is installed here runs on 3.11.0: Debian 12 has 3.11.2."""
    text = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
    pins = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", text, flags=re.MULTILINE)
    wanted = {}
    for name, version in pins:
        try:
            found = importlib.metadata.metadata(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if found["Version"].partition("+")[0] == version:
            wanted[name] = found["Requires-Python"] or ""
    assert len(wanted) > len(pins) / 2
    assert {name: needs for name, needs in wanted.items() if not SpecifierSet(needs).contains("3.11.0")} == {}


def test_no_tracked_file_points_outside_the_repository() -> None:
    """A clone stands alone: no text names a folder beside it."""
    strangers = ["../" + "shared", "/" + "work/"]  # put together here, or this file would name them itself
    found = []
    for file in tracked_files():
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{file.relative_to(REPOSITORY)}: {word}" for word in strangers if word in text]
    assert found == []


def test_no_build_output_is_tracked() -> None:
    """Compiled modules, caches and environments are made, not kept."""
    suffixes = {".so", ".pyc", ".o", ".whl"}
    assert [file for file in tracked_files() if file.suffix in suffixes or "__pycache__" in file.parts] == []


def test_tests_and_benchmarks_have_names_of_their_own() -> None:
    """pytest imports them by these, whatever folder they lie in."""
    files = [file for folder in ("tests", "benchmarks") for file in (REPOSITORY / folder).rglob("*.py")]
    names = [file.name for file in files if file.name not in ("__init__.py", "conftest.py")]
    assert sorted(names) == sorted(set(names))


def test_every_folder_has_a_purpose() -> None:
    """The fixed top level, and beside it only what a Python repository needs."""
    needed = {"cli", "models", "quantlab", "tests"}
    allowed = needed | {".ci", ".github", "benchmarks", "docs"}
    folders = {file.relative_to(REPOSITORY).parts[0] for file in tracked_files() if file.parent != REPOSITORY}
    assert needed <= folders <= allowed


def test_shipped_weights_are_small() -> None:
    """Every model folder holds at most 20 MB of weights."""
    for folder in {file.parent for file in (REPOSITORY / "models").glob("*/*.safetensors")}:
        assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) <= 20 * MEGABYTE, folder.name


def test_the_shipped_model_is_there() -> None:
    """models/fable-9m: config, weights, tokenizer in all its files, loss log, and a card."""
    names = {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer.model",
        "tokenizer_config.json", "training_log.json",
    }  # fmt: skip
    assert names <= {file.name for file in FABLE.iterdir()}


def test_the_shipped_model_is_what_its_recipe_makes() -> None:
    """Shape and vocabulary of config.json are the recipe's; the weights are 8.9 M half-precision numbers."""
    recipe = yaml.safe_load((REPOSITORY / "models" / "recipes" / "fable-9m.yaml").read_text(encoding="utf-8"))
    config = json.loads((FABLE / "config.json").read_text(encoding="utf-8"))
    assert {name: config.get(name) for name in recipe["model"]} == recipe["model"]
    assert config["vocab_size"] == recipe["vocabulary"]["size"] == 4096
    with safe_open(FABLE / "model.safetensors", framework="np") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 it is no dict
    assert {str(tensor.dtype) for tensor in tensors} == {"float16"}
    assert round(sum(tensor.size for tensor in tensors) / 1e6, 1) == 8.9


def test_the_card_tells_data_recipe_and_results() -> None:
    """Where the text came from and under which licences, how the model was made, how good it is on held-out text."""
    card = (FABLE / "README.md").read_text(encoding="utf-8")
    for word in ("licen[cs]e", "public domain", r"CC.BY", r"fable-9m\.yaml", "quantlab pretrain", "held.out", "nats"):
        assert re.search(word, card, flags=re.IGNORECASE), word
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", card)
    assert pictures, "no loss curve"
    for picture in pictures:
        assert (FABLE / picture).is_file()


def test_the_held_out_loss_in_the_card_is_the_logged_one() -> None:
    """The last evaluation of training_log.json, which is that of the test text, stands in the card."""
    log = json.loads((FABLE / "training_log.json").read_text(encoding="utf-8"))
    last = [entry["eval_loss"] for entry in log if "eval_loss" in entry][-1]
    assert f"{last:.2f}" in (FABLE / "README.md").read_text(encoding="utf-8")
