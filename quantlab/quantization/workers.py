"""Work as a fixed list of parts, each computed by one thread from end to end, with results in the list's order.

Torch and its BLAS divide a sum differently for every number of threads, which changes last bits. A part is never
divided here, so its bits are the same whoever computes it, and how many threads there are decides the time alone.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_task = threading.local()  # `given_up`: the event that tells a worker that nobody waits for its result


class AbandonedError(BaseException):
    """Unwinds a part that nobody waits for any more."""


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Torch's operations run on the thread that calls them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_order(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Results in the items' order, computed by up to `threads` at a time; at most that many wait.

    Torch's modes (`no_grad` and others) belong to a thread: `function` sets what it needs itself. After a failure, or
    once no more results are asked for, parts that run are told to stop (`check_wanted`) and waited for.
    """
    with one_thread_each():
        if threads == 1:
            yield from map(function, items)
            return
        given_up = threading.Event()

        def work(item: Item) -> Result:
            _task.given_up = given_up
            return function(item)

        # torch keeps its number of threads for each thread apart; autograd's CPU work stays on the thread that asks.
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            pending: deque[Future[Result]] = deque()
            try:
                for item in items:
                    pending.append(pool.submit(work, item))
                    if len(pending) == threads:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            except BaseException:
                given_up.set()
                raise
            finally:
                for future in pending:
                    future.cancel()


def check_wanted() -> None:
    """End the part that calls this, if nobody waits for it any more; elsewhere nothing happens.

    Raises:
        AbandonedError: the caller is a part of an `in_order` that has ended.
    """
    given_up = getattr(_task, "given_up", None)
    if given_up is not None and given_up.is_set():
        raise AbandonedError


def check_at_every_matrix(model: torch.nn.Module) -> None:
    """Let passes through `model`, forward and backward, `check_wanted` at every module with a matrix: Ctrl-C need not
    wait for the end of a pass, which can take a minute.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim == 2:
            module.register_forward_hook(_check_forward)


def _check_forward(module: torch.nn.Module, arguments: object, output: object) -> None:
    check_wanted()
    if isinstance(output, torch.Tensor) and output.requires_grad:
        output.register_hook(_check_backward)


def _check_backward(gradient: torch.Tensor) -> None:
    check_wanted()
