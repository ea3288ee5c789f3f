"""Pretrain a language model from a recipe file and plain text, on transformers' Trainer, resumable."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantlab.errors import InputError
from quantlab.training.corpus import (
    Corpus,
    WindowSampler,
    evaluation_batches,
    open_corpus,
    read_documents,
    token_stream,
)
from quantlab.training.recipe_file import PretrainRecipe, Schedule, read_pretrain_recipe
from quantlab.training.vocabulary import BOS, EOS, load_sentencepiece, train_sentencepiece

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, Trainer

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]  # (tokens done, tokens in all, the latest loss)
VALIDATION_SHARE = 20  # without a validation file, every 20th document is held out
CHECKPOINT_FILES = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors")


@dataclass(frozen=True)
class PretrainResult:
    """Losses are nats per token; `eval_loss` is that of the test split, or of the validation split without one."""

    steps: int
    train_loss: float
    eval_loss: float
    tokens_per_second: float
    parameters: int
    training_tokens: int


@dataclass(frozen=True)
class _Data:
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray | None


def pretrain(
    recipe_path: Path,
    data: Path,
    out: Path,
    *,
    resume: bool = False,
    tokens: int | None = None,
    seed: int | None = None,
    progress: Progress | None = None,
) -> PretrainResult:
    """Train the recipe's model on `data` and write it to `out` as an fp16 Hugging Face folder.

    Checkpoints, the tokenized text and the loss log live in `<out>.training` until the folder is complete; an
    interrupted run continues from there with `resume` and sees the data an uninterrupted run would have seen.

    Args:
        recipe_path: YAML file, see `recipe_file`.
        data: text file, or folder with train.txt[.gz] and, optionally, validation.txt and test.txt.
        tokens: replaces the recipe's number of training tokens.
        seed: replaces the recipe's seed.

    Raises:
        InputError: a wrong recipe or text, an existing `out`, or unfinished work in `<out>.training` without `resume`.
    """
    recipe = read_pretrain_recipe(recipe_path)
    changes = {"tokens": tokens, "seed": seed}
    recipe = recipe.with_schedule(**{name: value for name, value in changes.items() if value is not None})
    corpus = open_corpus(data)
    work = out.with_name(out.name + ".training")
    if out.exists():
        raise InputError(f"{out}: exists already; remove it or choose another folder")
    if work.exists() and not resume:
        raise InputError(f"{work}: holds an unfinished run; continue it with --resume, or remove the folder")
    model = _new_model(recipe, recipe_path)
    fresh = not work.exists()
    work.mkdir(parents=True, exist_ok=True)
    try:
        _check_same_run(recipe, corpus, work)
        streams = _prepare_data(recipe, corpus, work)
        trainer = _trainer(model, recipe.schedule, streams, work, progress)
    except InputError:  # refused: there is nothing to resume
        if fresh:
            shutil.rmtree(work)
        raise
    checkpoint = _newest_complete_checkpoint(work)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    result = _finish(trainer, recipe.schedule, streams, 0 if checkpoint is None else _step_of(checkpoint))
    _write_model(model, work, out, trainer.state.log_history)
    shutil.rmtree(work)
    return result


def _check_same_run(recipe: PretrainRecipe, corpus: Corpus, work: Path) -> None:
    """Note what a run is made of when it starts; refuse to resume it with anything else.

    The number of tokens may change (see `Schedule`), and so may how often to evaluate and save.
    """
    free = ("tokens", "evaluate_every", "save_every")
    schedule = {name: value for name, value in dataclasses.asdict(recipe.schedule).items() if name not in free}
    splits = {split: file for split, file in dataclasses.asdict(corpus).items() if file is not None}
    identity = {
        "model": recipe.model,
        "vocabulary": dataclasses.asdict(recipe.vocabulary),
        "schedule": schedule,
        "data": {split: [file.name, file.stat().st_size] for split, file in splits.items()},
    }
    note = work / "run.json"
    if not note.exists():
        note.write_text(json.dumps(identity))
    elif changed := [name for name, value in json.loads(note.read_text()).items() if value != identity[name]]:
        raise InputError(
            f"{work}: holds a run with another {', '.join(changed)}; resume with that, or remove the folder"
        )


def _prepare_data(recipe: PretrainRecipe, corpus: Corpus, work: Path) -> _Data:
    """Train the vocabulary and tokenize the splits, or read both back when an earlier run finished that."""
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
    data = _Data(loaded["train"], loaded["validation"], loaded.get("test"))
    for name, stream in (("validation", data.validation), ("test", data.test)):
        if stream is not None and len(stream) < recipe.schedule.context:
            raise InputError(f"the {name} text has {len(stream)} tokens, less than one context")
    return data


def _new_model(recipe: PretrainRecipe, path: Path) -> PreTrainedModel:
    """The recipe's model with random weights, once it is known to compute; `path` is the recipe's, for errors."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(recipe.model)
    model_type = settings.pop("model_type")
    torch.manual_seed(recipe.schedule.seed)
    try:
        config = AutoConfig.for_model(
            model_type, vocab_size=recipe.vocabulary.size, bos_token_id=BOS, eos_token_id=EOS, **settings
        )
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            model(torch.tensor([[BOS]]))  # some shapes that do not fit each other show only now
    except Exception as error:  # what its classes do not check themselves fails anywhere in them
        raise InputError(f"{path}: model: transformers refuses it: {' '.join(str(error).split())}") from None
    _check_config(config, settings, recipe.schedule, path)
    return model


