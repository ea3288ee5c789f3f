"""What the original model says of the calibration windows: computed when asked for, or once, to a file."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from quantlab.checkpoint.atomic import atomic_folder
from quantlab.quantization.workers import in_order

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGEST_FILES = 4 << 30  # bytes; beyond them the teacher computes at every step
FULL_VOCABULARY = 8192  # entries; of larger ones a file keeps the likeliest
LIKELIEST = 1024

Progress = Callable[[int, int], None]  # (windows done, windows in all)


class Teacher(Protocol):
    """Whatever tells targets."""

    def targets(self, windows: np.ndarray, length: int) -> Targets:
        """Of the first `length` tokens of the windows with these numbers, int64 [windows]."""


@dataclass(frozen=True)
class Targets:
    """The teacher's natural log-probabilities of some windows: `log_p` [windows, length, kept], fp32.

    Where not all of the vocabulary is kept, `ids` int64 of the same shape says which entries, and `rest` fp32
    [windows, length] is ln of the sum over all others of p^(1 / temperature), by temperature.
    """

    log_p: torch.Tensor
    ids: torch.Tensor | None = None
    rest: dict[float, torch.Tensor] | None = None

    def divergence(self, logits: torch.Tensor, temperature: float) -> torch.Tensor:
        """KL(teacher || student) in nats, fp32 [windows, length], of a student's logits, both softened.

        Entries that were not kept count as one, so the divergence is a lower bound of that over all entries.
        """
        teacher = self.log_p / temperature
        student = F.log_softmax(logits.to(torch.float32) / temperature, dim=-1)
        if self.ids is not None and self.rest is not None:
            student = student.gather(-1, self.ids)
            others = torch.log1p(-student.exp().sum(dim=-1, keepdim=True).clamp(max=1 - 1e-6))
            student = torch.cat([student, others], dim=-1)
            teacher = torch.cat([teacher, self.rest[temperature][..., None]], dim=-1)
        teacher = F.log_softmax(teacher, dim=-1)
        return F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)


@torch.no_grad()
def logits_of(model: PreTrainedModel, windows: np.ndarray) -> torch.Tensor:
    """fp32 [windows, length, vocabulary] of token ids, int64 [windows, length]."""
    ids = torch.from_numpy(windows).to(model.device)
    return model(input_ids=ids, use_cache=False).logits.to(torch.float32)


class LiveTeacher:
    """Computes targets of windows of `ids`, int64 [windows, longest], whenever they are asked for."""

    def __init__(self, model: PreTrainedModel, ids: np.ndarray) -> None:
        self._model, self._ids = model, ids

    def targets(self, windows: np.ndarray, length: int) -> Targets:
        """Of the first `length` tokens of the windows with these numbers, int64 [windows]."""
        return Targets(F.log_softmax(logits_of(self._model, self._ids[windows, :length]), dim=-1))


def kept_entries(vocabulary: int) -> int:
    """How many entries of the vocabulary a file keeps."""
    return vocabulary if vocabulary <= FULL_VOCABULARY else LIKELIEST


def stored_bytes(windows: int, length: int, vocabulary: int) -> int:
    """Size of a `StoredTeacher`'s files."""
    kept = kept_entries(vocabulary)
    return windows * length * (2 * kept if kept == vocabulary else 6 * kept + 8)


