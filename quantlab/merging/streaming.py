"""Carry out a merge plan: tensors side by side as memory allows, each part by part, written as they come."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from queue import SimpleQueue
from typing import Any, Self, TypeVar

import torch

from quantlab.checkpoint.writer import CheckpointWriter
from quantlab.errors import InputError
from quantlab.merging.memory import MemoryPlan, TensorWork
from quantlab.merging.methods.method import Survey, survey_for
from quantlab.merging.methods.table import METHODS
from quantlab.merging.plan_types import TensorPlan
from quantlab.merging.tensor_merge import MergedTensor, StoppedError, TensorMerger
from quantlab.quantization.workers import one_thread_each

Result = TypeVar("Result")

SYNC_BYTES = 1 << 28  # written before the disk is told to take them, so that the end has not all to wait for

Progress = Callable[[int, int, str], None]  # (weights done, weights in all, the tensor at hand)


class Passage:
    """How many weights have been gone over, told to `progress` by any thread."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress, self._lock, self._done = progress, threading.Lock(), 0
        self.total = 0

    def __call__(self, count: int, name: str) -> None:
        with self._lock:
            self._done += count
            if self._progress is not None:
                self._progress(self._done, max(self.total, self._done), name)


def merge_tensors(
    merger: TensorMerger,
    memory: MemoryPlan,
    writer: CheckpointWriter,
    finished: Callable[[MergedTensor], None],
    passage: Passage,
    *,
    done: frozenset[str] = frozenset(),
) -> None:
    """Merge all tensors but those that are `done`; the largest first, so that all threads have work to the end.

    Args:
        finished: is told of each tensor that is written, in the calling thread.

    Raises:
        InputError: see `TensorMerger.merge`.
    """
    to_do = sorted((work for work in memory.works if work.plan.name not in done), key=_elements, reverse=True)
    if not to_do:
        return
    with one_thread_each(), _Workers(memory.workers) as workers, _Syncing(writer) as syncing:
        try:
            surveyed = _survey_together(merger, memory, {work.plan.name for work in to_do}, workers, passage)

            def begin(work: TensorWork) -> Future[MergedTensor]:
                return workers.submit(lambda reading: merger.merge(work, writer, reading, surveyed.get(work.plan.name)))

            passage.total += sum(_elements(work) * merger.passes(work.plan) for work in to_do)
            for tensor in _in_memory(to_do, memory, begin):
                finished(tensor)
                syncing.note(writer.entries[tensor.name].nbytes)
        except BaseException:
            merger.stop()
            raise


class _Workers:
    """Threads that compute, each with another that reads ahead for it; on the way out, what runs is waited for."""

    def __init__(self, count: int) -> None:
        self._computing = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
        self._reading = [ThreadPoolExecutor(1) for _ in range(count)]
        self._free: SimpleQueue[ThreadPoolExecutor] = SimpleQueue()
        for reading in self._reading:
            self._free.put(reading)

    def submit(self, function: Callable[[ThreadPoolExecutor], Result]) -> Future[Result]:
        """Run `function` with a thread to read ahead in."""

        def run() -> Result:
            reading = self._free.get()
            try:
                with torch.no_grad():
                    return function(reading)
            finally:
                self._free.put(reading)

        return self._computing.submit(run)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self._computing.shutdown(cancel_futures=True)
        for reading in self._reading:
            reading.shutdown()


def show_tensors(merger: TensorMerger, memory: MemoryPlan, only: frozenset[str] | None = None) -> None:
    """Show tensors (all, or those named) to the merger's observer without merging them: they are written already."""
    with ThreadPoolExecutor(1) as reading, torch.no_grad():
        for work in memory.works:
            if only is None or work.plan.name in only:
                merger.show(work, reading)


def _elements(work: TensorWork) -> int:
    total = 1
    for size in work.plan.shape:
        total *= size
    return total


