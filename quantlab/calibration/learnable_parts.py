"""What of a model is trained when scales are learned: its parameters by kind, and the tensors that come of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantlab.nn.learnable_scales import make_norms_learnable, make_scales_learnable, steps_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from quantlab.checkpoint import Checkpoint
    from quantlab.formats import PackedTensor


class LearnableParts:
    """Makes scales of a packed model trainable, in place, and on demand norms and codes.

    Args:
        student: the model, loaded from `start`.
        norms: whether the weights of normalization layers are trained too.
        codes: whether codes of up to five bits are trained too.
    """

    def __init__(self, student: PreTrainedModel, start: Checkpoint, *, norms: bool, codes: bool) -> None:
        self._blocks = make_scales_learnable(student, codes)
        self._norms: dict[str, torch.nn.Module] = {}
        if norms:
            self._norms = make_norms_learnable(student, {name: start.read(name).dtype for name in _vectors(start)})
        self._names = set(start.names)

    def parameters(self) -> dict[str, dict[str, torch.nn.Parameter]]:
        """Trained parameters by kind (`scales`, `norms`, `codes`) and name."""
        scales, codes = {}, {}
        for name, blocks in self._blocks.items():
            scales[f"{name}.stretch"] = blocks.stretch
            if blocks.shift is not None:
                scales[f"{name}.shift"] = blocks.shift
            if blocks.latent is not None:
                codes[name] = blocks.latent
        norms = {name: steps_of(module, _last(name)).original for name, module in self._norms.items()}
        return {kind: group for kind, group in (("scales", scales), ("norms", norms), ("codes", codes)) if group}

    def keep_codes_in_range(self) -> None:
        """See `LearnableBlocks.keep_codes_in_range`."""
        for blocks in self._blocks.values():
            blocks.keep_codes_in_range()

    @torch.no_grad()
    def tensors(self) -> dict[str, PackedTensor | torch.Tensor]:
        """What to write: packed tensors, and norms in the element types that they are stored in."""
        result: dict[str, PackedTensor | torch.Tensor] = {name: b.packed() for name, b in self._blocks.items()}
        for name, module in self._norms.items():
            stored = steps_of(module, _last(name))[0].stored
            result[name] = getattr(module, _last(name)).detach().to(stored)
        return {name: tensor for name, tensor in result.items() if name in self._names}


def _vectors(start: Checkpoint) -> list[str]:
    return [name for name in start.names if len(start.shape(name)) == 1]


def _last(name: str) -> str:
    return name.rpartition(".")[2]
