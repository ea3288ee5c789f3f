"""Unfinished work beside its destination: finished tensors and the activations to go on with, until all is written.

A step counts as done once its file is there, which appears in one rename; what it needs lies on the disk before.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.checkpoint import unfinished
from quantlab.checkpoint.atomic import atomic_file

if TYPE_CHECKING:
    import torch


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

    def activations(self, block: int, *, original: bool = False) -> Path:
        """The file of a block's inputs, behind quantized blocks or those of the original."""
        return self.path / f"{'original' if original else 'activations'}-{block:04}"

    def told(self, name: str) -> Path:
        """The file of what the original tells of a linear weight of the block at work."""
        return self.path / f"told-{name}"

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
    with unfinished.locked(folder):
        begun = any(folder.glob("*.safetensors"))
        unfinished.begin(folder, options, begun=begun, resume=resume, discard=discard, say=say)
        try:
            yield WorkFolder(folder)
        except BaseException:
            if not any(folder.glob("*.safetensors")):  # nothing that a resumed run could use
                shutil.rmtree(folder, ignore_errors=True)
            raise


def remove_work(out: Path) -> None:
    """Forget the work for a destination that is written."""
    shutil.rmtree(work_folder_of(out))
