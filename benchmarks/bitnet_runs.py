"""The models that bitnet.py compares: pretrained from one recipe in float and in ternary, and scored once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from quantlab.cli.console import progress

from quantlab.calibration.quantize import quantize_checkpoint
from quantlab.checkpoint import load_tokenizer
from quantlab.checkpoint.atomic import atomic_file
from quantlab.divergence import negative_log_likelihood
from quantlab.evaluation.scorers import open_scorer
from quantlab.evaluation.windows import Window, windows_of
from quantlab.training.pretrain import pretrain

TERNARY, FLOAT, NAIVE = "ternary", "float", "naive"
ACTIVATIONS = {TERNARY: "int8", FLOAT: "f32", NAIVE: "int8"}  # of each kind's own arithmetic


@dataclass(frozen=True)
class Settings:
    """What decides every figure of a work folder; rates are learning rates at their highest."""

    data: Path
    text: Path
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int
    tokens: int
    batch_tokens: int
    micro_batch_tokens: int
    warmup_tokens: int
    rates: dict[str, float]
    optimizer: str
    stages: int
    bf16: bool

    def recipe(self, layers: int, kind: str) -> dict[str, Any]:
        """Of `quantlab pretrain`; the two kinds differ in nothing but the format and, if asked to, the rate."""
        recipe: dict[str, Any] = {
            "model": {
                "model_type": "llama", "hidden_size": self.hidden, "intermediate_size": self.intermediate,
                "num_hidden_layers": layers, "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
                "max_position_embeddings": self.context, "tie_word_embeddings": True,
            },
            "vocabulary": {"size": self.vocabulary},
            "schedule": {
                "tokens": self.tokens, "context": self.context, "batch_tokens": self.batch_tokens,
                "micro_batch_tokens": self.micro_batch_tokens, "learning_rate": self.rates[kind],
                "warmup_tokens": self.warmup_tokens, "optimizer": self.optimizer, "stages": self.stages,
                "bf16": self.bf16,
            },
        }  # fmt: skip
        return recipe if kind == FLOAT else recipe | {"quantization": {"format": TERNARY}}

    def linear_parameters(self, layers: int) -> int:
        """Weights of all linear layers, which are what is ternary."""
        keys = self.hidden // self.heads * self.kv_heads
        return layers * self.hidden * (2 * self.hidden + 2 * keys + 3 * self.intermediate)


class Runs:
    """Makes what is missing in `folder`, or takes what an earlier run of the same settings left there."""

    def __init__(self, settings: Settings, folder: Path, threads: int) -> None:
        self.settings, self.folder, self.threads = settings, folder, threads
        folder.mkdir(parents=True, exist_ok=True)
        self._claim()

    def _claim(self) -> None:
        deciding = json.loads(json.dumps(dataclasses.asdict(self.settings), default=str))
        deciding["text"] = hashlib.sha256(self.settings.text.read_bytes()).hexdigest()[:16]
        note = self.folder / "settings.json"
        kept = json.loads(note.read_text()) if note.exists() else deciding
        if changed := [key for key in deciding if kept.get(key) != deciding[key]]:
            raise SystemExit(f"{self.folder}: holds runs with another {', '.join(changed)}; name another --work")
        note.write_text(json.dumps(deciding, indent=1))

    def model(self, layers: int, kind: str, seed: int) -> Path:
        """A pretrained model, or the float one rounded to ternary."""
        path = self.folder / f"layers{layers}-{kind}-s{seed}"
        if path.exists():
            return path
        with progress(path.name, "weights" if kind == NAIVE else "tokens") as bar:
            if kind == NAIVE:
                source = self.model(layers, FLOAT, seed)
                shutil.rmtree(path, ignore_errors=True)
                quantize_checkpoint(source, path, recipe=str(self._recipe_of_rounding()), threads=self.threads,
                                    progress=bar)  # fmt: skip
            else:
                recipe = self.folder / f"layers{layers}-{kind}.yaml"
                recipe.write_text(yaml.safe_dump(self.settings.recipe(layers, kind)))
                resume = path.with_name(f"{path.name}.training").exists()
                pretrain(recipe, self.settings.data, path, seed=seed, resume=resume, progress=bar)
        return path

    def _recipe_of_rounding(self) -> Path:
        """Linear layers alone, as in training: embedding and head stay as they are."""
        file = self.folder / "naive.yaml"
        rules = [["model.embed_tokens.weight", None], ["model.layers.*_proj.weight", TERNARY]]
        file.write_text(yaml.safe_dump({"rules": rules}))
        return file

    @cached_property
    def windows(self) -> list[Window]:
        """Of the held-out text: all models have one vocabulary, trained on the same text."""
        first = next(path for path in sorted(self.folder.glob("layers*-s*")) if (path / "config.json").exists())
        return windows_of(self.settings.text, load_tokenizer(first), self.settings.context)

    @property
    def tokens(self) -> np.ndarray:
        """Scored in each window, fp64."""
        return np.array([float(window.scored) for window in self.windows])

    def nll(self, layers: int, kind: str, seed: int) -> np.ndarray:
        """Summed loss of each window in nats, fp64: ternary models with int8 activations, float ones with float."""
        path = self.model(layers, kind, seed)
        kept = path.with_name(f"{path.name}.nll.npy")
        if not kept.exists():
            with atomic_file(kept, replace=True) as temporary, temporary.open("wb") as file:
                np.save(file, self._scored(path, ACTIVATIONS[kind]))
        found: np.ndarray = np.load(kept)
        return found

    def _scored(self, path: Path, activations: str) -> np.ndarray:
        scorer = open_scorer(path, "auto", self.settings.context, self.threads, activations=activations, kv="f32")
        sums = np.zeros(len(self.windows))
        with progress(f"scoring {path.name}", "windows") as bar:
            for number, window in enumerate(self.windows):
                start = 0
                for logits in scorer.parts(window):
                    targets = np.asarray(window.targets[start : start + len(logits)])
                    sums[number] += negative_log_likelihood(logits, targets).sum()
                    start += len(logits)
                bar(number + 1, len(self.windows), "")
        return sums
