"""Unfinished merges: a folder beside the destination, with the tensors that are finished, until all is written.

`output` grows into the destination, or into the float model that is then quantized, and `journal` names the tensors in
it that are complete, with their checksums: what a power cut took is noticed, and merged again.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantlab.checkpoint import unfinished
from quantlab.checkpoint.json_file import read_json
from quantlab.checkpoint.writer import CheckpointWriter
from quantlab.merging.tensor_merge import MergedTensor, WrongWeightsError

PACKING = "packing.json"


@dataclass(frozen=True)
class WorkPlaces:
    """What lies where in the folder OUT.merging."""

    folder: Path

    @property
    def output(self) -> Path:
        """The growing destination, float."""
        return self.folder / "output"

    @property
    def float_model(self) -> Path:
        """The whole merge in float, where the destination is packed."""
        return self.folder / "float"

    @property
    def packed_model(self) -> Path:
        """That, quantized."""
        return self.folder / "packed"

    def companions(self, name: str) -> Path:
        """A folder of the output's tokenizer files; GGUF files are called after it."""
        return self.folder / "companions" / name

    @property
    def journal(self) -> Path:
        """The names of finished tensors."""
        return self.folder / "journal.jsonl"


def work_folder_of(out: Path) -> Path:
    """Where the unfinished work for destination `out` is kept."""
    return out.with_name(f"{out.name}.merging")


@contextlib.contextmanager
def open_work(
    out: Path,
    options: Mapping[str, Any],
    packing: Mapping[str, Any],
    *,
    resume: bool,
    discard: bool,
    say: list[str],
) -> Iterator[Path]:
    """The work folder of destination `out`, locked. After a failure it stays if a tensor was finished that a resumed
    run can use; else it goes.

    Args:
        options: JSON values that decide the float merge; unfinished work of others is not gone on with.
        packing: JSON values that decide besides how it is packed: what was packed with others is packed again.
        resume: go on with unfinished work, if there is any.
        discard: throw unfinished work away otherwise, instead of refusing.
        say: takes a note where there is nothing to resume.

    Raises:
        InputError: there is unfinished work that was not asked for or of other options, another process is at it, or
            the folder cannot be written.
    """
    folder = work_folder_of(out)
    with unfinished.locked(folder):
        begun = WorkPlaces(folder).journal.is_file() and (folder / unfinished.OPTIONS).is_file()
        if unfinished.begin(folder, options, begun=begun, resume=resume, discard=discard, say=say):
            _forget_packing_of_others(folder, packing)
        else:
            unfinished.write_options(folder, packing, PACKING)
        try:
            yield folder
        except BaseException as error:
            if isinstance(error, WrongWeightsError) or not WorkPlaces(folder).journal.is_file():
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder)


def _forget_packing_of_others(folder: Path, packing: Mapping[str, Any]) -> None:
    file = folder / PACKING
    if not file.is_file() or read_json(file) != json.loads(json.dumps(packing)):
        for path in folder.glob(f"{WorkPlaces(folder).packed_model.name}*"):
            shutil.rmtree(path, ignore_errors=True)
        unfinished.write_options(folder, packing, PACKING)


class Journal:
    """The finished tensors of one output, a line each: what became of it, and its checksum there."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def note(self, tensor: MergedTensor, checksum: str | None) -> None:
        """Add a finished tensor."""
        line = json.dumps({**asdict(tensor), "checksum": checksum}) + "\n"
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line)

    def recorded(self) -> dict[str, MergedTensor]:
        """What is noted, by name."""
        return {tensor.name: tensor for tensor, _ in self._read()}

    def take_up(self, writer: CheckpointWriter) -> dict[str, MergedTensor]:
        """Have the writer go on with what is noted and still there; the journal keeps that alone."""
        kept = [
            (tensor, checksum)
            for tensor, checksum in self._read()
            if checksum is not None and tensor.name in writer.entries and writer.take_up(tensor.name, checksum)
        ]
        if self._path.exists():
            self._path.write_text("", encoding="utf-8")
        for tensor, checksum in kept:
            self.note(tensor, checksum)
        return {tensor.name: tensor for tensor, _ in kept}

    def _read(self) -> list[tuple[MergedTensor, str | None]]:
        """Each tensor's last line; one that a kill cut short is not there."""
        if not self._path.is_file():
            return []
        found: dict[str, tuple[MergedTensor, str | None]] = {}
        for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                found[row["name"]] = MergedTensor(row["name"], row["how"], float(row["squares"])), row["checksum"]
        return list(found.values())