def _check_config(config: PreTrainedConfig, settings: dict[str, Any], schedule: Schedule, path: Path) -> None:
    """What transformers accepts without a word: misspelt fields, and windows longer than the model."""
    known = {field.name for field in dataclasses.fields(config)} | set(config.attribute_map)
    if unknown := sorted(name for name in settings if name not in known and hasattr(config, name)):
        raise InputError(f"{path}: model: unknown fields {', '.join(unknown)}; {type(config).__name__} has no such")
    longest, limit = max(schedule.context, schedule.short_context), config.max_position_embeddings
    if longest > limit:
        raise InputError(f"{path}: schedule.context {longest} exceeds model.max_position_embeddings, {limit}")


class _Batches:
    """The Trainer's dataset: item `i` is the i-th micro-batch of the run, short windows first."""

    def __init__(self, stream: np.ndarray, schedule: Schedule) -> None:
        self.schedule = schedule
        self.per_step = schedule.batch_tokens // schedule.micro_batch_tokens
        self.short_items = (schedule.steps - schedule.decay_steps) * self.per_step if schedule.short_context else 0
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


def _trainer(model: PreTrainedModel, schedule: Schedule, data: _Data, work: Path, progress: Progress | None) -> Trainer:
    import torch
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(work / "checkpoints"),
        max_steps=schedule.steps,
        per_device_train_batch_size=1,  # one item is one micro-batch
        gradient_accumulation_steps=schedule.batch_tokens // schedule.micro_batch_tokens,
        per_device_eval_batch_size=1,
        learning_rate=schedule.learning_rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": schedule.decay_steps, "decay_type": "linear"},
        warmup_steps=schedule.warmup_steps,
        weight_decay=schedule.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=schedule.gradient_clip,
        bf16=schedule.bf16,  # autocast; the weights and the optimizer's moments stay fp32
        train_sampling_strategy="sequential",  # the order is the sampler's, so that resuming cannot change it
        eval_strategy="steps",
        eval_steps=schedule.evaluate_every,
        save_steps=schedule.save_every,
        save_total_limit=2,
        logging_steps=10,
        seed=schedule.seed,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
    )

    class ReportProgress(TrainerCallback):
        """Steps count as tokens, the unit people compare; the loss is the latest logged one."""

        note = ""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            words = {"loss": "loss", "eval_loss": "held out"}
            self.note = ", ".join(f"{words[key]} {logs[key]:.3f}" for key in words if key in (logs or {})) or self.note

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if progress is not None:
                done, total = state.global_step * schedule.batch_tokens, state.max_steps * schedule.batch_tokens
                progress(done, total, self.note)

    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=_Batches(data.train, schedule),
        eval_dataset=_evaluation(data.validation, schedule),
        data_collator=_as_model_input,
        optimizers=(_muon(model, schedule) if schedule.optimizer == "muon" else None, None),
        callbacks=[ReportProgress()],
    )
    trainer.remove_callback(PrinterCallback)  # it prints to stdout
    return trainer


