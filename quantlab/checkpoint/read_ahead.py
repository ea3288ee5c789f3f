"""Read a large tensor part by part, the next one while the last is worked on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

PartReader = Callable[[int, np.ndarray], None]  # (first byte, uint8 array to fill)

PART_BYTES = 1 << 22  # fits a processor's cache with what is made of it, and is read at the speed of a large one


def read_ahead(read: PartReader, rows: int, row_bytes: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first row, uint8 [some rows, row_bytes]) in order, from two buffers in turn.

    An array is good until the next one is asked for.
    """
    step = max(1, PART_BYTES // max(1, row_bytes))
    starts = range(0, rows, step)
    buffers = [np.empty(min(step, rows) * row_bytes, np.uint8) for _ in range(min(2, len(starts)))]

    def fill(number: int) -> np.ndarray:
        start = starts[number]
        part = buffers[number % 2][: (min(start + step, rows) - start) * row_bytes]
        read(start * row_bytes, part)
        return part.reshape(-1, row_bytes)

    if len(starts) < 2:
        yield from ((start, fill(number)) for number, start in enumerate(starts))
        return
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(fill, 0)
        for number, start in enumerate(starts):
            part = coming.result()
            if number + 1 < len(starts):
                coming = reader.submit(fill, number + 1)
            yield start, part