def _in_memory(
    works: Sequence[TensorWork], memory: MemoryPlan, begin: Callable[[TensorWork], Future[MergedTensor]]
) -> Iterator[MergedTensor]:
    """Begin a tensor whenever a worker is free and what it needs is too; yield those that are finished."""
    waiting, running = list(works), dict[Future[MergedTensor], int]()
    while waiting or running:
        free = memory.available - sum(running.values())
        while waiting and len(running) < memory.workers:
            fits = next((number for number, work in enumerate(waiting) if work.nbytes <= free or not running), None)
            if fits is None:
                break
            work = waiting.pop(fits)
            running[begin(work)] = work.nbytes
            free -= work.nbytes
        complete, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in complete:
            del running[future]
        yield from (future.result() for future in sorted(complete, key=_failed_last))


def _failed_last(future: Future[MergedTensor]) -> int:
    """What is finished beside a failure is kept, and a failure tells more than that others were stopped."""
    error = future.exception()
    return 0 if error is None else 2 if isinstance(error, StoppedError) else 1


def _survey_together(
    merger: TensorMerger,
    memory: MemoryPlan,
    wanted: set[str],
    workers: _Workers,
    passage: Passage,
) -> dict[str, Any]:
    """Results of surveys that go over all tensors of a method with the same parameters, by tensor.

    Tensors come in the plan's order, those that are finished too: the result is that of the whole model.
    """
    groups: dict[str, list[TensorWork]] = {}
    for work in memory.works:
        method = METHODS[work.plan.method]
        if method.survey is not None and method.scope(work.plan.parameters) == "model":
            groups.setdefault(_same_survey(work.plan), []).append(work)
    found: dict[str, Any] = {}
    for works in groups.values():
        if not any(work.plan.name in wanted for work in works):
            continue
        first = works[0].plan
        survey = survey_for(METHODS[first.method], first.parameters, len(first.parts))
        assert survey is not None
        passage.total += survey.passes * sum(map(_elements, works))
        result = workers.submit(functools.partial(_surveyed, merger, works, survey)).result()
        found |= dict.fromkeys((work.plan.name for work in works), result)
    return found


def _same_survey(plan: TensorPlan) -> str:
    return json.dumps([plan.method, sorted(plan.parameters.items()), len(plan.parts)], default=str)


def _surveyed(merger: TensorMerger, works: Sequence[TensorWork], survey: Survey, reading: ThreadPoolExecutor) -> Any:
    for _ in range(survey.passes):
        for work in works:
            merger.survey(work, survey, reading)
        survey.end_pass()
    return survey.result()


class _Syncing:
    """Tells the disk now and then, in a thread, to take what has been written."""

    def __init__(self, writer: CheckpointWriter) -> None:
        self._writer, self._thread = writer, ThreadPoolExecutor(1)
        self._running: Future[None] | None = None
        self._written = 0

    def note(self, nbytes: int) -> None:
        self._written += nbytes
        if self._written >= SYNC_BYTES and (self._running is None or self._running.done()):
            self._written = 0
            self._running = self._thread.submit(self._writer.sync)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self._thread.shutdown()


def check_together(plans: Sequence[TensorPlan]) -> None:
    """Refuse parameters that vary from tensor to tensor where one survey goes over all of them.

    Raises:
        InputError: they do.
    """
    kinds: dict[str, TensorPlan] = {}
    for plan in plans:
        method = METHODS[plan.method]
        if method.survey is not None and method.scope(plan.parameters) == "model":
            kinds.setdefault(_same_survey(plan), plan)
    if len(kinds) > 1:
        one, other = list(kinds.values())[:2]
        differing = [name for name, value in one.parameters.items() if other.parameters.get(name) != value]
        raise InputError(
            f"{one.method}: {', '.join(differing) or 'the models'} differ between {one.name} and {other.name}, and "
            "trimming goes over the whole model; give one value, or trim by tensor"
        )