def _evaluation(stream: np.ndarray, schedule: Schedule) -> list[np.ndarray]:
    """Batches of one size: the Trainer's loss is the mean over batches, however many windows each holds."""
    windows = len(stream) // (schedule.context - 1)
    most = max(1, schedule.micro_batch_tokens // schedule.context)
    batch = next(size for size in range(most, 0, -1) if windows % size == 0)
    return evaluation_batches(stream, schedule.context, batch, BOS)


def _as_model_input(items: list[np.ndarray]) -> dict[str, torch.Tensor]:
    import torch

    ids = torch.from_numpy(np.concatenate(items))
    return {"input_ids": ids, "labels": ids}


def _muon(model: PreTrainedModel, schedule: Schedule) -> torch.optim.Optimizer:
    """Hidden matrices by Muon; embeddings (GPT-2's positions too), head and vectors by AdamW."""
    import torch

    from quantlab.training.muon import Muon

    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    apart = {id(m.weight) for m in (*tables, model.get_output_embeddings())}
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim == 2 and id(p) not in apart]
    chosen = {id(p) for p in matrices}
    others = [p for p in parameters if id(p) not in chosen]
    return Muon(matrices, others, lr=schedule.learning_rate, weight_decay=schedule.weight_decay)


def _newest_complete_checkpoint(work: Path) -> Path | None:
    """The newest checkpoint whose files are all there (the Trainer's saves are not atomic)."""
    folders = sorted((work / "checkpoints").glob("checkpoint-*"), key=_step_of, reverse=True)
    complete = (folder for folder in folders if all((folder / name).is_file() for name in CHECKPOINT_FILES))
    return next(complete, None)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _finish(trainer: Trainer, schedule: Schedule, data: _Data, first_step: int) -> PretrainResult:
    """Evaluate and sum up; steps before `first_step` were an earlier call's."""
    held_out = data.validation if data.test is None else data.test
    eval_loss = trainer.evaluate(_evaluation(held_out, schedule))["eval_loss"]
    history = trainer.state.log_history
    summary = next(entry for entry in reversed(history) if "train_runtime" in entry)
    losses = [entry["loss"] for entry in history if "loss" in entry]
    tokens = schedule.steps * schedule.batch_tokens
    return PretrainResult(
        steps=schedule.steps,
        train_loss=losses[-1] if losses else summary["train_loss"],
        eval_loss=eval_loss,
        tokens_per_second=(schedule.steps - first_step) * schedule.batch_tokens / summary["train_runtime"],
        parameters=sum(p.numel() for p in trainer.model.parameters()),
        training_tokens=tokens,
    )


def _write_model(model: PreTrainedModel, work: Path, out: Path, history: list[dict[str, float]]) -> None:
    """The fp16 folder, by the one writer, with tokenizer and loss log."""
    import torch

    from quantlab.checkpoint import TensorEntry
    from quantlab.checkpoint.families import family_of
    from quantlab.checkpoint.folder_writer import FolderWriter
    from quantlab.checkpoint.tensors import dtype_name

    model.config.dtype = torch.float16
    model.config.use_cache = True
    model.config.architectures = [type(model).__name__]
    config = json.loads(model.config.to_json_string())  # what differs from transformers' general defaults
    tied = set(model.all_tied_weights_keys)
    weights = {name: p.detach().cpu().to(torch.float16) for name, p in model.named_parameters() if name not in tied}
    family = family_of(config, str(out))
    weights = {name: w.T if family.is_transposed(name) else w for name, w in weights.items()}
    entries = [TensorEntry(name, dtype_name(w.dtype), tuple(w.shape)) for name, w in weights.items()]
    with FolderWriter(out, entries, config) as writer:
        for name, weight in weights.items():
            writer.write(name, weight)
        writer.copy_companions(work / "tokenizer")
        generation = {"bos_token_id": BOS, "eos_token_id": EOS}
        writer.add_file("generation_config.json", json.dumps(generation, indent=2).encode() + b"\n")
        writer.add_file("training_log.json", json.dumps(history).encode())
