"""The next-token loss of a causal language model, without its logits: the head runs over some positions at a time.

Logits of 512 tokens in a vocabulary of 128 k take 262 MB in fp32, and their gradient as much. Here a chunk's logits,
its loss and its gradient are computed together and dropped; and positions without a label never meet the head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from quantlab.training.sample import NO_LOSS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


LOGIT_BYTES = 1 << 26  # of the logits that are held at a time; a packed head is unpacked once for each chunk

Head = Callable[[torch.Tensor], torch.Tensor]
LossOf = Callable[[torch.Tensor, slice], torch.Tensor]


def computes_loss(model: PreTrainedModel) -> None:
    """Let `model(input_ids, labels, ...)` return the sum of its next-token losses, one fp32 number, and no logits.

    In place, on the instance: whatever wraps the model (peft, data parallel) goes on calling it as it did. The sum is
    over labels that are not -100, each predicted from the position before it, as transformers shifts them.
    """
    head, layer = logits_head(model), model.get_output_embeddings()
    chunk = max(1, LOGIT_BYTES // (4 * layer.weight.shape[0]))

    def forward(input_ids: torch.Tensor, labels: torch.Tensor, **inputs: Any) -> torch.Tensor:
        hidden, targets = labelled_states(model, input_ids, labels, **inputs)
        parameters = [p for p in layer.parameters() if p.requires_grad]
        return summed_cross_entropy(hidden, targets, head, parameters, chunk)

    model.forward = forward


def labelled_states(
    model: PreTrainedModel, input_ids: torch.Tensor, labels: torch.Tensor, **inputs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden states [positions, width] from which labelled tokens are predicted, and those tokens' ids."""
    inputs["use_cache"] = False  # with one, packed samples would see each other
    body = getattr(model, model.base_model_prefix)
    hidden = body(input_ids=input_ids, **inputs).last_hidden_state
    targets = labels[:, 1:].reshape(-1)
    counted = targets != NO_LOSS
    return hidden[:, :-1].reshape(-1, hidden.shape[-1])[counted], targets[counted]


def logits_head(model: PreTrainedModel) -> Head:
    """From hidden states to logits, as the model's own forward pass does it."""
    layer = model.get_output_embeddings()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if cap is None:
        return layer
    return lambda hidden: torch.tanh(layer(hidden) / cap) * cap


def summed_cross_entropy(
    hidden: torch.Tensor, targets: torch.Tensor, head: Head, parameters: list[nn.Parameter], chunk: int
) -> torch.Tensor:
    """The sum of `cross_entropy(head(hidden), targets)` in nats, as one fp32 number.

    Args:
        hidden: [positions, width].
        targets: int64 [positions].
        parameters: those of the head that are trained.
        chunk: positions whose logits are held at a time.
    """

    def loss_of(inputs: torch.Tensor, part: slice) -> torch.Tensor:
        return F.cross_entropy(head(inputs).float(), targets[part], reduction="sum")

    return summed_in_chunks(hidden, loss_of, parameters, chunk)


def summed_in_chunks(hidden: torch.Tensor, loss_of: LossOf, parameters: list[nn.Parameter], chunk: int) -> torch.Tensor:
    """The sum of `loss_of(hidden[part], part)` over parts of `chunk` positions, as one fp32 number.

    Args:
        hidden: [positions, width].
        loss_of: the summed loss of some positions, one number, from their hidden states.
        parameters: whatever else it depends on that is trained.
    """
    return _SummedInChunks.apply(hidden, loss_of, chunk, *parameters)


class _SummedInChunks(torch.autograd.Function):
    """Computes the gradients in the forward pass, where each chunk's logits are at hand."""

    @staticmethod
    def forward(
        context: Any, hidden: torch.Tensor, loss_of: LossOf, chunk: int, *parameters: nn.Parameter
    ) -> torch.Tensor:
        wanted = any(context.needs_input_grad)
        gradients = [torch.zeros_like(tensor) for tensor in (hidden, *parameters)] if wanted else []
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            with torch.set_grad_enabled(wanted):
                inputs = hidden[part].detach().requires_grad_(wanted)
                loss = loss_of(inputs, part)
            total += loss.detach()
            if wanted:
                found = torch.autograd.grad(loss, [inputs, *parameters])
                gradients[0][part] = found[0]
                for gradient, addition in zip(gradients[1:], found[1:], strict=True):
                    gradient += addition
        context.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, *parameters = (saved * gradient for saved in context.saved_tensors)
        return hidden, None, None, *parameters
