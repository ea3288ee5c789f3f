"""The models that the merging benchmarks compare: tuned, merged and scored once, and kept in a work folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from merge_tasks import COMPOSITE, SPLITS, TASKS, write_tasks
from quantlab.cli.console import progress

from quantlab.checkpoint import load_tokenizer, open_checkpoint
from quantlab.checkpoint.checksums import model_digest
from quantlab.evaluation.windows import windows_of
from quantlab.loading import load_model
from quantlab.merging.merge import merge_checkpoints
from quantlab.training.finetune import finetune
from quantlab.training.finetune_settings import FinetuneSettings
from quantlab.training.prepared import DataSettings, prepare_data
from quantlab.training.sample import NO_LOSS, Sample

CONTEXT = 128  # the longest row has some 70 tokens
ROWS_AT_ONCE = 32
GENERAL = "general"  # plain text, cut into windows; half of them are dev, the others test
GENERAL_WINDOWS = 64
TUNING = FinetuneSettings(
    method="full", context=CONTEXT, batch_size=16, max_steps=150, learning_rate=3e-4, eval_every=150, seed=0
)


@dataclass(frozen=True)
class Losses:
    """Of rows or windows: summed loss in nats and tokens that carry it, fp64 [rows]."""

    sums: np.ndarray
    tokens: np.ndarray

    @property
    def mean(self) -> float:
        """Nats per token."""
        return float(self.sums.sum() / self.tokens.sum())


class Models:
    """Makes what is missing in `folder`, or takes what an earlier run of the same base and settings left there.

    Args:
        base: what is tuned.
        general: plain text that no task is about.
    """

    def __init__(self, base: Path, general: Path, folder: Path, threads: int) -> None:
        self.base, self.general, self.folder, self.threads = base.resolve(), general, folder.resolve(), threads
        torch.set_num_threads(threads)
        write_tasks(self.folder / "tasks")
        source = Path(__file__).with_name("merge_tasks.py").read_bytes() + general.read_bytes()
        deciding = {"base": model_digest(open_checkpoint(base)), "tuning": asdict(TUNING), "splits": SPLITS,
                    "tasks": hashlib.sha256(source).hexdigest()}  # fmt: skip
        note = self.folder / "settings.json"
        deciding = json.loads(json.dumps(deciding))
        if note.exists() and json.loads(note.read_text()) != deciding:
            raise SystemExit(f"{folder}: holds models of another base, other tasks or settings; name another --work")
        note.write_text(json.dumps(deciding, indent=1))

    def text(self, task: str, split: str) -> Path:
        """A task's rows as plain text, one a document."""
        return self.folder / "tasks" / f"{task}-{split}.txt"

    def tuned(self, task: str) -> Path:
        """The base tuned to a task by `quantlab finetune --method full`."""
        path = self.folder / f"tuned-{task}"
        if not path.exists():
            with progress(path.name, "tokens") as bar:
                finetune(
                    self.base, self.folder / "tasks" / f"{task}-train.jsonl", path, settings=TUNING,
                    data_settings=DataSettings(CONTEXT, held_out=0), device="cpu",
                    resume=path.with_name(f"{path.name}.training").exists(), progress=bar,
                )  # fmt: skip
        return path

    def merged(self, name: str, config: Mapping[str, Any], **options: Any) -> Path:
        """What `quantlab merge` makes of `config`."""
        path = self.folder / f"merged-{name}"
        if not path.exists():
            merge_checkpoints(
                json.dumps(config), path, threads=self.threads, seed=0, overwrite=True, **options
            )  # YAML reads JSON; unfinished work of an interrupted run is thrown away
        return path

    def losses(self, path: Path, subject: str, split: str) -> Losses:
        """Of a task's rows (of their answers alone), or of the general text's windows."""
        kept = self._kept(path, subject, split)
        if not kept.exists():
            self._score(path, split)
        with np.load(kept) as file:
            return Losses(file["sums"], file["tokens"])

    def _kept(self, path: Path, subject: str, split: str) -> Path:
        name = "base" if path == self.base else path.name
        return self.folder / f"{name}.{subject}-{split}.npz"

    def _score(self, path: Path, split: str) -> None:
        """All subjects at once: loading takes as long as scoring one."""
        model = load_model(path).eval()
        for (subject, some), samples in self.samples.items():
            if some == split and subject != COMPOSITE:
                found = scored(model, samples)
                np.savez(self._kept(path, subject, split), sums=found.sums, tokens=found.tokens)

    @cached_property
    def samples(self) -> dict[tuple[str, str], list[Sample]]:
        """By task and split."""
        tokenizer, rows = load_tokenizer(self.base), DataSettings(CONTEXT, held_out=0)
        found = {}
        for file in sorted((self.folder / "tasks").glob("*.jsonl")):
            task, _, split = file.stem.rpartition("-")
            found[task, split] = prepare_data(file, tokenizer, None, rows).train
        windows = windows_of(self.general, tokenizer, CONTEXT)
        chosen = [windows[i] for i in np.linspace(0, len(windows) - 1, 2 * GENERAL_WINDOWS).astype(int)]
        plain = [_sample(window.ids) for window in chosen]
        return found | {(GENERAL, "dev"): plain[::2], (GENERAL, "test"): plain[1::2]}


def _sample(ids: Sequence[int]) -> Sample:
    return Sample(list(ids), [NO_LOSS, *ids[1:]], "")


@torch.no_grad()
def scored(model: Callable[..., Any], samples: Sequence[Sample]) -> Losses:
    """In batches, shorter rows filled up at their ends, which causal attention does not see."""
    sums, tokens = [], []
    for start in range(0, len(samples), ROWS_AT_ONCE):
        batch = samples[start : start + ROWS_AT_ONCE]
        length = max(len(sample.input_ids) for sample in batch)
        ids = torch.tensor([sample.input_ids + [0] * (length - len(sample.input_ids)) for sample in batch])
        labels = torch.tensor([sample.labels + [NO_LOSS] * (length - len(sample.labels)) for sample in batch])
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        losses = F.cross_entropy(
            logits.transpose(1, 2).double(), labels[:, 1:], ignore_index=NO_LOSS, reduction="none"
        )  # fmt: skip
        sums.append(losses.sum(dim=1).numpy())
        tokens.append((labels[:, 1:] != NO_LOSS).sum(dim=1).double().numpy())
    return Losses(np.concatenate(sums), np.concatenate(tokens))


def texts_by_model(models: Models) -> dict[str, Path]:
    """For methods that read what each model's layers see: its task's training text."""
    return {f"tuned-{task}": models.text(task, "train") for task in TASKS}
