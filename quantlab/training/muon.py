"""Muon: momentum made orthogonal for weight matrices, AdamW for everything else, as one optimizer.

Keller Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; learning-rate scale of Liu et al. 2025
(Moonlight, arXiv 2502.16982), so that one AdamW-sized rate serves both groups. torch.optim.Muon iterates in bfloat16,
which took 21 s a step for a 9 M model on a CPU without bfloat16 instructions; the iteration here runs in the
gradients' own type, equal shapes batched (0.5 s), and AdamW shares the optimizer, since the Trainer takes one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic that drives all singular values towards 1
NEWTON_SCHULZ_STEPS = 5


class Muon(torch.optim.Optimizer):
    """Muon for `matrices` (2-D), AdamW for `others`; decoupled weight decay on `matrices` only."""

    def __init__(
        self,
        matrices: Iterable[torch.nn.Parameter],
        others: Iterable[torch.nn.Parameter],
        *,
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
    ) -> None:
        groups = [{"params": list(matrices), "muon": True}, {"params": list(others), "muon": False}]
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas, "eps": eps}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["muon"]:
                self._muon(parameters, group)
            else:
                for parameter in parameters:
                    self._adamw(parameter, group)
        return loss

    def _muon(self, parameters: list[torch.nn.Parameter], group: dict[str, Any]) -> None:  # Any: torch's group
        by_shape: dict[torch.Size, list[tuple[torch.nn.Parameter, torch.Tensor]]] = defaultdict(list)
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(_gradient(parameter), 1 - group["momentum"])
            update = torch.lerp(_gradient(parameter), state["momentum"], group["momentum"])  # Nesterov
            wide = update if update.shape[0] <= update.shape[1] else update.T
            by_shape[wide.shape].append((parameter, wide))
        for members in by_shape.values():
            directions = orthogonalize(torch.stack([wide for _, wide in members]))
            for (parameter, _), direction in zip(members, directions, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                scale = 0.2 * max(parameter.shape) ** 0.5  # an update as large, root mean square, as AdamW's
                update = direction if direction.shape == parameter.shape else direction.T
                parameter.add_(update, alpha=-group["lr"] * scale)

    def _adamw(self, parameter: torch.nn.Parameter, group: dict[str, Any]) -> None:
        state, gradient, (beta1, beta2) = self.state[parameter], _gradient(parameter), group["betas"]
        if not state:
            state.update(step=0, mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
        state["step"] += 1
        state["mean"].lerp_(gradient, 1 - beta1)
        state["square"].lerp_(gradient.square(), 1 - beta2)
        deviation = (state["square"] / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        parameter.addcdiv_(state["mean"], deviation, value=-group["lr"] / (1 - beta1 ** state["step"]))


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """The nearest semi-orthogonal matrices (U V^T of the singular value decomposition), approximately.

    Singular values end between about 0.7 and 1.2, which is enough for an update direction.

    Args:
        matrices: [count, rows, columns], rows <= columns.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x
