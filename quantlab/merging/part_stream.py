"""The weights of several tensors part by part, the next part read while the last is worked on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from quantlab.merging.readers import Reader

Bounds = tuple[int, int]  # first row, and the one behind the last


def parts_of(rows: int, rows_a_part: int) -> list[Bounds]:
    """The parts of a tensor, in order; of one without rows, one that is empty."""
    return [(first, min(first + rows_a_part, rows)) for first in range(0, rows, rows_a_part)] or [(0, 0)]


class PartStream:
    """Goes over tensors of one shape, as often as asked.

    Args:
        readers: of the tensors.
        shape: [rows, columns], or [elements] of a vector.
        rows_a_part: of all parts but the last.
        reading: a thread to read ahead in.
    """

    def __init__(
        self, readers: Sequence[Reader], shape: tuple[int, ...], rows_a_part: int, reading: ThreadPoolExecutor
    ) -> None:
        self._readers, self._reading = readers, reading
        self.parts = parts_of(shape[0], rows_a_part)
        rows = min(rows_a_part, shape[0])
        count = min(2, len(self.parts))
        self._raw = [[np.empty(rows * reader.row_bytes, np.uint8) for reader in readers] for _ in range(count)]
        self._weights = [torch.empty((rows, *shape[1:]), dtype=torch.float32) for _ in readers]

    def __iter__(self) -> Iterator[tuple[Bounds, list[torch.Tensor]]]:
        """(rows, fp32 weights by reader); the tensors are good until the next ones are asked for."""
        if len(self.parts) == 1:
            yield self.parts[0], self._decoded(0, self._fetched(0))
            return
        coming = self._reading.submit(self._fetched, 0)
        try:
            for number in range(len(self.parts)):
                raw = coming.result()
                if number + 1 < len(self.parts):
                    coming = self._reading.submit(self._fetched, number + 1)
                yield self.parts[number], self._decoded(number, raw)
        finally:
            coming.exception()  # nobody reads into the buffers any more

    def _fetched(self, number: int) -> list[np.ndarray]:
        first, last = self.parts[number]
        found = []
        for reader, buffer in zip(self._readers, self._raw[number % len(self._raw)], strict=True):
            raw = buffer[: (last - first) * reader.row_bytes]
            reader.fetch(first, last, raw)
            found.append(raw)
        return found

    def _decoded(self, number: int, raw: list[np.ndarray]) -> list[torch.Tensor]:
        first, last = self.parts[number]
        found = []
        for reader, data, weights in zip(self._readers, raw, self._weights, strict=True):
            part = weights[: last - first]
            reader.decode(data, first, last, part)
            found.append(part)
        return found
