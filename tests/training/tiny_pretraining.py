"""A recipe for a model of a few thousand weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from quantlab.training.pretrain import PretrainResult

STEP = 1024  # tokens
RECIPE: dict[str, Any] = {
    "model": {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    },
    "vocabulary": {"size": 400},
    "schedule": {
        "tokens": 30 * STEP,
        "context": 128,
        "short_context": 64,
        "batch_tokens": STEP,
        "micro_batch_tokens": STEP // 2,
        "learning_rate": 0.01,
        "warmup_tokens": 2 * STEP,
        "bf16": False,
        "evaluate_every": 15,
        "save_every": 10,
    },
}
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}


def write_recipe(folder: Path, *, model: dict[str, Any] | None = None, **schedule: object) -> Path:
    """The small recipe as a file, with another model or other fields of the schedule."""
    recipe = copy.deepcopy(RECIPE)
    recipe["model"] = model or recipe["model"]
    recipe["schedule"].update(schedule)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return file


@dataclass(frozen=True)
class Run:
    """A finished training run, its corpus and its recipe."""

    recipe: Path
    corpus: Path
    out: Path
    result: PretrainResult
    reports: list[tuple[int, int, str]]
