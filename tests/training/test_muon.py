"""The optimizer: orthogonal updates for matrices, torch's own AdamW for the rest, and an exact way to continue."""

from __future__ import annotations

import copy

import pytest
import torch

from quantlab.training.muon import Muon, orthogonalize


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nearest_orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """U V^T of torch's own singular value decomposition."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 16, 64), (2, 64, 96), (1, 1, 32)])
def test_singular_values_come_near_one(shape: tuple[int, ...]) -> None:
    """Five steps take the singular values of random matrices to between 0.6 and 1.3, whatever their size was."""
    for scale in (1.0, 1e-4, 1e4):
        values = torch.linalg.svdvals(orthogonalize(scale * random(*shape)))
        assert values.min() > 0.6
        assert values.max() < 1.3


@pytest.mark.parametrize("shape", [(16, 16), (16, 64), (64, 96)])
def test_the_direction_is_that_of_the_polar_factor(shape: tuple[int, int]) -> None:
    """The cosine between the result and U V^T is near 1, and in the basis of singular vectors the result is diagonal.

    The bound 0.97 follows from the values' spread: for values s the cosine is mean(s) / root-mean-square(s), which is
    at least 2 sqrt(0.6 * 1.3) / (0.6 + 1.3) = 0.93 for any in [0.6, 1.3] and higher unless all lie at the ends.
    """
    matrix = random(*shape)
    result = orthogonalize(matrix[None])[0]
    cosine = torch.nn.functional.cosine_similarity(result.flatten(), nearest_orthogonal(matrix).flatten(), dim=0)
    assert cosine > 0.97
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inner = left.T @ result @ right.T
    assert (inner - inner.diag().diag()).abs().max() < 1e-4


def test_matrices_of_a_batch_do_not_meet() -> None:
    """Equal shapes are computed together; each result is what the matrix gives alone."""
    batch = random(4, 8, 24)
    together = orthogonalize(batch)
    for matrix, result in zip(batch, together, strict=True):
        torch.testing.assert_close(orthogonalize(matrix[None])[0], result, rtol=0, atol=1e-6)


def test_a_zero_matrix_stays_zero() -> None:
    """No gradient, no direction: nothing becomes NaN."""
    assert torch.equal(orthogonalize(torch.zeros(1, 4, 8)), torch.zeros(1, 4, 8))


def test_one_muon_step_by_hand() -> None:
    """p - lr * (decay * p + 0.2 sqrt(longer side) * orthogonalized Nesterov momentum), for tall and wide matrices."""
    lr, decay, momentum = 0.1, 0.5, 0.9
    for shape in ((8, 24), (24, 8)):
        start, gradient = random(*shape, seed=1), random(*shape, seed=2)
        parameter = torch.nn.Parameter(start.clone())
        parameter.grad = gradient
        Muon([parameter], [], lr=lr, weight_decay=decay, momentum=momentum).step()
        nesterov = (1 - momentum) * gradient + momentum * (1 - momentum) * gradient  # a multiple of the gradient
        wide = nesterov if shape[0] < shape[1] else nesterov.T
        direction = orthogonalize(wide[None])[0]
        direction = direction if shape[0] < shape[1] else direction.T
        expected = start - lr * (decay * start + 0.2 * 24**0.5 * direction)
        torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-6)


def test_a_muon_update_is_as_large_as_an_adamw_update() -> None:
    """Root mean square 0.2 per unit of learning rate, so that one rate serves both groups.

    A semi-orthogonal [m, n] matrix with n >= m has a root mean square of sqrt(1 / n); 0.2 sqrt(n) makes that 0.2, and
    singular values between 0.6 and 1.3 keep it between 0.12 and 0.26.
    """
    for shape in ((16, 16), (16, 128), (128, 16)):
        parameter = torch.nn.Parameter(torch.zeros(shape))
        parameter.grad = random(*shape)
        Muon([parameter], [], lr=1.0, weight_decay=0.0).step()
        assert 0.12 < float(parameter.detach().square().mean().sqrt()) < 0.26


def test_the_other_group_is_torchs_adamw() -> None:
    """Twenty steps on vectors and a table equal torch.optim.AdamW(weight_decay=0) step for step to 1e-6."""
    ours = [torch.nn.Parameter(random(33, seed=1)), torch.nn.Parameter(random(12, 8, seed=2))]
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    settings = {"lr": 3e-2, "betas": (0.9, 0.95), "eps": 1e-10}
    one = Muon([], ours, weight_decay=0.3, **settings)
    other = torch.optim.AdamW(theirs, weight_decay=0.0, **settings)
    for step in range(20):
        for mine, yours in zip(ours, theirs, strict=True):
            mine.grad = random(*mine.shape, seed=100 + step) * 10 ** (step % 3 - 1)
            yours.grad = mine.grad.clone()
        one.step()
        other.step()
        for mine, yours in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, yours, rtol=0, atol=1e-6)


def test_weight_decay_touches_matrices_only() -> None:
    """With gradients of zero, matrices shrink by 1 - lr * decay and the rest stays as it is."""
    matrix, vector = torch.nn.Parameter(random(4, 8)), torch.nn.Parameter(random(8))
    before = matrix.detach().clone(), vector.detach().clone()
    for parameter in (matrix, vector):
        parameter.grad = torch.zeros_like(parameter)
    Muon([matrix], [vector], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(matrix.detach(), before[0] * 0.95, rtol=1e-6, atol=0)
    assert torch.equal(vector.detach(), before[1])


def test_parameters_without_a_gradient_stay() -> None:
    """A frozen or unused parameter is not moved, not even by weight decay."""
    matrix, used = torch.nn.Parameter(random(4, 8)), torch.nn.Parameter(random(4, 8, seed=1))
    before = matrix.detach().clone()
    used.grad = random(4, 8, seed=2)
    Muon([matrix, used], [torch.nn.Parameter(random(3))], lr=0.1).step()
    assert torch.equal(matrix.detach(), before)


class LeastSquares:
    """Minimize |X W^T + b - Y|^2 where Y = X A^T + c: the minimum is zero, at (A, c)."""

    def __init__(self) -> None:
        self.inputs, self.answer, self.offset = random(128, 8, seed=3), random(4, 8, seed=4), random(4, seed=5)
        self.weight, self.bias = torch.nn.Parameter(torch.zeros(4, 8)), torch.nn.Parameter(torch.zeros(4))
        self.optimizer = Muon([self.weight], [self.bias], lr=0.1, weight_decay=0.0)

    def loss(self) -> torch.Tensor:
        error = self.inputs @ (self.weight - self.answer).T + self.bias - self.offset
        return error.square().mean()

    def step(self) -> float:
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


def test_a_least_squares_problem_is_solved() -> None:
    """With a falling learning rate the known solution is found."""
    problem = LeastSquares()
    first = problem.step()
    for step in range(300):
        for group in problem.optimizer.param_groups:
            group["lr"] = 0.1 * (1 - step / 300)
        problem.step()
    assert float(problem.loss().detach()) < 1e-4 * first
    torch.testing.assert_close(problem.weight.detach(), problem.answer, rtol=0, atol=0.02)
    torch.testing.assert_close(problem.bias.detach(), problem.offset, rtol=0, atol=0.02)


def test_a_saved_optimizer_continues_identically() -> None:
    """Five steps, a round trip of the state through a file's worth of bytes, five more: equal to ten, bit for bit."""
    whole, interrupted, resumed = LeastSquares(), LeastSquares(), LeastSquares()
    for _ in range(10):
        whole.step()
    for _ in range(5):
        interrupted.step()
    resumed.weight.data.copy_(interrupted.weight.data)
    resumed.bias.data.copy_(interrupted.bias.data)
    resumed.optimizer.load_state_dict(copy.deepcopy(interrupted.optimizer.state_dict()))
    for _ in range(5):
        resumed.step()
    assert torch.equal(resumed.weight, whole.weight)
    assert torch.equal(resumed.bias, whole.bias)


def test_a_closure_gives_the_loss() -> None:
    """As torch's optimizers do: the closure runs with gradients on, and its value is returned."""
    problem = LeastSquares()

    def closure() -> float:
        problem.optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        return float(loss.detach())

    before = float(problem.loss().detach())
    assert problem.optimizer.step(closure) == pytest.approx(before)
    assert float(problem.loss().detach()) < before