class StoredTeacher:
    """Targets in memory-mapped files: log-probabilities in fp16, whose rounding costs about 1e-6 nats.

    The likeliest entries are enough for large vocabularies; what all others weigh is kept at the temperatures 1 and
    `temperature`.
    """

    def __init__(self, folder: Path, temperature: float, device: torch.device) -> None:
        self._temperatures, self._device = (1.0, temperature), device
        self._row_of = {int(number): row for row, number in enumerate(np.load(folder / "windows.npy"))}
        self._log_p = np.load(folder / "log_p.npy", mmap_mode="r")
        is_whole = not (folder / "ids.npy").exists()
        self._ids = None if is_whole else np.load(folder / "ids.npy", mmap_mode="r")
        self._rest = None if is_whole else np.load(folder / "rest.npy", mmap_mode="r")

    def targets(self, windows: np.ndarray, length: int) -> Targets:
        """Of the first `length` tokens of the windows with these numbers, int64 [windows]."""
        rows = [self._row_of[int(window)] for window in windows]
        log_p = torch.from_numpy(self._log_p[rows, :length]).to(self._device, torch.float32)
        if self._ids is None or self._rest is None:
            return Targets(log_p)
        ids = torch.from_numpy(self._ids[rows, :length]).to(self._device, torch.int64)
        rest = torch.from_numpy(self._rest[rows, :length]).to(self._device)
        return Targets(log_p, ids, dict(zip(self._temperatures, rest.unbind(dim=-1), strict=True)))


def open_teacher(
    model: PreTrainedModel,
    ids: np.ndarray,
    windows: np.ndarray,
    temperature: float,
    folder: Path,
    progress: Progress | None = None,
    threads: int = 1,
) -> Teacher:
    """A teacher that reads its files in `folder`, written first if they are not there, or one that computes if they
    would be too large for the disk or beyond 4 GB.

    Args:
        ids: token ids, int64 [all windows, length].
        windows: the numbers of those it will be asked for, each once.
        threads: how many windows are computed at a time for the files; their bits do not depend on it.
    """
    live, length = LiveTeacher(model, ids), ids.shape[1]
    if not folder.exists():
        vocabulary = model.config.get_text_config().vocab_size
        size = stored_bytes(len(windows), length, vocabulary)
        if size > min(LARGEST_FILES, shutil.disk_usage(folder.parent).free // 2):
            return live
        store_targets(folder, live, windows, length, vocabulary, temperature, progress, threads)
    return StoredTeacher(folder, temperature, model.device)


def store_targets(
    folder: Path,
    live: LiveTeacher,
    windows: np.ndarray,
    length: int,
    vocabulary: int,
    temperature: float,
    progress: Progress | None = None,
    threads: int = 1,
) -> None:
    """Write a `StoredTeacher`'s folder, which appears complete or not at all.

    Args:
        windows: the numbers of the windows to keep, each once.
        length: their tokens.
        threads: how many windows are computed at a time; the bits do not depend on it.
    """
    kept = kept_entries(vocabulary)
    temperatures = (1.0, temperature)

    def compute(number: int) -> list[np.ndarray]:
        return _rows(live.targets(np.array([number]), length).log_p[0], kept, temperatures)

    with atomic_folder(folder, replace=True) as temporary:
        shape = (len(windows), length)
        arrays = [_new_array(temporary / "log_p.npy", np.float16, (*shape, kept))]
        if kept < vocabulary:
            arrays.append(_new_array(temporary / "ids.npy", np.int32, (*shape, kept)))
            arrays.append(_new_array(temporary / "rest.npy", np.float32, (*shape, len(temperatures))))
        for row, parts in enumerate(in_order(compute, windows, threads)):
            for array, part in zip(arrays, parts, strict=True):
                array[row] = part
            if progress is not None:
                progress(row + 1, len(windows))
        np.save(temporary / "windows.npy", windows)


@torch.no_grad()
def _rows(full: torch.Tensor, kept: int, temperatures: tuple[float, ...]) -> list[np.ndarray]:
    """What the files hold of one window's log-probabilities [length, vocabulary]."""
    if kept == full.shape[-1]:
        return [full.cpu().numpy().astype(np.float16)]
    top, ids = full.topk(kept, dim=-1)
    others = full.scatter(-1, ids, -torch.inf)
    rest = [(others / temperature).logsumexp(dim=-1) for temperature in temperatures]
    return [top.cpu().numpy().astype(np.float16), ids.cpu().numpy(), torch.stack(rest, dim=-1).cpu().numpy()]


def _new_array(path: Path, dtype: type, shape: tuple[int, ...]) -> np.memmap:
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
