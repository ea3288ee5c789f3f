"""A pretraining recipe is checked completely before any work: each fault is one line that names file and field."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantlab.checkpoint.families import FAMILIES
from quantlab.errors import InputError
from quantlab.training.recipe_file import PretrainRecipe, Schedule, read_pretrain_recipe

REPOSITORY = Path(__file__).parents[2]
RECIPE: dict[str, Any] = {
    "model": {"model_type": "llama", "hidden_size": 64},
    "vocabulary": {"type": "sentencepiece-bpe", "size": 512},
    "schedule": {
        "tokens": 30720,
        "context": 64,
        "short_context": 32,
        "batch_tokens": 1024,
        "micro_batch_tokens": 512,
        "learning_rate": 0.004,
        "warmup_tokens": 2048,
        "seed": 3,
    },
}
ABSENT = object()
SECTIONS = "needs the sections model, vocabulary and schedule, and may have quantization"


def write_recipe(folder: Path, content: object) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return file


def changed(section: str, field: str, value: object) -> dict[str, Any]:
    """The recipe with one field of one section replaced, added or (ABSENT) left out."""
    recipe = copy.deepcopy(RECIPE)
    recipe[section][field] = value
    if value is ABSENT:
        del recipe[section][field]
    return recipe


def refusal(file: Path) -> str:
    """The one line that reading `file` ends with; it begins with the file's name."""
    with pytest.raises(InputError) as caught:
        read_pretrain_recipe(file)
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    assert "\n" not in message
    return message.removeprefix(f"{file}: ")


def test_the_shipped_recipe_reads() -> None:
    """models/recipes/fable-9m.yaml: the shape of the shipped model, and a schedule that comes out in whole steps."""
    recipe = read_pretrain_recipe(REPOSITORY / "models" / "recipes" / "fable-9m.yaml")
    assert recipe.model["model_type"] == "llama"
    shape = [recipe.model[name] for name in ("hidden_size", "num_hidden_layers", "intermediate_size")]
    assert shape == [256, 8, 1024]
    assert recipe.model["tie_word_embeddings"] is True
    assert recipe.vocabulary.size == 4096
    schedule = recipe.schedule
    assert schedule.context == recipe.model["max_position_embeddings"] == 1024
    assert schedule.batch_tokens % schedule.micro_batch_tokens == 0
    assert 0 <= schedule.warmup_steps < schedule.steps - schedule.decay_steps


def test_every_field_arrives(tmp_path: Path) -> None:
    """What the file says is what the recipe holds; what it leaves out has the documented default."""
    recipe = read_pretrain_recipe(write_recipe(tmp_path, RECIPE))
    assert recipe.model == RECIPE["model"]
    assert (recipe.vocabulary.type, recipe.vocabulary.size) == ("sentencepiece-bpe", 512)
    assert recipe.schedule == Schedule(**RECIPE["schedule"])
    assert (recipe.schedule.optimizer, recipe.schedule.decay) == ("muon", 0.25)


@pytest.mark.parametrize(
    ("field", "spelling", "value"),
    [
        ("learning_rate", "1e-3", 0.001),  # text to YAML 1.1, which wants a dot
        ("learning_rate", "1.0e-3", 0.001),
        ("learning_rate", "1", 1.0),
        ("learning_rate", '"0.5"', 0.5),
        ("tokens", "20_000_000", 20_000_000),
        ("tokens", "2e7", 20_000_000),
        ("tokens", "2.0e+7", 20_000_000),
        ("decay", "0", 0.0),
    ],
)
def test_numbers_may_be_spelt_in_any_way(tmp_path: Path, field: str, spelling: str, value: float) -> None:
    """YAML reads 1e-3 as text and 1 as a whole number; the field's own type decides."""
    lines = yaml.safe_dump(changed("schedule", field, "VALUE")).replace("VALUE", spelling)
    read = getattr(read_pretrain_recipe(write_recipe(tmp_path, lines)).schedule, field)
    assert read == value
    assert type(read) is type(value)


def test_steps_are_counted_from_tokens() -> None:
    """By hand: 30 steps of 1024 tokens, 2 of warm-up, a quarter (rounded) of decay; at least one step."""
    schedule = Schedule(tokens=30 * 1024, context=64, batch_tokens=1024, learning_rate=1e-3, warmup_tokens=2048)
    assert (schedule.steps, schedule.warmup_steps, schedule.decay_steps) == (30, 2, 8)
    assert Schedule(tokens=1, context=64, batch_tokens=1024, learning_rate=1e-3).steps == 1


