"""A block's forward pass that stands still where a linear layer's inputs are there, until that layer has its weights.

Layers are quantized one group after the other, each behind its quantized predecessors. A pass that waits need not
compute again what came before the group; its intermediate values lie on the stack of a thread of its own meanwhile.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from quantlab.errors import InputError

if TYPE_CHECKING:
    import torch

    from quantlab.calibration.streamed_model import StreamedModel


class _AbandonedError(BaseException):
    """Unwinds a pass that nobody waits for any more."""


class PausedForward:
    """One batch's way through block `index` of `model`, from its inputs `hidden` [windows, length, width].

    Nothing runs between calls of `until`. It must be run to its end, or closed.

    Attributes:
        residual: what the outputs of the linear weight that it waits at are added to [windows, length, width]; None
            where they are not added.
    """

    def __init__(self, model: StreamedModel, index: int, hidden: torch.Tensor) -> None:
        self._model, self._index, self._hidden = model, index, hidden
        self.residual: torch.Tensor | None = None
        self._wanted: str | None = None
        self._found: torch.Tensor | None = None
        self._failure: BaseException | None = None
        self._abandoned = False
        self._go, self._there = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name=f"block-{index}", daemon=True)

    def until(self, name: str | None) -> torch.Tensor:
        """The inputs of a linear weight further on [windows, length, in], or for None the block's outputs.

        Raises:
            InputError, RuntimeError ...: what the computation raised.
        """
        self._wanted = name
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.release()
        self._there.acquire()
        if name is None:
            self._thread.join()  # it has nothing left to do
        if self._failure is not None:
            raise self._failure
        found, self._found = self._found, None
        assert found is not None
        return found

    def close(self) -> None:
        """Give up, if it has not ended; frees what the pass holds."""
        if self._thread.ident is None:
            return
        self._abandoned = True
        self._go.release()
        self._thread.join()

    def _run(self) -> None:
        try:
            hidden, self._hidden = self._hidden, None  # type: ignore[assignment]  # the pass alone holds it
            outputs = self._model.forward_block(self._index, hidden, self._meet)
            if self._wanted is not None:
                raise InputError(f"{self._wanted}: the block runs without it")
            self._found = outputs
        except _AbandonedError:
            return
        except BaseException as failure:  # the caller of `until` gets it
            self._failure = failure
        self._there.release()

    def _meet(self, name: str, inputs: torch.Tensor) -> None:
        if name != self._wanted:
            return
        self._found = inputs
        self.residual = self._model.residual() if self._model.is_writer(name) else None
        del inputs
        self._there.release()
        self._go.acquire()
        if self._abandoned:
            raise _AbandonedError
