"""The files that quality.py scores: made once, kept in its work folder, and scored once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import quality_peer
import quality_statistics
from quality_statistics import Scores, score_files
from quantlab.cli.console import progress

from quantlab.calibration.calibrated import CalibrationOptions
from quantlab.calibration.learned import LearnSettings
from quantlab.calibration.quantize import quantize_checkpoint
from quantlab.calibration.samples import CalibrationRequest, CalibrationSamples, open_calibration
from quantlab.calibration.work_folder import work_folder_of
from quantlab.checkpoint import Checkpoint, Tokenizer, load_tokenizer, open_checkpoint
from quantlab.checkpoint.atomic import atomic_file
from quantlab.checkpoint.checksums import model_digest
from quantlab.checkpoint.export import export_checkpoint
from quantlab.evaluation.perplexity import perplexity
from quantlab.evaluation.windows import Window, windows_of
from quantlab.search.allocate import quantize_to_target

FORMAT = "q4_1"


@dataclass(frozen=True)
class Settings:
    """What decides every figure of a work folder. `samples` None: the number that quantlab reads by default."""

    model: Path
    text: Path
    calibration: Path
    samples: int | None
    context: int
    learn_steps: int
    threads: int


@dataclass(frozen=True)
class File:
    """A GGUF file and what it scored on the evaluation's windows, float activations."""

    path: Path
    scores: Scores

    @cached_property
    def bytes(self) -> int:
        """Of all tensors."""
        return open_checkpoint(self.path).nbytes

    @property
    def bits_per_weight(self) -> float:
        """Over all parameters."""
        return 8 * self.bytes / open_checkpoint(self.path).parameters


class Files:
    """Makes files in `folder`, or takes those that an earlier run of the same settings left there."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        folder.mkdir(parents=True, exist_ok=True)
        self._claim()

    def _claim(self) -> None:
        chosen = self.settings
        deciding = {
            "model": model_digest(open_checkpoint(chosen.model)), "text": _digest(chosen.text),
            "calibration": _digest(chosen.calibration), "samples": chosen.samples, "context": chosen.context,
        }  # fmt: skip
        note = self.folder / "settings.json"
        if note.exists() and json.loads(note.read_text()) != deciding:
            raise SystemExit(f"{self.folder}: holds the files of another model, text, sample or context")
        note.write_text(json.dumps(deciding))

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The original."""
        return open_checkpoint(self.settings.model)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Its own."""
        return load_tokenizer(self.settings.model)

    @cached_property
    def original_gguf(self) -> Path:
        """The original's weights as they are, for llama.cpp's quantizer."""
        path = self.folder / "original.gguf"
        if not path.exists():
            export_checkpoint(self.settings.model, path, "gguf")
        return path

    def request(self, seed: int) -> CalibrationRequest:
        """The calibration windows of a seed."""
        return CalibrationRequest(self.settings.calibration, self.settings.samples, None, seed)

    def samples(self, seed: int) -> CalibrationSamples:
        """Those windows."""
        return open_calibration(self.checkpoint, self.request(seed))

    def ours(
        self, method: str, seed: int = 0, *, levels: int | None = None, recipe: str = FORMAT, uniform: bool = False
    ) -> Path:
        """By `quantlab quantize`; `uniform` where embedding and head take the recipe's one format too."""
        steps = f"-{self.settings.learn_steps}" if method == "learned" else ""
        more = ("-uniform" if uniform else "") + ("" if levels is None else f"-levels{levels}")
        drawn = "" if method == "rtn" else f"-s{seed}"
        path = self.folder / f"{method}-{recipe}{more}{steps}{drawn}.gguf"
        if not path.exists():
            options = CalibrationOptions() if method == "rtn" else CalibrationOptions(request=self.request(seed))
            options = replace(options, resume=work_folder_of(path).is_dir())
            formats = {"format": recipe, "uniform": True} if uniform else {"recipe": recipe}
            with progress(path.stem, "weights") as bar:
                quantize_checkpoint(
                    self.settings.model, path, **formats, method=method, levels=levels, calibration=options,
                    learning=LearnSettings(steps=self.settings.learn_steps, seed=seed),
                    threads=self.settings.threads, progress=bar,
                )  # fmt: skip
        return path

    def theirs(self, tools: quality_peer.LlamaTools, format: str, seed: int | None) -> Path:
        """By llama-quantize, with an importance matrix of a seed's windows, or without one."""
        threads, importance = self.settings.threads, None
        if seed is not None:
            matrix = self.folder / f"importance-s{seed}.gguf"
            importance = tools.importance(self.original_gguf, self.samples(seed), self.tokenizer, matrix, threads)
        path = self.folder / f"llama-{format}{'' if seed is None else f'-s{seed}'}.gguf"
        return tools.quantize(self.original_gguf, path, format, importance, threads)

    def mixed(self, method: str, target_bpw: float) -> Path:
        """By `--target-bpw`; sensitivities are measured once a method and kept."""
        path = self.folder / f"{method}-target{target_bpw:.4f}.gguf"
        if not path.exists():
            quantize_to_target(
                self.settings.model, path, target_bpw=target_bpw, method=method,
                calibration=CalibrationOptions(request=self.request(0)),
                learning=LearnSettings(steps=self.settings.learn_steps), plan_work=self.folder / f"planning-{method}",
                threads=self.settings.threads, overwrite=True, stage=progress,
            )  # fmt: skip
        return path

    def scored(self, paths: Sequence[Path]) -> list[File]:
        """Files against the original; those without scores all at once, since the original is computed anyway."""
        missing = [path for path in paths if not _scores_of(path).exists()]
        if missing:
            chosen = self.settings
            with progress(f"scoring {', '.join(path.stem for path in missing)}", "tokens") as bar:
                found = score_files(chosen.model, missing, self.windows, chosen.context, chosen.threads, bar)
            for path, scores in zip(missing, found, strict=True):
                quality_statistics.save(scores, _scores_of(path))
        return [File(path, quality_statistics.load(_scores_of(path))) for path in paths]

    @cached_property
    def windows(self) -> list[Window]:
        """Of the evaluation's text."""
        return windows_of(self.settings.text, self.tokenizer, self.settings.context)

    def made(self) -> list[Path]:
        """Every file of ours that was scored."""
        paths = sorted(self.folder.glob("*.gguf"))
        return [path for path in paths if not path.name.startswith("llama-") and _scores_of(path).exists()]

    def nll_by_int8(self, path: Path) -> tuple[float, float]:
        """Nats per token with int8 activations and an f16 cache over the same windows: ours, llama.cpp's."""
        kept, chosen = path.with_suffix(".int8.json"), self.settings
        if not kept.exists():
            theirs = quality_peer.llama_nll(path, self.windows, chosen.context, chosen.threads)
            ours = perplexity(
                path, chosen.text, context=chosen.context, activations="int8", threads=chosen.threads
            ).nll  # fmt: skip
            with atomic_file(kept, replace=True) as temporary:
                temporary.write_text(json.dumps([ours, theirs]))
        ours, theirs = json.loads(kept.read_text())
        return ours, theirs


def _scores_of(path: Path) -> Path:
    return path.with_suffix(".scores.npz")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
