"""Continuations of an engine's sequence that are computed together: what they share is cached and read once."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

import numpy as np

from quantlab import native


class Branches:
    """`count` branches of a decoder's sequence, each with room for `room` tokens; for a `with` block.

    They end with the block, or when the sequence changes; the sequence itself stays as it is.
    """

    def __init__(self, decoder: native.Decoder, vocabulary: int, count: int, room: int) -> None:
        self._decoder, self._vocabulary = decoder, vocabulary
        decoder.begin_branches(count, room)

    def append(self, branches: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """One token for each of these branches; fp32 [tokens, vocabulary] after them.

        A row has the same bits as the logits of the sequence continued by that branch's tokens alone.
        """
        logits = np.empty((len(tokens), self._vocabulary), np.float32)
        self._decoder.append_to_branches(np.asarray(tokens, np.int32), np.asarray(branches, np.int32), logits)
        return logits

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._decoder.end_branches()
