"""The models that qat.py compares: trained, quantized and scored once, and kept in its work folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import quality_statistics
from quality_statistics import Scores, score_files
from quantlab.cli.console import progress

from quantlab.calibration.calibrated import CalibrationOptions
from quantlab.calibration.quantize import quantize_checkpoint
from quantlab.calibration.samples import CalibrationRequest
from quantlab.calibration.work_folder import work_folder_of
from quantlab.checkpoint import load_tokenizer, open_checkpoint
from quantlab.checkpoint.checksums import model_digest
from quantlab.evaluation.windows import Window, windows_of
from quantlab.training.finetune import finetune
from quantlab.training.finetune_settings import FinetuneSettings
from quantlab.training.prepared import DataSettings
from quantlab.training.qat import qat
from quantlab.training.qat_settings import QatSettings


@dataclass(frozen=True)
class Target:
    """A format; `levels` None: all of its codes."""

    format: str
    levels: int | None = None

    @property
    def name(self) -> str:
        """In tables and file names."""
        return self.format + ("" if self.levels is None else f"-levels{self.levels}")


@dataclass(frozen=True)
class Settings:
    """What decides every figure of a work folder; `rates` are learning rates by what is trained, `method` makes the
    codes that a training of scales towards the original starts from, `temperature` is that of the divergence from it;
    `calibration_samples` windows of the training text calibrate `method`.
    """

    model: Path
    data: Path
    text: Path
    rates: dict[str, float]
    training: FinetuneSettings
    method: str = "rtn"
    temperature: float = 1.0
    calibration_samples: int = 128

    @property
    def tokens(self) -> int:
        """That a run trains on, repeats included."""
        chosen = self.training
        return (chosen.max_steps or 0) * chosen.batch_size * chosen.accumulation * chosen.context


class Runs:
    """Makes what is missing in `folder`, or takes what an earlier run of the same settings left there."""

    def __init__(self, settings: Settings, folder: Path, threads: int, device: str) -> None:
        self.settings, self.folder, self.threads, self.device = settings, folder, threads, device
        folder.mkdir(parents=True, exist_ok=True)
        self._claim()

    def _claim(self) -> None:
        chosen = dataclasses.asdict(self.settings)
        chosen |= {"model": model_digest(open_checkpoint(self.settings.model)), "data": _digest(self.settings.data),
                   "text": _digest(self.settings.text), "device": self.device}  # fmt: skip
        deciding = json.loads(json.dumps(chosen, default=str))
        note = self.folder / "settings.json"
        kept = json.loads(note.read_text()) if note.exists() else deciding
        if changed := [key for key in deciding if kept.get(key) != deciding[key]]:
            raise SystemExit(f"{self.folder}: holds runs with another {', '.join(changed)}; name another --work")
        note.write_text(json.dumps(deciding, indent=1))

    @cached_property
    def windows(self) -> list[Window]:
        """Of the held-out text."""
        return windows_of(self.settings.text, load_tokenizer(self.settings.model), self.settings.training.context)

    @property
    def rows(self) -> DataSettings:
        """All of the training text is trained on; what is held out has a file of its own."""
        return DataSettings(self.settings.training.context, held_out=0, too_long="cut")

    def rounded(self, target: Target) -> Path:
        """The original, rounded to nearest."""
        return self._quantized(self.settings.model, self.folder / f"rtn-{target.name}.gguf", target)

    def calibrated(self, target: Target) -> Path:
        """The original, quantized by `method` with windows of the training text."""
        path = self.folder / f"{self.settings.method}-{target.name}"
        if not path.exists():
            text = None if self.settings.method == "rtn" else self._calibration()
            with progress(path.stem, "weights") as bar:
                quantize_checkpoint(
                    self.settings.model, path, format=target.format, levels=target.levels, method=self.settings.method,
                    calibration=CalibrationOptions(text, resume=work_folder_of(path).is_dir()), threads=self.threads,
                    progress=bar,
                )  # fmt: skip
        return path

    def _calibration(self) -> CalibrationRequest:
        return CalibrationRequest(self.settings.data, self.settings.calibration_samples)

    def _quantized(self, source: Path, path: Path, target: Target) -> Path:
        if not path.exists():
            with progress(path.stem, "weights") as bar:
                quantize_checkpoint(
                    source, path, format=target.format, levels=target.levels, threads=self.threads, progress=bar
                )  # fmt: skip
        return path

    def trained(self, target: Target, train: str, seed: int, *, taught: bool, start: Path | None = None) -> Path:
        """By `quantlab qat`, towards the original's predictions or towards the text; from `start`, or the original."""
        origin = "" if start is None else f"-from-{start.name}"
        path = self.folder / f"qat-{target.name}-{train}-{'taught' if taught else 'alone'}{origin}-s{seed}.gguf"
        if not path.exists():
            heat = self.settings.temperature if taught else 1.0
            chosen = QatSettings(format=target.format, levels=target.levels, train=train, temperature=heat)
            if start is not None:
                chosen = QatSettings(train=train, temperature=heat)  # what starts from blocks keeps their format
            with progress(path.stem, "tokens") as bar:
                qat(
                    start or self.settings.model, self.settings.data, path, settings=chosen,
                    training=self._training(train, seed), data_settings=self.rows,
                    teacher=self.settings.model if taught else None, device=self.device,
                    resume=_unfinished(path), progress=bar,
                )  # fmt: skip
        return path

    def tuned(self, seed: int) -> Path:
        """The float model after as many tokens of the same text, in the same order and at the same rate."""
        path = self.folder / f"float-s{seed}"
        if not path.exists():
            settings = replace(self._training("full", seed), method="full")
            with progress(path.stem, "tokens") as bar:
                finetune(
                    self.settings.model, self.settings.data, path, settings=settings, data_settings=self.rows,
                    device=self.device, resume=_unfinished(path), progress=bar,
                )  # fmt: skip
        return path

    def tuned_and_rounded(self, target: Target, seed: int) -> Path:
        """That model, rounded to nearest."""
        return self._quantized(self.tuned(seed), self.folder / f"ptq-{target.name}-s{seed}.gguf", target)

    def _training(self, train: str, seed: int) -> FinetuneSettings:
        return replace(self.settings.training, learning_rate=self.settings.rates[train], seed=seed)

    def scores(self, paths: Sequence[Path]) -> list[Scores]:
        """Against the original, window by window; those without scores all at once."""
        missing = [path for path in paths if not _scores_of(path).exists()]
        if missing:
            with progress(f"scoring {len(missing)} models", "tokens") as bar:
                context = self.settings.training.context
                found = score_files(self.settings.model, missing, self.windows, context, self.threads, bar)
            for path, scores in zip(missing, found, strict=True):
                quality_statistics.save(scores, _scores_of(path))
        return [quality_statistics.load(_scores_of(path)) for path in paths]


def _scores_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.scores.npz")


def _unfinished(path: Path) -> bool:
    return path.with_name(f"{path.name}.training").exists()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
