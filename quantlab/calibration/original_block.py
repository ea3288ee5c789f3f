"""The original's way through one block, computed once, before the block is quantized.

No quantized weight changes it, so it need not wait for any: what the drift is told from lies in files meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from quantlab.calibration import heap
from quantlab.calibration.activations import ActivationFile
from quantlab.calibration.batches import Batch
from quantlab.calibration.streamed_model import StreamedModel
from quantlab.quantization.workers import in_order


class OriginalBlock:
    """Block `index` of the original `model`, which is loaded and tells the residual.

    Where the block's outputs are its inputs and what its writers add, a writer is told of by the hidden states behind
    it, without its bias; all other linear weights by their inputs.

    Args:
        hidden: the block's inputs.
    """

    def __init__(self, model: StreamedModel, index: int, batches: Sequence[Batch], hidden: ActivationFile) -> None:
        self._model, self._index, self._batches, self._hidden = model, index, batches, hidden
        self._adds_up = model.adds_up(index, hidden.read(0))
        self._told: Mapping[str, ActivationFile] = {}
        heap.share_heaps()

    def is_told_behind(self, name: str) -> bool:
        """Whether what is told of a linear weight are the hidden states behind it."""
        return self._adds_up and self._model.is_writer(name)

    def width_told(self, name: str) -> int:
        """How many values a token has of what is told of a linear weight."""
        rows, columns = self._model.checkpoint.shape(name)
        return rows if self.is_told_behind(name) else columns

    def run(self, told: Mapping[str, ActivationFile], outputs: ActivationFile, threads: int) -> None:
        """Write what is told of some linear weights, and the block's outputs."""
        self._told = told

        def step(number: int) -> None:
            def note(name: str, inputs: torch.Tensor) -> None:
                if name in told and not self.is_told_behind(name):
                    told[name].write(number, inputs)

            def behind(name: str) -> None:
                if name in told and self.is_told_behind(name):
                    told[name].write(number, self._model.written(name))

            hidden = self._hidden.read(number)
            outputs.write(number, self._model.forward_block(self._index, hidden, note, behind))

        for _ in in_order(step, range(len(self._batches)), threads):
            pass

    def read(self, number: int, name: str) -> torch.Tensor:
        """What is told of a linear weight, for a batch [windows, length, `width_told`]."""
        return self._told[name].read(number)

    def weight(self, name: str) -> torch.Tensor:
        """The linear weight that its products are made with, float32 [out, in]."""
        return self._model.multiplied(name)
