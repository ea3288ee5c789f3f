"""Parts side by side: results in order, one torch thread each, and a quick end where something fails."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch

from quantlab import InputError
from quantlab.quantization.workers import AbandonedError, check_at_every_matrix, check_wanted, in_order

PATIENCE = 60.0  # seconds until a test that hangs is a failure


@pytest.fixture(autouse=True)
def two_torch_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_results_keep_the_order_and_end_with_the_first_failure():
    assert list(in_order(lambda number: number**2, range(50), threads=4)) == [n**2 for n in range(50)]

    def fail(number: int) -> int:
        if number == 20:
            raise InputError("twenty")
        return number

    results = in_order(fail, range(10**9), threads=3)
    assert [next(results) for _ in range(20)] == list(range(20))
    with pytest.raises(InputError, match="twenty"):
        next(results)


@pytest.mark.parametrize("threads", [1, 2])
def test_torch_computes_on_the_part_s_thread_alone_forward_and_backward(threads):
    seen: list[tuple[int, int]] = []

    def note(gradient: torch.Tensor | None = None) -> None:
        seen.append((threading.get_ident(), torch.get_num_threads()))

    def part(_: int) -> int:
        weight = torch.ones(3, requires_grad=True)
        product = weight * 2
        product.register_hook(note)
        note()
        torch.autograd.grad(product.sum(), [weight])
        return threading.get_ident()

    (thread,) = in_order(part, [0], threads)
    assert seen == [(thread, 1), (thread, 1)]
    assert (thread == threading.get_ident()) == (threads == 1)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("failure", [KeyboardInterrupt, InputError])
def test_parts_that_nobody_waits_for_end_at_their_next_check(failure):
    running, ended = threading.Event(), []

    def part(number: int) -> None:
        if number == 0:
            assert running.wait(PATIENCE)
            raise failure("stop")
        running.set()
        try:
            while True:
                check_wanted()
        except AbandonedError:
            ended.append(number)
            raise

    with pytest.raises(failure):
        list(in_order(part, range(5), threads=2))
    assert ended == [1]  # the other three were never begun
    check_wanted()  # outside of parts nothing happens


@pytest.mark.parametrize("backward", [False, True])
def test_a_pass_ends_at_the_next_matrix(backward):
    """The second part is inside the model when the first fails; what lies behind the next matrix is not computed."""
    inside, computed = threading.Event(), []

    def stand_still() -> None:
        inside.set()
        with contextlib.suppress(AbandonedError):
            while True:
                check_wanted()

    class Step(torch.nn.Module):
        """Calls functions when a pass comes through, forward and backward."""

        def __init__(self, forward, backward):
            super().__init__()
            self.forwards, self.backwards = forward, backward

        def forward(self, x):
            self.forwards()
            x.register_hook(lambda _: self.backwards())
            return x

    note = Step(lambda: computed.append("forward"), lambda: computed.append("backward"))
    wait = Step(*((lambda: None, stand_still) if backward else (stand_still, lambda: None)))
    matrices = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    model = torch.nn.Sequential(*((note, *matrices, wait) if backward else (wait, *matrices, note)))
    check_at_every_matrix(model)

    def part(number: int) -> None:
        if number == 0:
            assert inside.wait(PATIENCE)
            raise InputError("stop")
        inputs = torch.ones(2, 4, requires_grad=True) * 1
        torch.autograd.grad(model(inputs).sum(), [inputs])

    with pytest.raises(InputError, match="stop"):
        list(in_order(part, range(2), threads=2))
    assert computed == (["forward"] if backward else [])