@pytest.mark.parametrize(
    ("section", "field", "value", "fault"),
    [
        ("model", "model_type", ABSENT, "model.model_type is missing"),
        ("model", "model_type", 7, "model.model_type is missing"),
        ("model", "model_type", "bert", f"model: model_type 'bert' is not supported; supported: {', '.join(FAMILIES)}"),
        ("vocabulary", "size", ABSENT, "vocabulary: missing fields size"),
        ("vocabulary", "sizes", 512, "vocabulary: unknown fields sizes; known: size, type"),
        ("vocabulary", "size", "many", "vocabulary.size: must be a number, not 'many'"),
        ("vocabulary", "size", 512.5, "vocabulary.size: must be a non-negative whole number, not 512.5"),
        ("vocabulary", "type", "unigram", "vocabulary.type must be sentencepiece-bpe, not 'unigram'"),
        ("schedule", "tokens", ABSENT, "schedule: missing fields tokens"),
        ("schedule", "epochs", 3, "schedule: unknown fields epochs; known: tokens, context,"),
        ("schedule", 5, 3, "schedule: unknown fields 5; known: tokens, context,"),
        ("schedule", "tokens", 0, "schedule.tokens must be greater than zero"),
        ("schedule", "tokens", -5, "schedule.tokens: must be a non-negative whole number, not -5"),
        ("schedule", "tokens", True, "schedule.tokens: must be a number, not True"),
        ("schedule", "tokens", None, "schedule.tokens: must be a number, not None"),
        ("schedule", "tokens", [1], "schedule.tokens: must be a number, not [1]"),
        ("schedule", "tokens", float("inf"), "schedule.tokens: must be a non-negative whole number, not inf"),
        ("schedule", "learning_rate", float("nan"), "schedule.learning_rate: must be a non-negative number, not nan"),
        ("schedule", "learning_rate", 0, "schedule.learning_rate must be greater than zero"),
        ("schedule", "bf16", 1, "schedule.bf16: must be true or false, not 1"),
        ("schedule", "optimizer", "sgd", "schedule.optimizer must be muon or adamw, not 'sgd'"),
        ("schedule", "optimizer", ["muon"], "schedule.optimizer must be muon or adamw, not ['muon']"),
        ("schedule", "decay", 1.5, "schedule.decay is a share of the steps, at most 1"),
        ("schedule", "warmup_tokens", 40000, "schedule.warmup_tokens exceeds schedule.tokens"),
        ("schedule", "evaluate_every", 0, "schedule.evaluate_every must be greater than zero"),
        ("schedule", "save_every", 0, "schedule.save_every must be greater than zero"),
        ("schedule", "seed", 2**32, "schedule.seed must be below 2^32"),
        ("schedule", "context", 1, "schedule.context must be at least 2"),
        ("schedule", "short_context", 1, "schedule.short_context must be at least 2"),
        ("schedule", "context", 65, "schedule.micro_batch_tokens must be a multiple of schedule.context (65)"),
        ("schedule", "short_context", 33, "schedule.micro_batch_tokens must be a multiple of schedule.short_context"),
        ("schedule", "batch_tokens", 1000, "schedule.batch_tokens must be a multiple of schedule.micro_batch_tokens"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, section: str, field: Any, value: object, fault: str) -> None:
    """Missing, unknown, of a wrong type, out of range, or not dividing what it must: the line says which field."""
    assert refusal(write_recipe(tmp_path, changed(section, field, value))).startswith(fault)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "just text",
        "[1, 2]",
        {name: RECIPE[name] for name in ("model", "schedule")},
        {name: RECIPE[name] for name in ("vocabulary", "schedule")},
        {**RECIPE, "data": {"path": "corpus"}},
    ],
)
def test_the_three_sections_are_needed_and_no_other(tmp_path: Path, content: object) -> None:
    """An empty file, a list, a missing or a further section: the line names the three."""
    assert refusal(write_recipe(tmp_path, content)) == SECTIONS


@pytest.mark.parametrize("section", ["vocabulary", "schedule"])
def test_a_section_must_be_a_mapping(tmp_path: Path, section: str) -> None:
    """A section that is empty or a list is named."""
    for value in (None, [1], "text"):
        assert refusal(write_recipe(tmp_path, {**RECIPE, section: value})) == f"{section}: must be a mapping"


@pytest.mark.parametrize(
    "content", ["model: [unclosed", "model: {a: b\n\tc", "a: b: c", "!!python/object:os.system {}"]
)
def test_what_is_no_yaml_is_said_in_one_line(tmp_path: Path, content: str) -> None:
    """The parser's own complaint of several lines is joined into one; tags that would run code are refused."""
    assert refusal(write_recipe(tmp_path, content)).startswith("not a YAML file: ")


def test_other_bytes_are_no_yaml(tmp_path: Path) -> None:
    """A binary file is refused like any other."""
    file = tmp_path / "recipe.yaml"
    file.write_bytes(b"\xff\xfe\x00\x01")
    assert refusal(file).startswith("not a YAML file: ")


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    """Missing, or a folder: the system's reason follows the name."""
    assert refusal(tmp_path / "absent.yaml") == "cannot be read: No such file or directory"
    assert refusal(tmp_path) == "cannot be read: Is a directory"


def small_recipe() -> PretrainRecipe:
    return PretrainRecipe({}, None, Schedule(**RECIPE["schedule"]))  # type: ignore[arg-type]


def test_a_shorter_run_keeps_a_consistent_schedule() -> None:
    """Tokens given beside the recipe replace its own; the warm-up never exceeds the steps, nor the decay the rest."""
    schedule = small_recipe().with_schedule(tokens=1024, seed=7).schedule
    assert (schedule.tokens, schedule.seed, schedule.context) == (1024, 7, 64)
    assert (schedule.steps, schedule.warmup_steps, schedule.decay_steps) == (1, 1, 0)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"tokens": 0}, "tokens 0: must be greater than zero"),
        ({"tokens": -8}, "tokens -8: must be greater than zero"),
        ({"seed": -1}, "seed -1: must be at least 0"),
        ({"seed": 2**32}, "seed 4294967296: must be at least 0 and below 2^32"),
    ],
)
def test_a_wrong_replacement_is_refused(change: dict[str, int], fault: str) -> None:
    """Numbers from the command line are checked as the file's are."""
    with pytest.raises(InputError) as caught:
        small_recipe().with_schedule(**change)
    assert str(caught.value).startswith(fault)


def test_a_seed_of_zero_is_a_seed() -> None:
    """0 replaces the recipe's seed."""
    assert small_recipe().with_schedule(seed=0).schedule.seed == 0
