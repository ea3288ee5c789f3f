"""The runs that adapters.py compares: trained, fused and scored once, and kept in its work folder."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from adapter_models import Scored, differing_bytes, label_counts, live_model, scored
from quantlab.cli.console import progress

from quantlab.adapters.combine import weighted_adapters
from quantlab.adapters.fuse import write_fused
from quantlab.adapters.fusing import packed_bytes
from quantlab.calibration.calibrated import CalibrationOptions
from quantlab.calibration.fuse import fuse_adapter
from quantlab.calibration.quantize import quantize_checkpoint
from quantlab.calibration.samples import CalibrationRequest
from quantlab.checkpoint import load_tokenizer, open_checkpoint, open_writer
from quantlab.checkpoint.atomic import atomic_file
from quantlab.checkpoint.chat_text import chat_template
from quantlab.checkpoint.checksums import model_digest
from quantlab.checkpoint.export import packed_config
from quantlab.formats import format_named
from quantlab.loading import load_model
from quantlab.training.finetune import finetune
from quantlab.training.finetune_settings import FinetuneSettings
from quantlab.training.prepared import DataSettings, prepare_data
from quantlab.training.sample import Sample

EXACT = "exact"  # how an adapter is fused that was trained for its blocks
AGAIN = ("rtn", "search")  # and how a plain one: what chooses the codes anew
MERGE_AWARE = ("merge-aware", "regrid")  # without and with --regrid
SIDE = "side branch"  # not fused: the adapter's files as peft loads them


@dataclass(frozen=True)
class Data:
    """A data set as `finetune` takes it."""

    name: str
    path: Path
    prompt_field: str | None = None
    completion_field: str | None = None
    layout: str | None = None


@dataclass(frozen=True)
class Base:
    """A quantized base, or with no format the float model; `levels` None: all of the format's codes."""

    format: str | None
    levels: int | None = None

    @property
    def name(self) -> str:
        """In tables and file names."""
        return (self.format or "float") + ("" if self.levels is None else f"-levels{self.levels}")

    @property
    def activations(self) -> tuple[str, ...]:
        """That its models are scored with; training takes the first."""
        return ("float",) if self.format is None else ("int8", "float")

    @property
    def methods(self) -> tuple[str, ...]:
        """That can train on it; "lora" on a quantized base is a QLoRA."""
        if self.format is None:
            return ("lora",)
        block_sum = ("block-sum",) if format_named(self.format).has_minimum else ()
        return ("lora", *block_sum, *MERGE_AWARE)


FLOAT = Base(None)


@dataclass(frozen=True)
class Run:
    """One adapter."""

    data: Data
    base: Base
    method: str
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.data.name}-{self.base.name}-{self.method}-s{self.seed}"

    @property
    def ways(self) -> tuple[str, ...]:
        """To fuse it."""
        if self.base.format is None:
            return ()
        return AGAIN if self.method == "lora" else (EXACT,)


@dataclass(frozen=True)
class Settings:
    """What all runs have in common, and what decides every figure of a work folder."""

    model: Path
    base_method: str
    calibration: Path | None
    calibration_samples: int | None
    held_out: int
    rates: dict[str, float]
    training: FinetuneSettings


@dataclass(frozen=True)
class Fused:
    """A fused file's report: `update_error` is the worst tensor's share of the update that rounding took, None where
    fuse_adapter did not make the file; differing bytes are counted for the exact kinds.
    """

    exact: bool
    update_error: float | None
    bytes: int
    differing_bytes: int | None


@dataclass(frozen=True)
class Result:
    """What a run came to: by activations and by model ("live", the ways of fusing, perhaps "side branch"), the summed
    loss of each held-out sample, and the largest difference of a logit to the live model's.
    """

    eval_loss: float
    trainable_parameters: int
    tokens_per_second: float
    losses: dict[str, dict[str, list[float]]]
    logits: dict[str, dict[str, float]]
    fused: dict[str, Fused]


