"""A transformers model of which one block at a time has weights: for models that are larger than memory.

The model is built on the meta device, so that masks, rotary embeddings and each family's own order of operations are
transformers'. A forward pass through blocks that only note their arguments tells what each block is called with; then
blocks get their weights one after the other, and activations go from block to block.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from torch import nn

from quantlab.calibration.batches import Batch
from quantlab.checkpoint import Checkpoint
from quantlab.errors import InputError
from quantlab.formats import FORMATS, PackedTensor
from quantlab.loading import empty_model
from quantlab.nn.int8 import int8_linear
from quantlab.quantization.workers import one_thread_each

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WRITERS = ("attn_output.weight", "ffn_down.weight")  # in GGUF's names: their outputs are added to the hidden states
SAME = 1e-2  # of the outputs' root mean square: by so much sums may differ, with activations in int8 or bfloat16
FINAL_NORM = "output_norm.weight"  # GGUF's name of the norm before the head, which all families share

BY_INT8 = FORMATS["q8_0"]  # what float weights are rounded to where activations are int8
Activations = Literal["float", "int8"]

TableReader = Callable[[np.ndarray], torch.Tensor]  # token ids, ascending -> their rows of the embedding
Note = Callable[[str, torch.Tensor], None]  # a linear weight's name, its inputs [windows, length, in]
Behind = Callable[[str], None]  # the name of a linear weight whose outputs were added to the hidden states just now


@dataclass(frozen=True)
class _Call:
    """What a block is called with after the hidden states."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class _ReachedError(Exception):
    """Inputs that were asked for are there: the rest need not run."""

    def __init__(self, inputs: torch.Tensor) -> None:
        self.inputs = inputs


