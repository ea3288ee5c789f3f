"""Quantize block by block with the statistics of each block's own inputs, one block in memory at a time.

Statistics of a linear layer are taken with everything before it quantized already, within the block too: later layers
make up for what earlier ones lost, and each batch goes through each block once, multiplied by quantized weights. Where
the drift is corrected, the original's block runs before it, and tells what it met.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantlab.calibration import collection
from quantlab.calibration.activations import ActivationFile
from quantlab.calibration.batches import Batch, batches_of
from quantlab.calibration.block_pass import BlockPass
from quantlab.calibration.original_block import OriginalBlock
from quantlab.calibration.samples import CalibrationSamples
from quantlab.calibration.statistics_file import StatisticsParts
from quantlab.calibration.streamed_model import Activations, StreamedModel, TableReader
from quantlab.calibration.vocabulary import embedding_rows, head_name, quantize_vocabulary
from quantlab.calibration.work_folder import FinishedTensor, WorkFolder
from quantlab.checkpoint import Checkpoint
from quantlab.errors import InputError
from quantlab.formats import BlockFormat, PackedTensor
from quantlab.quantization.methods import quantize_weight
from quantlab.quantization.statistics import InputStatistics
from quantlab.quantization.workers import one_thread_each

Progress = Callable[[int, int, str], None]
Plan = Mapping[str, BlockFormat | None]

VOCABULARY = "vocabulary"  # the step after the blocks


@dataclass(frozen=True)
class CalibratedMethod:
    """How tensors are quantized: `options` go to `quantize_weight`, `levels` for linear layers of blocks alone; what
    runs, runs in `dtype`, linear layers by `activations`; `where` begins the errors.
    """

    name: str
    levels: int | None = None
    threads: int = 1
    dtype: torch.dtype = torch.float32
    activations: Activations = "float"
    options: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""

    @property
    def needs_drift(self) -> bool:
        """Whether the original has to run beside what is quantized."""
        return self.needs_second_moment and bool(self.options.get("correct_drift", True))

    @property
    def needs_second_moment(self) -> bool:
        """Whether tiles of it are not enough."""
        return self.name == "gptq"

    def used(self, statistics: InputStatistics | None) -> InputStatistics | None:
        """The part of `statistics` that the method uses."""
        if statistics is None or self.needs_second_moment:
            return statistics
        return replace(statistics, second_moment=None, tiles=statistics.known_tiles())

    def quantize(
        self, name: str, weight: torch.Tensor, format: BlockFormat, statistics: InputStatistics | None
    ) -> FinishedTensor:
        """Quantize a linear weight, float32 [out, in]."""
        result = quantize_weight(
            weight,
            format.name,
            self.name,  # type: ignore[arg-type]
            self.used(statistics),
            name=f"{self.where}{name}",
            levels=self.levels,
            threads=self.threads,
            **self.options,
        )
        return FinishedTensor(name, result.packed.blocks, result.relative_error, result.weighted_error, result.note)


class BlockwiseQuantizer:
    """Quantizes what `plan` gives a format, step by step: the blocks in order, then embedding, head and the rest.

    Steps that `work` holds already are taken from there.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        method: CalibratedMethod,
        samples: CalibrationSamples,
        work: WorkFolder,
        statistics: StatisticsParts | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.checkpoint, self.plan, self.method, self.work, self.statistics = checkpoint, plan, method, work, statistics
        self.batches: list[Batch] = batches_of(samples.windows, samples.length)
        beside = method.needs_drift
        streamed = partial(StreamedModel, checkpoint, method.dtype, method.activations, tells_residual=beside)
        self.model, self.original = streamed(), streamed() if beside else None
        self._progress, self._done = progress, 0

    def run(self) -> Iterator[FinishedTensor]:
        """All quantized tensors, as they are finished.

        Raises:
            InputError: inputs or weights that are NaN or infinite, or what `quantize_weight` refuses.
        """
        first = next((i for i in range(self.model.blocks) if not self.work.is_done(_block_step(i))), self.model.blocks)
        for index in range(first):
            yield from self._finished(self.work.load(_block_step(index)))
        if self.work.is_done(VOCABULARY):
            yield from self._finished(self.work.load(VOCABULARY))
            return
        self._embed(first)
        for index in range(first, self.model.blocks):
            yield from self._finished(self._quantize_block(index))
        yield from self._finished(self._quantize_rest())
        self._say("writing")

    def _finished(self, tensors: Sequence[FinishedTensor]) -> Iterator[FinishedTensor]:
        for tensor in tensors:
            self._done += int(np.prod(self.checkpoint.shape(tensor.name)))
            yield tensor

    def _say(self, note: str, within: int = 0) -> None:
        if self._progress is not None:
            self._progress(self._done + within, self.checkpoint.parameters, note)

    def _embed(self, first: int) -> None:
        """Write the first block's inputs; where `first` blocks are done, only learn how blocks are called."""
        self._say("embedding")
        self._write_embedded(self.model, self._table, first, original=False)
        if self.original is not None:
            self._write_embedded(self.original, lambda ids: embedding_rows(self.checkpoint, ids), first, original=True)

    def _write_embedded(self, model: StreamedModel, table: TableReader, first: int, *, original: bool) -> None:
        embedded = model.embed(self.batches, table, len(self.batches) if first else 0)
        if first:
            with one_thread_each():
                for _ in embedded:
                    pass
            return
        with self._activations(0, create=True, original=original) as hidden, one_thread_each():
            self._check_disk((2 if self.original is None or original else 4) * hidden.nbytes)
            for number, states in enumerate(embedded):
                hidden.write(number, states)
            hidden.sync()

    def _check_disk(self, needed: int) -> None:
        """Two blocks' activations lie on the disk at a time; with the original its own, and what its block tells."""
        free = shutil.disk_usage(self.work.path).free
        if needed > free:
            raise InputError(
                f"{self.work.path}: activations need {needed / 1e9:.2f} GB, and the disk has {free / 1e9:.2f} GB free; "
                "take fewer or shorter samples"
            )

    def _table(self, ids: np.ndarray) -> torch.Tensor:
        """Rows of the embedding as the first block meets them."""
        name = self.checkpoint.family.embedding
        rows = embedding_rows(self.checkpoint, ids)
        format = self.plan[name]
        if format is None:
            return rows
        searched = quantize_weight(rows, format.name, "search", None, name=name, threads=self.method.threads)
        return searched.packed.dequantize()

    def _activations(self, block: int, *, create: bool = False, original: bool = False) -> ActivationFile:
        return self._file(self.work.activations(block, original=original), self.model.width, create=create)

    def _file(self, path: Path, width: int, *, create: bool) -> ActivationFile:
        return ActivationFile(path, self.batches, width, self.method.dtype, create=create)

    def _quantize_block(self, index: int) -> list[FinishedTensor]:
        quantized = [name for name in self.model.linear_names(index) if self.plan[name] is not None]
        self.model.load_block(index, without=quantized)
        with contextlib.ExitStack() as opened:
            hidden = opened.enter_context(self._activations(index))
            groups = collection.input_groups(self.model, index, hidden.read(0))
            groups = [names for names in groups if any(self.plan[name] for name in names)]
            beside = None
            if self.original is not None:
                beside = opened.enter_context(self._original_block(self.original, index, [g[0] for g in groups]))
            block = opened.enter_context(BlockPass(self.model, index, self.batches, hidden, self.method.threads))
            finished = self._quantize_groups(block, beside, groups)
            self._say(self._place(index, ["outputs"], "computing"), _weights(self.checkpoint, finished))
            with self._activations(index + 1, create=True) as outputs:
                block.finish(outputs)
                outputs.sync()
        self.model.release(self.model.block_names(index))
        self.work.save(_block_step(index), finished)
        self.work.activations(index).unlink()
        self.work.activations(index, original=True).unlink(missing_ok=True)
        return finished

    @contextlib.contextmanager
    def _original_block(self, model: StreamedModel, index: int, names: Sequence[str]) -> Iterator[OriginalBlock]:
        """The original's block, run; tells of linear weights `names`."""
        self._say(self._place(index, ["original"], "computing"))
        model.load_block(index)
        paths = {name: self.work.told(name) for name in names}
        with contextlib.ExitStack() as opened:
            hidden = opened.enter_context(self._activations(index, original=True))
            block = OriginalBlock(model, index, self.batches, hidden)
            told = {name: self._file(path, block.width_told(name), create=True) for name, path in paths.items()}
            for file in told.values():
                opened.enter_context(file)
            self._check_disk(2 * hidden.nbytes + sum(file.nbytes for file in told.values()))
            with self._activations(index + 1, create=True, original=True) as outputs:
                block.run(told, outputs, self.method.threads)
                outputs.sync()
            yield block
        for path in paths.values():
            path.unlink()
        model.release(model.block_names(index))

    def _quantize_groups(
        self, block: BlockPass, beside: OriginalBlock | None, groups: list[list[str]]
    ) -> list[FinishedTensor]:
        finished: list[FinishedTensor] = []
        for group in groups:
            self._say(self._place(block.index, group, "reading"), _weights(self.checkpoint, finished))
            statistics = block.statistics(group[0], full=self.method.needs_second_moment, original=beside)
            self._keep(block.index, group, statistics)
            for name in group:
                format = self.plan[name]
                if format is not None:
                    self._say(self._place(block.index, [name], "fitting"), _weights(self.checkpoint, finished))
                    finished.append(self._quantized(name, format, statistics))
                    self.model.set_blocks(name, PackedTensor(finished[-1].blocks, format))
        return finished

    def _quantized(self, name: str, format: BlockFormat, statistics: InputStatistics) -> FinishedTensor:
        return self.method.quantize(name, self.model.read_weight(name), format, statistics)

    def _keep(self, index: int, group: Sequence[str], statistics: InputStatistics) -> None:
        if self.statistics is not None:
            self.statistics.add(_block_step(index), group, statistics)

    def _place(self, index: int, names: Sequence[str], doing: str) -> str:
        last = ", ".join(name.removesuffix(".weight").rpartition(".")[2] for name in names)
        return f"block {index + 1} of {self.model.blocks}: {doing} {last}"

    def _quantize_rest(self) -> list[FinishedTensor]:
        """Embedding, head, and whatever else the plan names outside the blocks."""
        self._say("embedding and head")
        head, name = None, head_name(self.checkpoint)
        if self.plan.get(name) is not None or self.statistics is not None:
            with self._activations(self.model.blocks) as hidden:
                head = collection.collect_head(
                    self.model, name, self.batches, hidden, self.method.threads, full=self.method.needs_second_moment
                )
            if self.statistics is not None:
                self.statistics.add(VOCABULARY, [name], head)
        finished = list(quantize_vocabulary(self.checkpoint, self.plan, self.method, head))
        self.work.save(VOCABULARY, finished)
        return finished


def _block_step(index: int) -> str:
    return f"block-{index:04}"


def _weights(checkpoint: Checkpoint, tensors: Sequence[FinishedTensor]) -> int:
    return sum(int(np.prod(checkpoint.shape(tensor.name))) for tensor in tensors)