class Runs:
    """Makes what is missing in `folder`, or takes what an earlier run of the same settings left there."""

    def __init__(self, settings: Settings, data: Sequence[Data], folder: Path) -> None:
        self.settings, self.folder = settings, folder
        folder.mkdir(parents=True, exist_ok=True)
        self._samples: dict[str, list[Sample]] = {}
        self._claim(data)

    def _claim(self, data: Sequence[Data]) -> None:
        chosen = dataclasses.asdict(self.settings)
        chosen["model"] = model_digest(open_checkpoint(self.settings.model))
        chosen |= {f"data {one.name}": dataclasses.asdict(one) for one in data}
        deciding = json.loads(json.dumps(chosen, default=str))
        note = self.folder / "settings.json"
        kept = json.loads(note.read_text()) if note.exists() else {}
        if changed := [key for key in deciding if key in kept and kept[key] != deciding[key]]:
            raise SystemExit(f"{self.folder}: holds runs with another {', '.join(changed)}; name another --work")
        note.write_text(json.dumps(kept | deciding, indent=1))

    @cached_property
    def _calibration(self) -> CalibrationOptions:
        chosen = self.settings
        return CalibrationOptions(request=CalibrationRequest(chosen.calibration, chosen.calibration_samples))

    def data_settings(self, data: Data) -> DataSettings:
        """The same rows are held out for every seed: a file's last or drawn ones, of a folder its valid file."""
        held_out = None if data.path.is_dir() else self.settings.held_out
        return DataSettings(
            self.settings.training.context, held_out=held_out, prompt_field=data.prompt_field,
            completion_field=data.completion_field, prompt_layout=data.layout, too_long="skip",
        )  # fmt: skip

    def held_out(self, data: Data) -> list[Sample]:
        """The samples that every model is scored on."""
        if data.name not in self._samples:
            model = self.settings.model
            found = prepare_data(data.path, load_tokenizer(model), chat_template(model), self.data_settings(data))
            self._samples[data.name] = found.valid
        return self._samples[data.name]

    def tokens(self, data: Data) -> np.ndarray:
        """That carry loss in each held-out sample."""
        return label_counts(self.held_out(data))

    def base(self, base: Base) -> Path:
        """Its file."""
        if base.format is None:
            return self.settings.model
        path = self.folder / f"base-{base.name}.gguf"
        if not path.exists():
            with progress(path.stem, "weights") as bar:
                quantize_checkpoint(
                    self.settings.model, path, format=base.format, method=self.settings.base_method,
                    levels=base.levels, calibration=self._calibration_for(self.settings.base_method), progress=bar,
                )  # fmt: skip
        return path

    def _calibration_for(self, method: str) -> CalibrationOptions | None:
        return None if method == "rtn" else self._calibration

    def before(self, data: Data, base: Base) -> dict[str, np.ndarray]:
        """The base's summed loss of each sample, by activations."""
        kept = self.folder / f"{data.name}-{base.name}-before.json"
        if not kept.exists():
            found = {}
            for activations in base.activations:
                model = load_model(self.base(base), activations=activations)
                found[activations] = self._scored([model], data, kept.stem).losses[0].tolist()
            _keep(kept, found)
        return {name: np.array(losses) for name, losses in json.loads(kept.read_text()).items()}

    def result(self, run: Run) -> Result:
        """Train, fuse and score, unless that is done."""
        kept = self.folder / f"{run.name}.json"
        if not kept.exists():
            _keep(kept, dataclasses.asdict(self._made(run)))
        found = json.loads(kept.read_text())
        found["fused"] = {way: Fused(**report) for way, report in found["fused"].items()}
        return Result(**found)

    def training_settings(self, run: Run) -> FinetuneSettings:
        """`finetune`'s."""
        aware, regrid = run.method in MERGE_AWARE, run.method == "regrid"
        return replace(
            self.settings.training, method="lora" if aware else run.method, merge_aware=aware, regrid=regrid,
            levels=run.base.levels if aware else None, learning_rate=self.settings.rates[run.method], seed=run.seed,
        )  # fmt: skip

    def _made(self, run: Run) -> Result:
        trained = self._trained(run)
        fused, reports = {}, {}
        for way in run.ways:
            fused[way], reports[way] = self._fused(run, way)
        losses, logits = {}, {}
        for activations in run.base.activations:
            scores, names = self._scored_run(run, fused, activations)
            losses[activations] = {name: row.tolist() for name, row in zip(names, scores.losses, strict=True)}
            logits[activations] = dict(zip(names, scores.logits.tolist(), strict=True))
        return Result(trained["eval_loss"], trained["trainable_parameters"], trained["tokens_per_second"],
                      losses, logits, reports)  # fmt: skip

    def _adapter(self, run: Run) -> Path:
        return self.folder / "adapters" / run.name

    def _trained(self, run: Run) -> dict[str, Any]:
        """The `result` of training_log.json."""
        out = self._adapter(run)
        if not out.exists():
            out.parent.mkdir(exist_ok=True)
            with progress(run.name, "tokens") as bar:
                finetune(
                    self.base(run.base), run.data.path, out, settings=self.training_settings(run),
                    data_settings=self.data_settings(run.data), device="cpu",
                    resume=out.with_name(f"{out.name}.training").exists(), progress=bar,
                )  # fmt: skip
        log: dict[str, Any] = json.loads((out / "training_log.json").read_text())
        return log["result"]

    def _fused(self, run: Run, way: str) -> tuple[Path, Fused]:
        """The file, and how far it is from what was trained."""
        base, adapter = self.base(run.base), self._adapter(run)
        out = self.folder / "fused" / f"{run.name}-{way}.gguf"
        out.parent.mkdir(exist_ok=True)
        if way != EXACT and run.base.levels is not None:
            self._fused_with_levels(run, way, out)
            return out, Fused(False, None, out.stat().st_size, None)
        method = "search" if way == EXACT else way
        calibration = self._calibration_for(method)
        with progress(out.stem, "weights") as bar:
            report = fuse_adapter(
                base, adapter, out, method=method, calibration=calibration, overwrite=True, progress=bar
            )  # fmt: skip
        differing = None
        if way == EXACT:
            live = live_model(base, adapter, self.training_settings(run), "float")
            differing = differing_bytes(live, base, out)
        worst = max(tensor.update_error for tensor in report.tensors)
        return out, Fused(report.exact, worst, report.bytes, differing)

    def _fused_with_levels(self, run: Run, way: str, out: Path) -> None:
        """As `fuse_adapter` quantizes again, but with the base's number of codes: with all of them, the fused model
        would have more levels than the base.
        """
        source, work = open_checkpoint(self.base(run.base)), out.with_name(f"{out.stem}.work")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        write_fused(source, weighted_adapters(self._adapter(run)), work / "float", unpacked=True)
        with progress(out.stem, "weights") as bar:
            quantize_checkpoint(
                work / "float", work / "packed", format=run.base.format or "", method=way, levels=run.base.levels,
                calibration=self._calibration_for(way), progress=bar,
            )  # fmt: skip
        packed = open_checkpoint(work / "packed")
        adapted = {name for one, _ in weighted_adapters(self._adapter(run)) for name in one.pairs}
        entries = [source.entry(name) for name in source.names]
        with open_writer(out, entries, packed_config(source), companions=source, replace=True) as writer:
            for entry in entries:
                if entry.name in adapted:
                    writer.write_bytes(entry.name, packed_bytes(packed, entry.name).reshape(-1), entry)
                else:
                    writer.copy(entry.name, source)
        shutil.rmtree(work)

    def _scored_run(self, run: Run, fused: dict[str, Path], activations: str) -> tuple[Scored, list[str]]:
        base, adapter, settings = self.base(run.base), self._adapter(run), self.training_settings(run)
        models = {"live": live_model(base, adapter, settings, activations)}
        models |= {way: load_model(path, activations=activations) for way, path in fused.items()}
        if run.method == "block-sum":
            models[SIDE] = live_model(base, adapter, replace(settings, method="lora"), activations)
        return self._scored(list(models.values()), run.data, f"{run.name} {activations}"), list(models)

    def _scored(self, models: Sequence[Any], data: Data, title: str) -> Scored:
        with progress(f"scoring {title}", "samples") as bar:
            return scored(models, self.held_out(data), bar)


def _keep(path: Path, found: dict[str, Any]) -> None:
    with atomic_file(path, replace=True) as temporary:
        temporary.write_text(json.dumps(found))