class StreamedModel:
    """Embedding, blocks and final norm of a checkpoint, computed in `dtype`; blocks get weights as they are needed.

    What computes may be called from several threads at a time. With `activations` "int8" linear layers multiply like
    the native engine: by blocks, float weights being rounded to Q8_0, with inputs rounded to int8 in runs of 32. That
    takes a third of the time of fp32, and its errors are far below what statistics of the inputs notice.

    Attributes:
        blocks: number of transformer blocks.
        width: of the hidden states.
        tells_residual: whether passes keep what `residual` tells, a sum and a tensor of hidden states for each.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype = torch.float32,
        activations: Activations = "float",
        *,
        tells_residual: bool = False,
    ) -> None:
        self.checkpoint, self.dtype, self.activations = checkpoint, dtype, activations
        self.tells_residual = tells_residual
        self.model = empty_model(checkpoint).eval()
        _fill_buffers(self.model)
        self._stem = checkpoint.family.linear[0].partition(".*.")[0]
        self._blocks: Any = self.model.get_submodule(self._stem)  # Any: an nn.ModuleList
        self.blocks, self.width = len(self._blocks), int(self.model.config.get_text_config().hidden_size)
        self._calls: dict[int, list[_Call]] = {}  # by length of the windows
        self._notes = threading.local()
        self._packed: dict[str, PackedTensor] = {}  # linear weights whose products take int8 activations
        for index in range(self.blocks):
            for name in self.linear_names(index):
                self._watch(name)

    def block_names(self, index: int) -> list[str]:
        """The checkpoint's tensors of a block."""
        prefix = f"{self._stem}.{index}."
        return [name for name in self.checkpoint.names if name.startswith(prefix)]

    def linear_names(self, index: int) -> list[str]:
        """The linear weights of a block."""
        return [name for name in self.block_names(index) if len(self.checkpoint.shape(name)) == 2]

    def load_block(self, index: int, without: Collection[str] = ()) -> None:
        """Give a block its weights, but for those named: they are set before what needs them runs.

        Raises:
            InputError: as `read_weight`.
        """
        linear = self.linear_names(index)
        for name in self.block_names(index):
            if name not in without:
                weight = self.read_weight(name)
                packed = self._as_bytes(name, weight) if name in linear else None
                if packed is None:
                    self.set_weight(name, weight)
                else:
                    self._packed[name] = packed

    def _as_bytes(self, name: str, weight: torch.Tensor) -> PackedTensor | None:
        """A linear weight for products with int8 activations, if these are wanted and a block format can hold it."""
        if self.activations == "float" or not BY_INT8.fits(tuple(weight.shape)):
            return None
        try:
            return BY_INT8.quantize(weight, name)
        except InputError:  # a scale beyond half precision
            return None

    def read_weight(self, name: str) -> torch.Tensor:
        """A tensor in float32, linear weights [out, in].

        Raises:
            InputError: it is NaN or infinite somewhere, which would show as such inputs somewhere else.
        """
        weight = self.checkpoint.read(name, torch.float32)
        if not all(map(math.isfinite, weight.aminmax())):  # a twentieth of isfinite().all()'s time
            raise InputError(f"{self.checkpoint.path}: {name}: holds NaN or infinity; the checkpoint is damaged")
        return weight

    def set_weight(self, name: str, weight: torch.Tensor) -> None:
        """Replace a tensor; linear weights as [out, in]."""
        module, leaf = self._owner(name)
        value = weight.T if self.checkpoint.family.is_transposed(name) else weight
        setattr(module, leaf, nn.Parameter(value.to(self.dtype).contiguous(), requires_grad=False))

    def set_blocks(self, name: str, packed: PackedTensor) -> None:
        """Replace a linear weight by its quantized one."""
        if self.activations == "int8":
            self._packed[name] = packed
        else:
            self.set_weight(name, packed.dequantize())

    def release(self, names: Sequence[str]) -> None:
        """Drop weights."""
        for name in names:
            self._packed.pop(name, None)
            module, leaf = self._owner(name)
            empty = torch.empty_like(getattr(module, leaf), device="meta")
            setattr(module, leaf, nn.Parameter(empty, requires_grad=False))

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        module_name, _, leaf = name.rpartition(".")
        return self.model.get_submodule(module_name), leaf

    def embed(self, batches: Sequence[Batch], table: TableReader, start: int = 0) -> Iterator[torch.Tensor]:
        """The first block's inputs [windows, length, width] of each batch from the `start`-th on.

        Learns on the way how blocks are called, so it must run before they do; of the embedding only rows in use are
        read.
        """
        used = np.unique(np.concatenate([batch.ids.reshape(-1) for batch in batches]))
        for name in self._outer_names():
            self.set_weight(name, self.read_weight(name))
        self._set_table(table(used))
        for batch in batches:
            ids = torch.from_numpy(np.searchsorted(used, batch.ids))
            if batch.shape[1] not in self._calls:
                self._calls[batch.shape[1]] = self._learned_calls(ids[:1])
        for batch in batches[start:]:
            yield self._first_inputs(torch.from_numpy(np.searchsorted(used, batch.ids)))
        self.release([self.checkpoint.family.embedding])

    def _set_table(self, rows: torch.Tensor) -> None:
        module, leaf = self._owner(self.checkpoint.family.embedding)
        setattr(module, leaf, nn.Parameter(rows.to(self.dtype), requires_grad=False))

    def _outer_names(self) -> list[str]:
        """Tensors outside blocks, embedding and head: norms and position tables."""
        family = self.checkpoint.family
        names = (name for name in self.checkpoint.names if not name.startswith(f"{self._stem}."))
        return [name for name in names if name not in (family.embedding, family.head)]

    @torch.inference_mode()
    def _learned_calls(self, ids: torch.Tensor) -> list[_Call]:
        """From one window: masks and positions are alike for all of its length, and broadcast over batches."""
        calls: list[_Call] = []

        def note(hidden: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
            calls.append(_Call(arguments, keywords))
            return hidden

        with _forwards_replaced(self._blocks, note):
            self.model.base_model(input_ids=ids, use_cache=False)
        assert len(calls) == self.blocks, "the model does not call every block once"
        return calls

    @torch.inference_mode()
    def _first_inputs(self, ids: torch.Tensor) -> torch.Tensor:
        def stop(hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            raise _ReachedError(hidden)

        with _forwards_replaced(self._blocks[:1], stop):
            try:
                self.model.base_model(input_ids=ids, use_cache=False)
            except _ReachedError as reached:
                return reached.inputs
        raise AssertionError("the model runs without its first block")

    @torch.inference_mode()
    def forward_block(
        self, index: int, hidden: torch.Tensor, note: Note | None = None, behind: Behind | None = None
    ) -> torch.Tensor:
        """A loaded block's outputs for inputs [windows, length, width]; `note` gets what each linear weight meets,
        `behind` is called after each writer of a model that tells the residual.
        """
        call = self._calls[hidden.shape[1]][index]
        self._notes.note, self._notes.behind = note, behind
        self._notes.residual = hidden if self.tells_residual else None
        try:
            output = self._blocks[index](hidden, *call.arguments, **call.keywords)
        finally:
            self._notes.note = self._notes.behind = None
        return output[0] if isinstance(output, tuple) else output

    def follow_block(self, index: int, hidden: torch.Tensor, note: Note) -> None:
        """Show `note` which linear weights a block meets, in their order: their products are zeros, and they need not
        be loaded.
        """
        self._notes.follows = True
        try:
            self.forward_block(index, hidden, note)
        finally:
            self._notes.follows = False

    def residual(self) -> torch.Tensor | None:
        """The block's inputs and what was added to them so far, of this thread's pass [windows, length, width]; None
        where it is not to be told.
        """
        found: torch.Tensor | None = self._notes.residual
        return found

    def written(self, name: str) -> torch.Tensor:
        """`residual` just behind a writer with that linear weight, without its bias."""
        found, bias = self.residual(), self._owner(name)[0].bias
        assert found is not None, "written is for models that tell the residual"
        return found if bias is None else found - cast("torch.Tensor", bias)

    def multiplied(self, name: str) -> torch.Tensor:
        """The loaded linear weight that products are made with, float32 [out, in]."""
        if name in self._packed:
            return self._packed[name].dequantize()
        module, leaf = self._owner(name)
        weight: torch.Tensor = getattr(module, leaf).detach().float()
        return weight.T if self.checkpoint.family.is_transposed(name) else weight

    def is_writer(self, name: str) -> bool:
        """Whether a linear weight's outputs are added to the hidden states, in most families."""
        return (self.checkpoint.family.gguf_name(name) or "").endswith(WRITERS)

    def adds_up(self, index: int, hidden: torch.Tensor) -> bool:
        """Whether a loaded block's outputs are the sum of its inputs and its writers' outputs: not so where norms or
        factors stand between.
        """
        with one_thread_each():
            outputs, residual = self.forward_block(index, hidden[:1]).float(), self.residual()
            assert residual is not None, "adds_up is for models that tell the residual"
            apart = outputs - residual.float()
        return float(apart.square().mean()) <= SAME**2 * float(outputs.square().mean())

    def _watch(self, name: str) -> None:
        """Let a linear layer tell what it meets, and multiply by what it has then: blocks or a float weight."""
        module, rows, writes = self._owner(name)[0], self.checkpoint.shape(name)[0], self.is_writer(name)
        float_product = module.forward

        def product(inputs: torch.Tensor) -> torch.Tensor:
            packed = self._packed.get(name)
            if packed is None:
                return cast("torch.Tensor", float_product(inputs))
            bias = cast("torch.Tensor | None", module.bias)
            return int8_linear(inputs, packed.blocks, bias, packed.format)

        def forward(inputs: torch.Tensor) -> torch.Tensor:
            note = getattr(self._notes, "note", None)
            if note is not None:
                note(name, inputs)
            if getattr(self._notes, "follows", False):
                return inputs.new_zeros(*inputs.shape[:-1], rows)
            found = product(inputs)
            if writes and self._notes.residual is not None:
                self._notes.residual = self._notes.residual + found
                if (behind := getattr(self._notes, "behind", None)) is not None:
                    behind(name)
            return found

        module.forward = forward

    @torch.inference_mode()
    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """The head's inputs."""
        name = self.checkpoint.family.name_of_gguf(FINAL_NORM)
        assert name is not None
        return self._owner(name)[0](hidden)


@contextlib.contextmanager
def _forwards_replaced(blocks: Sequence[nn.Module], forward: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Blocks keep their attributes, which the model's loop reads, but compute `forward`."""
    for block in blocks:
        block.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _fill_buffers(model: PreTrainedModel) -> None:
    """Compute what the model derives from its configuration (rotary frequencies, scales), as transformers' loader does
    after it built a model on the meta device.
    """
    for module in model.modules():
        if module._buffers:
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty_like(buffer, device="cpu")
            model._init_weights(module)
