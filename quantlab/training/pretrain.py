"""Pretrain a language model from a recipe file and plain text, on transformers' Trainer, resumable."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.errors import InputError
from quantlab.training.corpus import Corpus, open_corpus
from quantlab.training.failures import TrainingFailedError
from quantlab.training.pretraining_data import Streams, evaluation_set, prepare_streams
from quantlab.training.pretraining_model import new_model, round_unpacked, train_through_blocks, write_model
from quantlab.training.recipe_file import PretrainRecipe, read_pretrain_recipe

if TYPE_CHECKING:
    from transformers import Trainer

    from quantlab.training.pretraining_trainer import Progress

CHECKPOINT_FILES = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors")


@dataclass(frozen=True)
class PretrainResult:
    """Losses are nats per token; `eval_loss` is the written model's on the test split, or on the validation split
    without one. `format` is that of linear layers' weights, None where they are float.
    """

    steps: int
    train_loss: float
    eval_loss: float
    tokens_per_second: float
    parameters: int
    training_tokens: int
    format: str | None = None


def pretrain(
    recipe_path: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    tokens: int | None = None,
    seed: int | None = None,
    format: str | None = None,
    progress: Progress | None = None,
) -> PretrainResult:
    """Train the recipe's model on `data` and write it to `out`, a Hugging Face folder, in fp16 or in blocks.

    Checkpoints, the tokenized text and the loss log live in `<out>.training` until the folder is complete; an
    interrupted run continues from there with `resume` and sees the data an uninterrupted run would have seen.

    Args:
        recipe_path: YAML file, see `recipe_file`.
        data: text file, or folder with train.txt[.gz] and, optionally, validation.txt and test.txt.
        tokens: replaces the recipe's number of training tokens.
        seed: replaces the recipe's seed.
        format: replaces the recipe's format of linear layers' weights; "float" for none.

    Raises:
        InputError: a wrong recipe or text, an existing `out`, or unfinished work in `<out>.training` without `resume`.
        TrainingFailedError: the loss became NaN, or weights that no block can hold.
    """
    recipe_path, out = Path(recipe_path), Path(out)
    recipe = read_pretrain_recipe(recipe_path)
    changes = {"tokens": tokens, "seed": seed}
    recipe = recipe.with_schedule(**{name: value for name, value in changes.items() if value is not None})
    recipe = recipe.with_format(format)
    corpus = open_corpus(Path(data))
    work = out.with_name(out.name + ".training")
    if out.exists():
        raise InputError(f"{out}: exists already; remove it or choose another folder")
    if work.exists() and not resume:
        raise InputError(f"{work}: holds an unfinished run; continue it with --resume, or remove the folder")
    model = new_model(recipe, recipe_path)
    formats = train_through_blocks(model, recipe.quantization, recipe_path) if recipe.quantization else {}
    fresh = not work.exists()
    work.mkdir(parents=True, exist_ok=True)
    try:
        _check_same_run(recipe, corpus, work)
        streams = prepare_streams(recipe, corpus, work)
        trainer = _trainer(model, recipe.schedule, streams, work, progress)
    except InputError:  # refused: there is nothing to resume
        if fresh:
            shutil.rmtree(work)
        raise
    checkpoint = _newest_complete_checkpoint(work)
    _train(trainer, checkpoint, work)
    round_unpacked(model, formats)
    result = _finish(trainer, recipe, streams, 0 if checkpoint is None else _step_of(checkpoint))
    write_model(model, recipe, formats, work / "tokenizer", out, trainer.state.log_history)
    shutil.rmtree(work)
    return result


def _trainer(*arguments: Any) -> Trainer:
    from quantlab.training.pretraining_trainer import pretraining_trainer

    return pretraining_trainer(*arguments)


def _train(trainer: Trainer, checkpoint: Path | None, work: Path) -> None:
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except (InputError, TrainingFailedError) as error:  # the first is a quantizer's, of weights that diverged
        good = _newest_complete_checkpoint(work)
        kept = "no checkpoint was complete yet" if good is None else f"the last good checkpoint is {good}"
        steps = trainer.state.global_step
        raise TrainingFailedError(f"after {steps} steps: {error}; {kept}; lower schedule.learning_rate") from None


def _check_same_run(recipe: PretrainRecipe, corpus: Corpus, work: Path) -> None:
    """Note what a run is made of when it starts; refuse to resume it with anything else.

    The number of tokens may change if no more than one stage hangs on it (see `Schedule`), and so may how often to
    evaluate and save.
    """
    note, identity = work / "run.json", _identity(recipe, corpus)
    if not note.exists():
        note.write_text(json.dumps(identity))
        return
    recorded = json.loads(note.read_text())
    changed = [name for name in {**recorded, **identity} if recorded.get(name) != identity.get(name)]
    if changed:
        raise InputError(
            f"{work}: holds a run with another {', '.join(changed)}; resume with that, or remove the folder"
        )


def _identity(recipe: PretrainRecipe, corpus: Corpus) -> dict[str, Any]:
    free = {"evaluate_every", "save_every"} | ({"tokens", "stages"} if recipe.schedule.stages == 1 else set())
    schedule = {name: value for name, value in dataclasses.asdict(recipe.schedule).items() if name not in free}
    splits = {split: file for split, file in dataclasses.asdict(corpus).items() if file is not None}
    identity = {
        "model": recipe.model,
        "vocabulary": dataclasses.asdict(recipe.vocabulary),
        "schedule": schedule,
        "data": {split: [file.name, file.stat().st_size] for split, file in splits.items()},
    }
    if recipe.quantization is not None:
        identity["quantization"] = dataclasses.asdict(recipe.quantization)
    return identity


def _newest_complete_checkpoint(work: Path) -> Path | None:
    """The newest checkpoint whose files are all there (the Trainer's saves are not atomic)."""
    folders = sorted((work / "checkpoints").glob("checkpoint-*"), key=_step_of, reverse=True)
    complete = (folder for folder in folders if all((folder / name).is_file() for name in CHECKPOINT_FILES))
    return next(complete, None)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _finish(trainer: Trainer, recipe: PretrainRecipe, streams: Streams, first_step: int) -> PretrainResult:
    """Evaluate and sum up; steps before `first_step` were an earlier call's."""
    schedule, quantization = recipe.schedule, recipe.quantization
    eval_loss = trainer.evaluate(evaluation_set(streams.final, schedule))["eval_loss"]
    history = trainer.state.log_history
    summary = next(entry for entry in reversed(history) if "train_runtime" in entry)
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return PretrainResult(
        steps=schedule.steps,
        train_loss=losses[-1] if losses else summary["train_loss"],
        eval_loss=eval_loss,
        tokens_per_second=(schedule.steps - first_step) * schedule.batch_tokens / summary["train_runtime"],
        parameters=sum(p.numel() for p in trainer.model.parameters()),
        training_tokens=schedule.steps * schedule.batch_tokens,
        format=None if quantization is None else quantization.linear_format.name,
    )
