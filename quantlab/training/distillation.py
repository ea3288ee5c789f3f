"""Training towards a teacher's predictions, and how far predictions are from them; logits exist some at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from quantlab.checkpoint import load_tokenizer
from quantlab.checkpoint.checkpoint import Checkpoint
from quantlab.checkpoint.same_vocabulary import check_same_vocabulary
from quantlab.errors import InputError
from quantlab.nn.fake_quant import FakeQuantLinear
from quantlab.training.batches import Collator, SampleSet
from quantlab.training.next_token_loss import (
    LOGIT_BYTES,
    Head,
    labelled_states,
    logits_head,
    summed_cross_entropy,
    summed_in_chunks,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Student(nn.Module):
    """A model whose call returns the sum of its losses over labelled tokens, one fp32 number: what the Trainer trains.

    Without a teacher that is the next-token loss. With one it is KL(teacher || student) in nats, both softened by
    `temperature` and times its square, which makes gradients comparable between temperatures (Hinton, Vinyals, Dean
    2015, arXiv 1503.02531). The teacher is no part of the module: it is neither trained nor saved. A model with a
    teacher loses its dropout: of its noise the teacher knows nothing.
    """

    def __init__(
        self, model: PreTrainedModel, teacher: PreTrainedModel | None = None, temperature: float = 1.0
    ) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self._teacher, self.temperature = (teacher,), temperature  # in a tuple, which is no submodule
        if teacher is not None:
            _drop_nothing(model)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """int64 [rows, tokens] twice -> the sum; -100 is no label."""
        (teacher,) = self._teacher
        hidden, targets = labelled_states(self.model, input_ids, labels, **inputs)
        layer = self.model.get_output_embeddings()
        parameters = [p for p in layer.parameters() if p.requires_grad]
        chunk, head = _chunk(self.model), logits_head(self.model)
        with _packed_once(layer):
            if teacher is None:
                return summed_cross_entropy(hidden, targets, head, parameters, chunk)
            with torch.no_grad():
                taught, _ = labelled_states(teacher, input_ids, labels, **inputs)
            return summed_divergence(
                hidden, taught, head, logits_head(teacher), parameters, temperature=self.temperature, chunk=chunk
            )

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """The model's own."""
        self.model.gradient_checkpointing_enable(**options)


def _drop_nothing(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010 a number, not a module


def _packed_once(head: nn.Module) -> AbstractContextManager[None]:
    """For all chunks of positions: their gradients are computed in the forward pass."""
    return head.held_blocks() if isinstance(head, FakeQuantLinear) else nullcontext()


def summed_divergence(
    hidden: torch.Tensor,
    taught: torch.Tensor,
    head: Head,
    teacher_head: Head,
    parameters: list[nn.Parameter],
    *,
    temperature: float,
    chunk: int,
) -> torch.Tensor:
    """The sum of `temperature^2 * KL(teacher || student)` over positions in nats, as one fp32 number.

    Args:
        hidden: the student's hidden states [positions, width].
        taught: the teacher's, of any width, without gradient.
        parameters: those of the student's head that are trained.
        chunk: positions whose logits, of both, are held at a time.
    """

    def loss_of(inputs: torch.Tensor, part: slice) -> torch.Tensor:
        with torch.no_grad():
            target = F.log_softmax(teacher_head(taught[part]).float() / temperature, dim=-1)
        found = F.log_softmax(head(inputs).float() / temperature, dim=-1)
        return temperature**2 * F.kl_div(found, target, reduction="sum", log_target=True)

    return summed_in_chunks(hidden, loss_of, parameters, chunk)


def _chunk(model: PreTrainedModel) -> int:
    return max(1, LOGIT_BYTES // (4 * model.get_output_embeddings().weight.shape[0]))


@dataclass(frozen=True)
class HeldOut:
    """Means over labelled tokens, in nats: the next-token loss, and the divergence from a reference's predictions at
    temperature 1, None without one.
    """

    loss: float
    kld: float | None


@torch.no_grad()
def held_out_figures(
    model: PreTrainedModel, windows: SampleSet, batch: int, reference: PreTrainedModel | None
) -> HeldOut:
    """Both figures of `model`, in evaluation mode, over all windows, `batch` of them at a time."""
    training, chunk = model.training, _chunk(model)
    model.eval()
    loss = kld = count = 0.0
    for inputs in _batches(windows, batch, model.device):
        hidden, targets = labelled_states(model, **inputs)
        loss += float(summed_cross_entropy(hidden, targets, logits_head(model), [], chunk))
        if reference is not None:
            taught, _ = labelled_states(reference, **inputs)
            heads = logits_head(model), logits_head(reference)
            kld += float(summed_divergence(hidden, taught, *heads, [], temperature=1.0, chunk=chunk))
        count += len(targets)
    model.train(training)
    return HeldOut(loss / max(1, count), None if reference is None else kld / max(1, count))


def _batches(windows: SampleSet, size: int, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    collate = Collator(0)
    for start in range(0, len(windows), size):
        batch = collate(windows.windows[start : start + size])
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def check_teacher(student: Checkpoint, teacher: Checkpoint, names: tuple[str, str], context: int) -> None:
    """Refuse a teacher that cannot teach this student.

    Raises:
        InputError: another vocabulary, or fewer positions than `context`.
    """
    check_same_vocabulary(load_tokenizer(names[0]), load_tokenizer(names[1]), names)
    sizes = [checkpoint.shape(checkpoint.family.embedding)[0] for checkpoint in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"{names[0]} and {names[1]} have vocabularies of different sizes ({sizes[0]} and {sizes[1]} tokens); "
            "choose a teacher with the model's own"
        )
    limit = teacher.config.get("max_position_embeddings", teacher.config.get("n_positions"))
    if isinstance(limit, int) and context > limit:
        raise InputError(f"--context {context}: the teacher {names[1]} has {limit} positions")
