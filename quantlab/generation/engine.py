"""What engines have in common: a sequence of tokens, its cache, and the logits that follow it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from quantlab.errors import InputError
from quantlab.generation.branches import Branches
from quantlab.generation.constraints import Constraint
from quantlab.generation.decoding import Decoding
from quantlab.generation.drawing import Drawing
from quantlab.generation.sampling import SamplingParams
from quantlab.generation.speculation import Speculation

OnChunk = Callable[[int, int], None]
PREFILL_CHUNK = 512  # tokens per forward pass: bounds the memory of a long prompt
ROWS_CHUNK = 64  # the same where the logits of all tokens are wanted, 128 KB each for a vocabulary of 32,000


class Engine(ABC):
    """One sequence. Ctrl-C may end any call: `tokens` then are those whose cache is complete; the next call goes on.

    Attributes:
        name: what reports call the engine.
        has_branches: whether `branches` can be called.
        exact_batches: whether logits have the same bits however many tokens come at once.
        context: the most tokens that the sequence can have.
        vocabulary: the number of token ids.
        tokens: the sequence so far.
    """

    name: str
    has_branches = False
    exact_batches: bool
    context: int
    vocabulary: int

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._logits: np.ndarray | None = None

    @property
    def position(self) -> int:
        """Number of tokens so far."""
        return len(self.tokens)

    def prefill(self, token_ids: Sequence[int], chunk: int | None = None, on_chunk: OnChunk | None = None) -> int:
        """Make the sequence `token_ids`, keeping the cache of the longest common prefix.

        Args:
            chunk: tokens of a forward pass at most; Ctrl-C is heeded between two of them.
            on_chunk: called behind each with how many tokens have been computed, and how many have to be.

        Returns:
            How many tokens came from the cache.

        Raises:
            InputError: no tokens, an id outside the vocabulary, more than the context holds, or a chunk of none.
        """
        token_ids = self._checked(token_ids)
        if chunk is not None and chunk < 1:
            raise InputError(f"chunk {chunk}: at least 1 token is needed")
        common = 0
        for old, new in zip(self.tokens, token_ids, strict=False):
            if old != new:
                break
            common += 1
        common = min(common, len(token_ids) - 1)  # the last token runs again: its logits are wanted
        self.rewind(common)
        step = chunk or PREFILL_CHUNK
        for start in range(common, len(token_ids), step):
            self.append(token_ids[start : start + step])
            if on_chunk is not None:
                on_chunk(self.position - common, len(token_ids) - common)
        return common

    def prefill_all(self, token_ids: Sequence[int]) -> Iterator[np.ndarray]:
        """Make the sequence `token_ids`, computing all of it; fp32 [tokens, vocabulary] after each, part by part.

        The sequence is complete when the last part has been taken.

        Raises:
            InputError: see `prefill`; on asking for the first part.
        """
        token_ids = self._checked(token_ids)
        self.rewind(0)
        for start in range(0, len(token_ids), ROWS_CHUNK):
            yield self.append_all(token_ids[start : start + ROWS_CHUNK])

    def logits(self) -> np.ndarray:
        """fp32 [vocabulary] for the next token."""
        assert self._logits is not None, "prefill first"
        return self._logits

    def decode(
        self,
        params: SamplingParams,
        max_tokens: int,
        constraint: Constraint | None = None,
        speculation: Speculation | None = None,
    ) -> Decoding:
        """Draw tokens until `max_tokens`, the context's end, or the constraint has finished; see `Decoding`.

        `speculation` changes how long it takes and nothing else; engines without `exact_batches` leave it alone.

        What the sequence holds before the first draw is the prompt: presence and frequency penalties count the rest.

        Raises:
            InputError: a logit bias for an id outside the vocabulary; while drawing, logits that are not numbers, or
                a constraint that allows no token.
        """
        return Decoding(self, Drawing(params, self.vocabulary, constraint), max_tokens, speculation)

    def rewind(self, position: int) -> None:
        """Forget all tokens from `position` on; those before it stay cached.

        Raises:
            InputError: the sequence has no such position.
        """
        if not 0 <= position <= self.position:
            raise InputError(f"position {position}: the sequence has {self.position} tokens")
        if position < self.position:
            self._logits = None
            del self.tokens[position:]  # first: interrupted, the cache holds too much, which `append` mends
            self._forget(position)

    def append(self, token_ids: list[int]) -> None:
        """Add tokens to the sequence, whose ids and number have been checked."""
        self._forget(self.position)
        self.take(token_ids, self._forward(token_ids, 1)[-1])

    def append_all(self, token_ids: Sequence[int]) -> np.ndarray:
        """As `append`; fp32 [tokens, vocabulary] after each of them."""
        self._forget(self.position)
        logits = self._forward(list(token_ids), len(token_ids))
        self.take(token_ids, logits[-1])
        return logits

    def take(self, token_ids: Sequence[int], logits: np.ndarray) -> None:
        """Count tokens that the cache holds; `logits` follow the last."""
        self._logits = None
        self.tokens.extend(token_ids)
        self._logits = logits

    def keep(self) -> None:  # noqa: B027 nothing, where an engine has no prompt cache
        """Write the sequence to the prompt cache, if there is one, as `prefill` does: with what was generated since."""

    def branches(self, count: int, room: int) -> Branches:
        """Begin `count` continuations of the sequence, each of up to `room` tokens, that are computed together.

        Raises:
            InputError: too little memory for their caches, or an engine without branches.
        """
        raise InputError(f"{count} samples of {room} tokens: the {self.name} engine computes one at a time")

    def _checked(self, token_ids: Sequence[int]) -> list[int]:
        """As Python's integers, which numpy's may stand for."""
        if not len(token_ids):
            raise InputError("the prompt holds no token")
        if strange := [i for i in token_ids if isinstance(i, bool) or not isinstance(i, (int, np.integer))]:
            raise InputError(f"token id {strange[0]!r}: a whole number is expected")
        if outside := [i for i in token_ids if not 0 <= i < self.vocabulary]:
            raise InputError(f"token id {outside[0]} is outside the vocabulary of {self.vocabulary}")
        if len(token_ids) > self.context:
            raise InputError(f"the prompt has {len(token_ids)} tokens; the context holds {self.context}")
        return [int(i) for i in token_ids]

    @abstractmethod
    def _forward(self, token_ids: list[int], wanted: int) -> np.ndarray:
        """Append to the cache; fp32 [wanted, vocabulary] after the last tokens."""

    @abstractmethod
    def _forget(self, position: int) -> None:
        """Drop the cache from `position` on, if it holds more: an interrupt may have left more than the tokens."""
