"""The token streams of a pretraining run, and the windows that its steps and evaluations see."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantlab.errors import InputError
from quantlab.training.corpus import Corpus, WindowSampler, evaluation_batches, read_documents, token_stream
from quantlab.training.recipe_file import PretrainRecipe, Schedule
from quantlab.training.vocabulary import BOS, EOS, load_sentencepiece, train_sentencepiece

logger = logging.getLogger(__name__)

VALIDATION_SHARE = 20  # without a validation file, every 20th document is held out


@dataclass(frozen=True)
class Streams:
    """Token ids of each split, documents joined."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray | None

    @property
    def final(self) -> np.ndarray:
        """What the finished model is scored on."""
        return self.validation if self.test is None else self.test


def prepare_streams(recipe: PretrainRecipe, corpus: Corpus, work: Path) -> Streams:
    """Train the vocabulary and tokenize the splits, or read both back when an earlier run finished that.

    Raises:
        InputError: the text is too short, or cannot be split.
    """
    cache = work / "tokens.npz"
    if not cache.exists():
        train_documents = read_documents(corpus.train)
        if corpus.validation is None:
            validation_documents = train_documents[::VALIDATION_SHARE]
            train_documents = [d for i, d in enumerate(train_documents) if i % VALIDATION_SHARE]
        else:
            validation_documents = read_documents(corpus.validation)
        if not train_documents:
            raise InputError(f"{corpus.train}: one document cannot be split; give a folder with validation.txt too")
        logger.info("training a vocabulary of %d pieces", recipe.vocabulary.size)
        train_sentencepiece(train_documents, recipe.vocabulary.size, work / "tokenizer", os.cpu_count() or 1)
        streams = {"train": train_documents, "validation": validation_documents}
        if corpus.test is not None:
            streams["test"] = read_documents(corpus.test)
        processor = load_sentencepiece(work / "tokenizer")
        logger.info("tokenizing")
        arrays = {
            name: token_stream(processor.encode(texts), recipe.vocabulary.size, BOS, EOS)
            for name, texts in streams.items()
        }
        partial = cache.with_suffix(".partial.npz")
        np.savez(partial, allow_pickle=False, **arrays)
        partial.replace(cache)
    loaded = np.load(cache)
    streams_found = Streams(loaded["train"], loaded["validation"], loaded.get("test"))
    for name, stream in (("validation", streams_found.validation), ("test", streams_found.test)):
        if stream is not None and len(stream) < recipe.schedule.context:
            raise InputError(f"the {name} text has {len(stream)} tokens, less than one context")
    return streams_found


class Batches:
    """The Trainer's dataset: item `i` is the i-th micro-batch of the run, short windows first."""

    def __init__(self, stream: np.ndarray, schedule: Schedule) -> None:
        self.schedule = schedule
        self.per_step = schedule.batch_tokens // schedule.micro_batch_tokens
        self.short_items = schedule.short_steps * self.per_step if schedule.short_context else 0
        self.long = WindowSampler(stream, schedule.context, BOS, schedule.seed)
        self.short = WindowSampler(stream, schedule.short_context or schedule.context, BOS, schedule.seed)

    def __len__(self) -> int:
        return self.schedule.steps * self.per_step

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(index)
        sampler, item = (self.short, index) if index < self.short_items else (self.long, index - self.short_items)
        windows = self.schedule.micro_batch_tokens // sampler.context
        return sampler.batch(item * windows, windows)


def evaluation_set(stream: np.ndarray, schedule: Schedule) -> list[np.ndarray]:
    """Batches of one size: the Trainer's loss is the mean over batches, however many windows each holds."""
    windows = len(stream) // (schedule.context - 1)
    most = max(1, schedule.micro_batch_tokens // schedule.context)
    batch = next(size for size in range(most, 0, -1) if windows % size == 0)
    return evaluation_batches(stream, schedule.context, batch, BOS)
