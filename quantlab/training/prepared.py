"""A file or folder of training data -> samples of token ids, and what the user should know of them."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from quantlab.checkpoint.chat_text import check_template
from quantlab.checkpoint.tokenizer import Tokenizer
from quantlab.errors import InputError
from quantlab.training.chat_labels import ChatEncoder
from quantlab.training.data_files import TEXT, find_data
from quantlab.training.faults import bad_rows, counted
from quantlab.training.fitting import TOO_LONG, fitted, held_out
from quantlab.training.row_forms import Completion, Conversation, RowForm
from quantlab.training.rows import Row, read_rows
from quantlab.training.sample import Sample
from quantlab.training.text_labels import TextEncoder, completion_sample, text_samples

DEFAULT_SHARE = 0.05  # of the rows, to evaluate on

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class DataSettings:
    """What becomes of the rows.

    `context` is the most tokens of a sample. `held_out` rows of the training file are kept for evaluation, a share
    below 1 or a number, drawn by `seed` (of a text file: its last windows); None: a twentieth, where there is no file
    to evaluate on and 20 rows to part. `prompt_field`, `completion_field` and
    `prompt_layout` are `RowForm`'s. `completion_only`: a prompt, where a row has one as a text, carries no loss.
    `last_turn_only`: learn a conversation's last answer, not all. `too_long`: list samples longer than the context as
    an "error", "cut" off their ends, or "skip" them; plain texts are parted into windows instead.

    Raises:
        InputError: a value out of range.
    """

    context: int
    held_out: float | None = 0
    seed: int = 0
    prompt_field: str | None = None
    completion_field: str | None = None
    prompt_layout: str | None = None
    completion_only: bool = True
    last_turn_only: bool = False
    too_long: str = "error"

    def __post_init__(self) -> None:
        if self.too_long not in TOO_LONG:
            raise InputError(f"samples too long {self.too_long!r}: choose from {', '.join(TOO_LONG)}")
        if self.context < 2:
            raise InputError(f"a context of {self.context} tokens: at least 2 are needed")
        amount = self.held_out or 0
        if not math.isfinite(amount) or amount < 0 or (amount >= 1 and amount % 1):
            raise InputError(f"{amount} rows held out: give a share below 1, or a number of rows")


@dataclass
class PreparedData:
    """Samples in the order of the files. `notes` say what the user should know; `digest` is a hash of all ids and
    labels, which a resumed run compares.
    """

    train: list[Sample]
    valid: list[Sample]
    test: list[Sample]
    notes: list[str]
    digest: str


def prepare_data(
    path: Path,
    tokenizer: Tokenizer,
    template: str | None,
    settings: DataSettings,
    *,
    progress: Progress | None = None,
) -> PreparedData:
    """Read a file, or a folder with train, valid and test files, and turn each row into token ids and labels.

    Args:
        path: see `data_files.find_data`; the forms of rows are in `row_forms`.
        template: the model's chat template, or another; None where it has none.
        progress: called with rows done, rows in all, and the row's place.

    Raises:
        InputError: all rows that are wrong, or all that are too long, in one line; the tokenizer has no end token;
            conversations for a model without chat template; nothing to train on.
    """
    files = find_data(path)
    if settings.held_out and files.valid is not None:
        raise InputError(
            f"{path}: has {files.valid.name} to evaluate on; no rows of {files.train.name} are held out too"
        )
    labeller = _Labeller(tokenizer, template, settings)
    found = {"train": files.train, "valid": files.valid, "test": files.test}
    form = RowForm(settings.prompt_field, settings.completion_field, settings.prompt_layout, template is not None)
    faults: list[str] = []
    rows: dict[str, list[Row]] = {}
    for split, file in found.items():
        rows[split], wrong = read_rows(file, form) if file is not None else ([], [])
        faults += wrong
    by_row = labeller.all_samples(rows, faults, progress)
    if faults:
        raise bad_rows(path, faults)
    is_text = files.train.name.endswith(TEXT)
    units = [[sample] for samples in by_row["train"] for sample in samples] if is_text else by_row["train"]
    amount = settings.held_out
    if amount is None:
        amount = DEFAULT_SHARE if files.valid is None and len(units) * DEFAULT_SHARE >= 1 else 0
    if amount:
        by_row["train"], by_row["valid"] = held_out(units, amount, settings.seed, files.train, last=is_text)
    notes = [f"{path}: {name} is not used" for name in files.unused] + labeller.notes()
    splits = _fitted(path, by_row, settings, notes)
    notes += _repeated(splits)
    return PreparedData(splits["train"], splits["valid"], splits["test"], notes, _digest(splits))


class _Labeller:
    """Rows -> samples, and counts of what is worth a note."""

    def __init__(self, tokenizer: Tokenizer, template: str | None, settings: DataSettings) -> None:
        self._settings, self._encoder = settings, TextEncoder(tokenizer)
        self._chat: ChatEncoder | None = None
        if template is not None:
            check_template(template)
            self._chat = ChatEncoder(template, self._encoder, last_turn_only=settings.last_turn_only)
        self._parted = 0  # conversations that became a sample for every turn

    def all_samples(
        self, rows: dict[str, list[Row]], faults: list[str], progress: Progress | None
    ) -> dict[str, list[list[Sample]]]:
        """The samples of each row; what is wrong with a row is added to `faults`."""
        total = sum(map(len, rows.values()))
        made: dict[str, list[list[Sample]]] = {split: [] for split in rows}
        everything = ((split, row) for split, of_split in rows.items() for row in of_split)
        for done, (split, row) in enumerate(everything, start=1):
            if isinstance(row.content, Conversation) and self._chat is None:
                raise _no_template(row.place)
            try:
                made[split].append(self._samples(row))
            except InputError as error:
                fault = str(error)
                faults.append(fault if fault.startswith(row.place) else f"{row.place}: {fault}")
            if progress is not None:
                progress(done, total, row.place)
        return made

    def _samples(self, row: Row) -> list[Sample]:
        content = row.content
        if isinstance(content, Completion):
            only = self._settings.completion_only
            return [completion_sample(content, self._encoder, row.place, completion_only=only)]
        if isinstance(content, Conversation):
            assert self._chat is not None
            samples = self._chat.samples(content, row.place)
            self._parted += len(samples) > 1
            return samples
        return text_samples(content.text, self._encoder, row.place, self._settings.context)

    def notes(self) -> list[str]:
        """What the rows made so far are worth saying."""
        notes = []
        if self._parted:
            notes.append(
                f"{counted(self._parted, 'conversation')} became a sample for every turn: in one, the turns' prompts "
                "would not be those that a request sends, or no token would end each"
            )
        return notes + (self._chat.notes() if self._chat is not None else [])


def _no_template(place: str) -> InputError:
    return InputError(
        f"{place}: holds a conversation, and the model has no chat template; give a file with one, or rows of prompt "
        "and completion"
    )


def _fitted(
    path: Path, by_row: dict[str, list[list[Sample]]], settings: DataSettings, notes: list[str]
) -> dict[str, list[Sample]]:
    flat = {split: [sample for samples in rows for sample in samples] for split, rows in by_row.items()}
    everything = [sample for samples in flat.values() for sample in samples]
    if settings.too_long == "error":
        fitted(everything, settings.context, "error", notes)  # of all splits at once
    splits = {split: fitted(samples, settings.context, settings.too_long, notes) for split, samples in flat.items()}
    for split in ("train", "valid", "test"):
        if by_row[split] and not any(sample.trained for sample in splits[split]):
            raise InputError(f"{path}: nothing is left of the {split} rows: none fits into {settings.context} tokens")
    return splits


def _repeated(splits: dict[str, list[Sample]]) -> list[str]:
    """A note where evaluation would see what was trained on."""
    train = {tuple(sample.input_ids) for sample in splits["train"]}
    notes = []
    for split in ("valid", "test"):
        count = sum(tuple(sample.input_ids) in train for sample in splits[split])
        if count:
            notes.append(f"{count} of {len(splits[split])} {split} samples are among the training samples too")
    return notes


def _digest(splits: dict[str, list[Sample]]) -> str:
    hasher = hashlib.sha256()
    for split in ("train", "valid", "test"):
        hasher.update(f"{split} {len(splits[split])} ".encode())
        for sample in splits[split]:
            hasher.update(f"{len(sample.input_ids)} ".encode())
            hasher.update(array("i", sample.input_ids).tobytes() + array("i", sample.labels).tobytes())
    return hasher.hexdigest()
