"""One merge of models: opened, planned and checked at once, then carried out in a work folder."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantlab.adapters.reading import check_not_around
from quantlab.calibration.heap import reuse_pieces, share_heaps
from quantlab.checkpoint import open_checkpoint, open_writer
from quantlab.checkpoint.checkpoint import Checkpoint
from quantlab.checkpoint.expected_shapes import check_shapes
from quantlab.checkpoint.export import check_outside, packed_config
from quantlab.checkpoint.folder_writer import FolderWriter
from quantlab.checkpoint.gguf_writer import GgufWriter
from quantlab.checkpoint.tensors import TensorEntry
from quantlab.checkpoint.writer import CheckpointWriter, Companions
from quantlab.formats import BlockFormat, Recipe
from quantlab.merging.card import card_files
from quantlab.merging.companions import gathered
from quantlab.merging.config import MergeConfig
from quantlab.merging.conflict_files import ConflictFiles
from quantlab.merging.conflicts import ConflictReport
from quantlab.merging.gram_files import InputTexts, gather_grams, merged_models, uses_grams
from quantlab.merging.grams import MergeGrams
from quantlab.merging.memory import MemoryPlan, peak_resident_bytes, plan_memory
from quantlab.merging.packed_output import (
    Packing,
    in_float,
    quantize_merged,
    relative_errors,
    whole_error,
    write_packed,
)
from quantlab.merging.plan import plan_merge
from quantlab.merging.plan_types import MergePlan, TensorPlan
from quantlab.merging.references import ModelReference
from quantlab.merging.report import MergeReport, TensorOutcome
from quantlab.merging.sources import MergeSource, open_sources
from quantlab.merging.streaming import Passage, Progress, check_together, merge_tensors, show_tensors
from quantlab.merging.tensor_merge import MergedTensor, TensorMerger
from quantlab.merging.work import Journal, WorkPlaces

_Sources = Mapping[ModelReference, MergeSource]
_Kept = Mapping[str, tuple[Checkpoint, str]]  # packed tensors whose bytes stay: from where, and their names there


@dataclass(frozen=True)
class MergeRequest:
    """What is to be merged, and how; see `merge.merge_checkpoints`.

    Attributes:
        packing: of the output.
        texts: for methods that weigh by the layers' inputs.
        conflicts: where the conflict report goes, if one is wanted.
        limit: bytes of data that merging may have.
    """

    config: MergeConfig
    out: Path
    packing: Packing
    texts: InputTexts
    conflicts: ConflictFiles | None
    limit: int
    seed: int
    threads: int
    progress: Progress | None


class MergeJob:
    """One merge: everything that can be checked is, before any work.

    Raises:
        InputError: see `merge.merge_checkpoints`.
    """

    def __init__(self, request: MergeRequest) -> None:
        share_heaps()
        reuse_pieces()
        self._request = request
        config, out, packing = request.config, request.out, request.packing
        self.sources: _Sources = open_sources(config.references)
        for source in self.sources.values():
            check_outside(source.checkpoint, out)
            check_shapes(source.checkpoint)
            if source.adapter is not None:
                check_not_around(source.adapter.path, out)
        self.plan: MergePlan = plan_merge(config, self.sources)
        self.family = self.sources[self.plan.companions].family
        self.recipe = packing.rules(self.plan, self.family) if packing.is_wanted else None
        self.formats: dict[str, BlockFormat] = (
            {} if self.recipe is None else packing.formats(self.plan, self.recipe, self.family)
        )
        self.tensors: tuple[TensorPlan, ...] = in_float(self.plan.tensors, self.formats)
        check_together(self.tensors)
        request.texts.check(config.method, merged_models(self.tensors))
        self.notes = [*self.plan.notes]
        planned = self._float_writer(out if self.recipe is None else out.with_suffix(""), None)
        written = planned if self.recipe is None else self._planned_packed(self.recipe)
        self.bytes = written.tensor_bytes
        if isinstance(written, GgufWriter):
            self.bytes = written.file_bytes  # refuses what GGUF cannot hold
        self.memory: MemoryPlan = plan_memory(
            self.tensors,
            self.sources,
            planned.writes_through,
            limit=request.limit,
            threads=request.threads,
            observed=request.conflicts is not None,
        )

    @property
    def options(self) -> dict[str, Any]:
        """What decides the bytes of the float merge."""
        request = self._request
        return {
            "config": request.config.text,
            "inputs": {str(reference): _identity(source) for reference, source in self.sources.items()},
            "seed": request.seed,
            "output": "gguf" if request.out.suffix == ".gguf" else "folder",
            "recipe": None if self.recipe is None else self.recipe.to_config(),
            "statistics": {name: str(file) for name, file in request.texts.by_model.items()},
            "text": str(request.texts.others) if uses_grams(request.config.method) else None,
        }

    @property
    def packing_options(self) -> dict[str, Any]:
        """What decides besides how it is packed."""
        packing = self._request.packing
        asked = packing.calibration.request if packing.calibration is not None else None
        return {"method": packing.chosen_method, "calibration": None if asked is None else str(asked)}

    def run(self, places: WorkPlaces, overwrite: bool) -> tuple[dict[str, MergedTensor], dict[str, float] | None]:
        """Write the output; what became of the tensors, and the packed ones' errors."""
        checkpoint = self.sources[self.plan.companions].checkpoint
        companions = gathered(checkpoint, self.plan.files, places.companions(self._request.out.stem))
        if not self._request.packing.is_wanted:
            return self._merge(self._request.out, places, companions, overwrite), None
        journal = Journal(places.journal)
        if places.float_model.is_dir():
            merged = journal.recorded()
            if self._request.conflicts is not None:
                show_tensors(self._merger(None, Passage(self._request.progress)), self.memory)
        else:
            merged = self._merge(places.float_model, places, companions, overwrite=False)
        return merged, self._pack(places, merged, companions, overwrite)

    def _merge(
        self, destination: Path, places: WorkPlaces, companions: Companions, overwrite: bool
    ) -> dict[str, MergedTensor]:
        grams = gather_grams(
            self._request.config.method,
            self.tensors,
            self.sources,
            self._request.texts,
            places.folder,
            threads=self._request.threads,
            progress=self._request.progress,
        )
        journal, passage = Journal(places.journal), Passage(self._request.progress)
        merger = self._merger(grams, passage)
        writer = self._float_writer(destination, companions, overwrite, places.output)
        with writer:
            merged = journal.take_up(writer)

            def finished(tensor: MergedTensor) -> None:
                merged[tensor.name] = tensor
                journal.note(tensor, writer.stored_checksum(tensor.name))

            if self._request.conflicts is not None:
                show_tensors(merger, self.memory, only=frozenset(merged))
            merge_tensors(merger, self.memory, writer, finished, passage, done=frozenset(merged))
            if destination == self._request.out:
                self._add_card(writer, _float_types(self.tensors))
        self.notes += writer.notes
        return merged

    def _merger(self, grams: MergeGrams | None, passage: Passage) -> TensorMerger:
        return TensorMerger(
            self.sources,
            seed=self._request.seed,
            measure=self._request.packing.is_wanted,
            grams=None if grams is None else grams.of,
            observe=None if self._request.conflicts is None else self._request.conflicts.observe,
            advance=passage,
        )

    def _pack(
        self, places: WorkPlaces, merged: Mapping[str, MergedTensor], companions: Companions, overwrite: bool
    ) -> dict[str, float]:
        def quantizing(done: int, total: int, name: str) -> None:
            if self._request.progress is not None:
                self._request.progress(done, total, f"quantizing {name}")

        report = quantize_merged(
            places.float_model, places.packed_model, self._request.packing, self._request.threads, quantizing
        )
        packed = open_checkpoint(places.packed_model)
        kept = self._kept(merged)
        calibration = packed.sidecar("calibration")
        with open_writer(
            self._request.out,
            [packed.entry(name) for name in packed.names],
            packed_config(packed),
            companions=companions,
            replace=overwrite,
            sidecars={**self._sidecars(self._request.out), **({"calibration": calibration} if calibration else {})},
        ) as writer:
            write_packed(writer, packed, kept)
            self._add_card(writer, f"packed in {', '.join(sorted({format.name for format in self.formats.values()}))}")
        out = self._request.out
        self.bytes = out.stat().st_size if out.is_file() else writer.tensor_bytes
        self.notes += [*report.notes, *writer.notes]
        return relative_errors(report, kept, self.formats)

    def _written_conflicts(self, errors: Mapping[str, float] | None) -> ConflictReport | None:
        if self._request.conflicts is None:
            return None
        found = self._request.conflicts.write([plan.name for plan in self.tensors], errors)
        if not found.tensors:
            self.notes.append(
                f"the conflict report is empty: {self._request.config.method} merges no differences from a base"
            )
        return found

    def _kept(self, merged: Mapping[str, MergedTensor]) -> _Kept:
        """Packed tensors that all inputs share, in the output's format."""
        found = {}
        for plan in self.tensors:
            part = plan.parts[0]
            source = self.sources[part.model].checkpoint
            format = self.formats.get(plan.name)
            if merged[plan.name].how == "copied" and format is not None and source.format(part.name) == format:
                found[plan.name] = (source, part.name)
        return found

    def _float_writer(
        self,
        destination: Path,
        companions: Companions | None,
        overwrite: bool = False,
        unfinished: Path | None = None,
    ) -> CheckpointWriter:
        entries = [TensorEntry(plan.name, plan.dtype, plan.shape) for plan in self.tensors]
        return open_writer(
            destination,
            entries,
            self.plan.config,
            companions=companions,
            replace=overwrite,
            sidecars=self._sidecars(destination),
            unfinished=unfinished,
        )

    def _planned_packed(self, recipe: Recipe) -> CheckpointWriter:
        """A writer of what the packed output will be, to ask what it takes."""
        entries = [TensorEntry(plan.name, plan.dtype, plan.shape) for plan in self.plan.tensors]
        packed = [
            TensorEntry(name, "U8", (entry.shape[0], self.formats[name].row_bytes(entry.shape[1])))
            if (name := entry.name) in self.formats
            else entry
            for entry in entries
        ]
        config = {**self.plan.config, "quantization_config": recipe.to_config()}
        return open_writer(self._request.out, packed, config, sidecars=self._sidecars(self._request.out))

    def _sidecars(self, destination: Path) -> dict[str, dict[str, Any]]:
        """A GGUF file has no place for the config but among its metadata."""
        return {"merge": {"config": self._request.config.text}} if destination.suffix == ".gguf" else {}

    def _add_card(self, writer: CheckpointWriter, stored_as: str) -> None:
        if isinstance(writer, FolderWriter):
            for name, content in card_files(self._request.config, self.plan, self._request.out.name, stored_as).items():
                writer.add_file(name, content)

    def report(
        self,
        merged: Mapping[str, MergedTensor],
        errors: Mapping[str, float] | None,
        started: float,
        notes: list[str] | None = None,
    ) -> MergeReport:
        """What was done; of a dry run, what would be."""
        details = []
        for plan in self.tensors:
            how = merged[plan.name].how if merged else "planned"
            format = self.formats[plan.name].name if plan.name in self.formats else plan.dtype.lower()
            error = None if errors is None else errors.get(plan.name)
            details.append(TensorOutcome(plan.name, plan.shape, how, format, error))
        return MergeReport(
            method=self._request.config.method,
            tensors=len(details),
            copied=sum(tensor.how == "copied" for tensor in details),
            parameters=sum(TensorEntry(plan.name, plan.dtype, plan.shape).elements for plan in self.tensors),
            bytes=self.bytes,
            seconds=time.monotonic() - started,
            peak_rss_bytes=peak_resident_bytes(),
            memory_bytes=self.memory.expected,
            requantization_error=None if errors is None else whole_error(errors, merged),
            details=tuple(details),
            conflicts=self._written_conflicts(errors) if merged else None,
            notes=tuple(dict.fromkeys([*(notes or []), *self.notes])),
        )


def _float_types(tensors: tuple[TensorPlan, ...]) -> str:
    return " and ".join(sorted({plan.dtype.lower() for plan in tensors}))


def _identity(source: MergeSource) -> list[Any]:
    """What tells a model from another one under the same name: sizes and times of its files."""
    paths = [source.checkpoint.path, *([source.adapter.path] if source.adapter is not None else [])]
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.glob("*.*")))]
    return [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
