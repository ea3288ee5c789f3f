"""A model whose weights are a merge, and how its loss changes with the merge's coefficients.

In memory are the model, in fp32, and the gradient of one tensor at a time: as soon as a backward pass has it, the
merged models' tensors are read part by part, their inner products with it are summed in float64, and it goes. With
W = sum of c_i W_i that is all that dL/dc_i = <dL/dW, W_i> takes (for task arithmetic W_i is the difference from the
base). Where the output is quantized, layers multiply by the blocks that their weights round to, and gradients pass
straight through.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
import torch.nn.functional as F

from quantlab.checkpoint.tensors import torch_dtype
from quantlab.formats import BlockFormat
from quantlab.merging.memory import PART_ELEMENTS, TensorWork
from quantlab.merging.methods.method import merge_part
from quantlab.merging.methods.table import METHODS
from quantlab.merging.plan_types import TensorPlan
from quantlab.merging.references import ModelReference
from quantlab.merging.sources import MergeSource
from quantlab.merging.tensor_merge import TensorMerger, rounded_bytes
from quantlab.nn.fake_quant import FakeQuantLinear, fake_quant_layers
from quantlab.nn.swap import fake_quantize_modules
from quantlab.search.coefficient_windows import Ids
from quantlab.search.coefficients import Coefficients
from quantlab.training.next_token_loss import LOGIT_BYTES, labelled_states, logits_head, summed_cross_entropy
from quantlab.training.sample import NO_LOSS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PART_TOKENS = 1024  # of one pass forward and backward, padding included, unless one window is longer

Look = Callable[[int, torch.Tensor | None, Sequence[torch.Tensor]], None]  # (first row, the base's rows, the models')


class MergedModel:
    """Trains nothing by itself; see `coefficient_training.Objective`. A context: threads end with it.

    Attributes:
        learnable: which groups have a tensor that coefficients change, bool [groups].

    Args:
        model: of the merge's shapes, fp32 (tests: float64); its weights are replaced.
        tensors: the plans of the output as a float model, what is quantized afterwards as fp32.
        sources: the models that are merged.
        formats: of the tensors that the output has packed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tensors: Sequence[TensorPlan],
        sources: Mapping[ModelReference, MergeSource],
        coefficients: Coefficients,
        formats: Mapping[str, BlockFormat],
    ) -> None:
        self._coefficients, self._group_of = coefficients, coefficients.group_of()
        self._family = next(iter(sources.values())).family
        self._tensors = [tensor for tensor in tensors if tensor.name in self._group_of]
        self._look: Look | None = None
        self._place = 0
        self._merger = TensorMerger(
            sources, seed=0, measure=False, grams=None, observe=self._observe, advance=lambda count, name: None
        )
        self._reading = ThreadPoolExecutor(1)
        self._moving = [tensor for tensor in self._tensors if not self._is_fixed(tensor)]
        self.learnable = np.zeros(len(coefficients.groups), bool)
        for tensor in self._moving:
            self.learnable[self._group_of[tensor.name]] = True
        self._prepare(model, formats)
        self._is_taken = False

    def _prepare(self, model: PreTrainedModel, formats: Mapping[str, BlockFormat]) -> None:
        self.model = model.requires_grad_(False)
        fake_quantize_modules(model, formats)
        self._found = np.zeros_like(self._coefficients.start)
        for tensor in self._moving:
            parameter = model.get_parameter(tensor.name).requires_grad_(True)
            parameter.register_post_accumulate_grad_hook(self._hook(tensor))
        self._rounded = [layer for _, layer in fake_quant_layers(model) if isinstance(layer, FakeQuantLinear)]
        self._held = ExitStack()
        self._head, output = logits_head(model), model.get_output_embeddings()
        self._head_parameters = [parameter for parameter in output.parameters() if parameter.requires_grad]
        self._chunk = max(1, LOGIT_BYTES // (4 * output.weight.shape[0]))

    def take(self, values: np.ndarray) -> None:
        """Have the weights that these coefficients give, [groups, models].

        Raises:
            InputError: a merged weight is NaN, infinite or beyond the output's type.
        """
        self._held.close()
        for tensor in self._moving if self._is_taken else self._tensors:
            self._merge(tensor, values[self._group_of[tensor.name]])
        self._is_taken = True
        self._held = ExitStack()
        for layer in self._rounded:
            self._held.enter_context(layer.held_blocks())

    def gradient(self, windows: Sequence[Ids]) -> tuple[float, np.ndarray]:
        """The mean loss of some windows in nats per token, and its gradient by the coefficients, [groups, models]."""
        self._found = np.zeros_like(self._coefficients.start)
        total, count = 0.0, sum(len(window) - 1 for window in windows)
        for part in parts_of(windows):
            ids, labels = padded(part)
            loss = self._summed_loss(ids.to(self.model.device), labels.to(self.model.device))
            total += float(loss.detach())
            loss.backward()
        return total / count, self._found / count

    @torch.no_grad()
    def losses(self, window: Ids) -> np.ndarray:
        """The loss of each token of a window but the first, float64, in nats."""
        ids = torch.tensor([window], device=self.model.device)
        hidden, targets = labelled_states(self.model, ids, ids)
        found = []
        for start in range(0, len(hidden), self._chunk):
            part = slice(start, start + self._chunk)
            found.append(F.cross_entropy(self._head(hidden[part]).float(), targets[part], reduction="none").cpu())
        return torch.cat(found).to(torch.float64).numpy()

    def _summed_loss(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden, targets = labelled_states(self.model, ids, labels)
        return summed_cross_entropy(hidden, targets, self._head, self._head_parameters, self._chunk)

    def _hook(self, tensor: TensorPlan) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            with torch.no_grad():
                self._found[self._group_of[tensor.name]] += self._products(tensor, gradient)

        return hook

    def _products(self, tensor: TensorPlan, gradient: torch.Tensor) -> np.ndarray:
        """The inner products of a gradient with what the coefficients multiply, float64 [models]."""
        rows, found = self._as_rows(tensor, gradient), np.zeros(len(tensor.parts))

        def look(first: int, base: torch.Tensor | None, tensors: Sequence[torch.Tensor]) -> None:
            part = rows[first : first + len(tensors[0])].cpu().to(torch.float64).reshape(-1)
            origin = 0.0 if base is None else float(torch.dot(part, base.to(torch.float64).reshape(-1)))
            for number, each in enumerate(tensors):
                found[number] += float(torch.dot(part, each.to(torch.float64).reshape(-1))) - origin

        self._read(tensor, look)
        return found

    @torch.no_grad()
    def _merge(self, tensor: TensorPlan, values: np.ndarray) -> None:
        """Write a tensor's merge into the model, rounded as the output's file has it."""
        target = self._as_rows(tensor, self.model.get_parameter(tensor.name).data)
        method, parameters = METHODS[tensor.method], self._coefficients.parameters(values)
        columns = math.prod(tensor.shape[1:])

        def look(first: int, base: torch.Tensor | None, tensors: Sequence[torch.Tensor]) -> None:
            merged = merge_part(method, base, tensors, parameters, offset=first * columns)
            stored = torch.from_numpy(rounded_bytes(merged, tensor)).view(torch_dtype(tensor.dtype))
            target[first : first + len(merged)] = stored.reshape(merged.shape).to(target.dtype)

        self._read(tensor, look)

    def _read(self, tensor: TensorPlan, look: Look) -> None:
        """Go over the rows of a tensor's inputs, in order."""
        columns = math.prod(tensor.shape[1:])
        self._look, self._place = look, 0
        self._merger.show(TensorWork(tensor, max(1, PART_ELEMENTS // max(1, columns)), 0), self._reading)

    def _observe(self, plan: TensorPlan, base: torch.Tensor | None, tensors: Sequence[torch.Tensor]) -> None:
        assert self._look is not None
        self._look(self._place, base, tensors)
        self._place += len(tensors[0])

    def _as_rows(self, tensor: TensorPlan, weight: torch.Tensor) -> torch.Tensor:
        """A weight or gradient of a module as the plan's rows: [out, in]."""
        return weight.T if weight.ndim == 2 and self._family.is_transposed(tensor.name) else weight

    def _is_fixed(self, tensor: TensorPlan) -> bool:
        """Whether no coefficient changes the tensor, for all models have the same one."""
        has_deltas = self._coefficients.method == "task_arithmetic" or self._coefficients.keeps_sum
        return has_deltas and self._merger.is_copied(tensor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self._held.close()
        self._reading.shutdown(cancel_futures=True)


def parts_of(windows: Sequence[Ids]) -> list[list[Ids]]:
    """Windows that go through the model together, in their order."""
    parts: list[list[Ids]] = []
    for window in windows:
        longest = max([len(window), *map(len, parts[-1] if parts else [])])
        if parts and longest * (len(parts[-1]) + 1) <= PART_TOKENS:
            parts[-1].append(window)
        else:
            parts.append([window])
    return parts


def padded(windows: Sequence[Ids]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels, int64 [windows, longest]; padding comes last, where no causal model looks, and has no loss."""
    length = max(map(len, windows))
    ids = torch.tensor([[*window, *[window[0]] * (length - len(window))] for window in windows])
    labels = torch.tensor([[*window, *[NO_LOSS] * (length - len(window))] for window in windows])
    return ids, labels


def learning_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")
