"""Unfinished work beside its destination: finished tensors and the activations to go on with, until all is written.

A step counts as done once its file is there, which appears in one rename; what it needs lies on the disk before.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.checkpoint.atomic import atomic_file
from quantlab.checkpoint.json_file import read_json
from quantlab.errors import InputError

if TYPE_CHECKING:
    import torch

OPTIONS = "options.json"


@dataclass(frozen=True)
class FinishedTensor:
    """A quantized tensor, uint8 [rows, row_bytes], and what its report says."""

    name: str
    blocks: torch.Tensor
    relative_error: float
    weighted_error: float
    note: str | None


class WorkFolder:
    """The folder OUT.quantizing; see `open_work`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def is_done(self, step: str) -> bool:
        """Whether a step's file is there."""
        return self._file(step).is_file()

    def load(self, step: str) -> list[FinishedTensor]:
        """The tensors of a finished step."""
        from safetensors import safe_open

        with safe_open(self._file(step), framework="pt") as file:
            rows = json.loads(file.metadata()["reports"])
            return [FinishedTensor(blocks=file.get_tensor(row["name"]), **row) for row in rows]

    def save(self, step: str, tensors: Sequence[FinishedTensor]) -> None:
        """Finish a step."""
        from safetensors.torch import save_file

        rows = [{key: value for key, value in asdict(t).items() if key != "blocks"} for t in tensors]
        with atomic_file(self._file(step), replace=True) as path:
            save_file({t.name: t.blocks for t in tensors}, path, metadata={"reports": json.dumps(rows)})

    def activations(self, block: int) -> Path:
        """The file of a block's inputs."""
        return self.path / f"activations-{block:04}"

    def _file(self, step: str) -> Path:
        return self.path / f"{step}.safetensors"


def work_folder_of(out: Path) -> Path:
    """Where unfinished work of destination `out` is kept."""
    return out.with_name(f"{out.name}.quantizing")


@contextlib.contextmanager
def open_work(
    out: Path, options: Mapping[str, Any], *, resume: bool, discard: bool, say: list[str]
) -> Iterator[WorkFolder]:
    """The work folder of destination `out`, locked; it stays until `remove_work`, unless no step was finished.

    Args:
        options: JSON values that decide the output; unfinished work of others is not gone on with.
        resume: go on with unfinished work, if there is any.
        discard: throw unfinished work away otherwise, instead of refusing.
        say: takes a note where there is nothing to resume.

    Raises:
        InputError: there is unfinished work that was not asked for or of other options, another process is at it, or
            the folder cannot be written.
    """
    folder = work_folder_of(out)
    with _locked(folder):
        begun = any(folder.glob("*.safetensors"))
        if begun and resume:
            check_options(folder, options)
        elif begun and not discard:
            raise InputError(f"{folder}: holds unfinished work; pass --resume to go on with it, or delete the folder")
        else:
            if resume:
                say.append(f"nothing to resume: {folder} holds no unfinished work; began anew")
            _clear(folder)
            write_options(folder, options)
        try:
            yield WorkFolder(folder)
        except BaseException:
            if not any(folder.glob("*.safetensors")):  # nothing that a resumed run could use
                shutil.rmtree(folder, ignore_errors=True)
            raise


def remove_work(out: Path) -> None:
    """Forget the work for a destination that is written."""
    shutil.rmtree(work_folder_of(out))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InputError(f"{folder}: another process is at work there; wait, or choose another name") from None
    try:
        yield
    finally:
        os.close(descriptor)


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_options(folder: Path, options: Mapping[str, Any]) -> None:
    """Note what decides the output of the work in `folder`."""
    with atomic_file(folder / OPTIONS, replace=True) as path:
        path.write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")


def check_options(folder: Path, options: Mapping[str, Any]) -> None:
    """Refuse work that was begun with other options, naming the first that differs."""
    begun, wanted = read_json(folder / OPTIONS), json.loads(json.dumps(options))
    for key in sorted({*begun, *wanted}):
        if begun.get(key) != wanted.get(key):
            raise InputError(
                f"{folder}: the unfinished work was begun with {key} {_short(begun.get(key))}, now it is "
                f"{_short(wanted.get(key))}; give the same options, or delete the folder"
            )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
