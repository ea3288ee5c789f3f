"""The queue: one at a time, first come first served, no more than it holds, and nobody computes for nobody."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from quantlab.errors import InputError
from quantlab.serving.api_error import ApiError
from quantlab.serving.turns import Finished, Turn, Turns


class Gate:
    """Work that begins, and ends when it is let."""

    def __init__(self, order: list[str], name: str) -> None:
        self.begun, self.let = threading.Event(), threading.Event()
        self._order, self._name = order, name

    def __call__(self, turn: Turn) -> str:
        self.begun.set()
        while not self.let.wait(0.005):
            turn.check()
        self._order.append(self._name)
        return self._name


@pytest.fixture
def make_turns() -> Callable[..., Turns]:
    made: list[Turns] = []

    def make(most: int = 2, release: Callable[[], None] = lambda: None, idle: float | None = None) -> Turns:
        turns = Turns(most, release, idle)
        turns.start()
        made.append(turns)
        return turns

    yield make
    for turns in made:
        turns.stop()
        turns.cut()
        assert turns.join(10)


async def end_of(turn: Turn) -> Finished:
    """What a turn that emits nothing ended with."""
    (end,) = await turn.channel.take()
    assert isinstance(end, Finished)
    return end


def run(test: Callable[[asyncio.AbstractEventLoop], Any]) -> None:
    async def within() -> None:
        async with asyncio.timeout(20):
            await test(asyncio.get_running_loop())

    asyncio.run(within())


def test_turns_come_in_order_and_the_queue_has_an_end(make_turns) -> None:
    """With one that runs and two that wait, a fourth is told when to come back; its place is free afterwards."""
    turns, order = make_turns(), []

    async def test(loop: asyncio.AbstractEventLoop) -> None:
        gates = [Gate(order, name) for name in "abc"]
        asked = [turns.ask(gates[0], loop)]
        await asyncio.to_thread(gates[0].begun.wait, 10)
        asked += [turns.ask(gate, loop) for gate in gates[1:]]
        assert (turns.is_running, turns.waiting) == (True, 2)
        with pytest.raises(ApiError) as refused:
            turns.ask(Gate(order, "d"), loop)
        assert refused.value.status == 429
        assert int(refused.value.headers["Retry-After"]) >= 1
        for gate in reversed(gates):
            gate.let.set()
        assert [(await end_of(turn)).value for turn in asked] == ["a", "b", "c"]
        last = Gate(order, "e")
        last.let.set()
        assert (await end_of(turns.ask(last, loop))).value == "e"

    run(test)
    assert order == ["a", "b", "c", "e"]


def test_without_a_queue_one_request_runs(make_turns) -> None:
    """A queue of 0 refuses those that would have to wait, not all."""
    turns, order = make_turns(0), []

    async def test(loop: asyncio.AbstractEventLoop) -> None:
        first = Gate(order, "a")
        running = turns.ask(first, loop)
        with pytest.raises(ApiError):
            turns.ask(Gate(order, "b"), loop)
        first.let.set()
        assert (await end_of(running)).value == "a"

    run(test)
    assert order == ["a"]


def test_who_has_gone_costs_no_turn(make_turns) -> None:
    """A turn that waits is taken out of the queue at once, one that runs ends at its next look."""
    turns, order = make_turns(), []

    async def test(loop: asyncio.AbstractEventLoop) -> None:
        first, second, third = (Gate(order, name) for name in "abc")
        asked = [turns.ask(first, loop)]
        await asyncio.to_thread(first.begun.wait, 10)
        asked += [turns.ask(second, loop), turns.ask(third, loop)]
        turns.cancel(asked[1])
        assert turns.waiting == 1
        assert (await end_of(asked[1])).error.status == 499
        turns.cancel(asked[0])
        assert (await end_of(asked[0])).error.status == 499
        third.let.set()
        assert (await end_of(asked[2])).value == "c"
        assert not second.begun.is_set()

    run(test)
    assert order == ["c"]


def test_stopping_lets_the_running_turn_end(make_turns) -> None:
    """What waits and what comes is refused with 503; `cut` ends the running one too."""
    turns, order = make_turns(), []

    async def test(loop: asyncio.AbstractEventLoop) -> None:
        first, second = Gate(order, "a"), Gate(order, "b")
        running = turns.ask(first, loop)
        await asyncio.to_thread(first.begun.wait, 10)
        waiting = turns.ask(second, loop)
        turns.stop()
        assert (await end_of(waiting)).error.status == 503
        with pytest.raises(ApiError) as refused:
            turns.ask(second, loop)
        assert refused.value.status == 503
        first.let.set()
        assert (await end_of(running)).value == "a"

    run(test)
    assert order == ["a"]
    cut = make_turns()

    async def test_cut(loop: asyncio.AbstractEventLoop) -> None:
        gate = Gate(order, "c")
        turn = cut.ask(gate, loop)
        await asyncio.to_thread(gate.begun.wait, 10)
        cut.stop()
        cut.cut()
        assert (await end_of(turn)).error.status == 503

    run(test_cut)
    assert order == ["a"]


def test_failures_are_told_and_the_thread_goes_on(make_turns, caplog: pytest.LogCaptureFixture) -> None:
    """A wrong request is 400; what nobody foresaw is 500, tells no details, and gives up the engine."""
    released: list[bool] = []
    turns = make_turns(release=lambda: released.append(True))

    def wrong(turn: Turn) -> None:
        raise InputError("the prompt is wrong")

    def broken(turn: Turn) -> None:
        raise ZeroDivisionError("secret")

    async def test(loop: asyncio.AbstractEventLoop) -> None:
        error = (await end_of(turns.ask(wrong, loop))).error
        assert (error.status, error.message, released) == (400, "the prompt is wrong", [])
        error = (await end_of(turns.ask(broken, loop))).error
        assert error.status == 500
        assert "secret" not in error.message
        assert (await end_of(turns.ask(lambda turn: "on", loop))).value == "on"

    run(test)
    assert released == [True]
    assert "ZeroDivisionError: secret" in caplog.text


def test_an_idle_engine_is_given_up_once(make_turns) -> None:
    """After the time without a request; the next one works, and then it is given up again."""
    released = threading.Semaphore(0)
    turns = make_turns(release=released.release, idle=0.01)
    assert released.acquire(timeout=10)

    async def test(loop: asyncio.AbstractEventLoop) -> None:
        assert (await end_of(turns.ask(lambda turn: "on", loop))).value == "on"

    run(test)
    assert released.acquire(timeout=10)
    assert not released.acquire(timeout=0.05)


def test_items_come_in_order_and_many_at_a_time(make_turns) -> None:
    """None is lost between the thread and the loop, however they meet."""
    turns = make_turns()

    def count(turn: Turn) -> int:
        for number in range(5000):
            turn.channel.put(number)
        return 5000

    async def test(loop: asyncio.AbstractEventLoop) -> None:
        turn, found = turns.ask(count, loop), []
        while not found or not isinstance(found[-1], Finished):
            found += await turn.channel.take()
            await turn.channel.pause(0.001)
        assert found[:-1] == list(range(5000))
        assert found[-1].value == 5000

    run(test)
