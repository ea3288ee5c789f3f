"""A grammar as a constraint: which tokens of a model's vocabulary may come next, by llguidance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from quantlab.checkpoint import Tokenizer
from quantlab.errors import InputError, missing_extra
from quantlab.generation.grammars import Grammar


class GrammarTokens:
    """A vocabulary as llguidance sees it; made once for a model, it serves any number of constraints.

    Args:
        vocabulary: the width of the model's logits.

    Raises:
        InputError: llguidance is not installed, or does not know this kind of tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int) -> None:
        try:
            from llguidance import LLMatcher, LLTokenizer
        except ImportError:
            raise missing_extra("llguidance", "constrain") from None
        self.vocabulary = vocabulary
        self.size = max(tokenizer.size, vocabulary)  # logits may be padded, or a tokenizer have tokens beyond them
        self._new_matcher = LLMatcher
        ends = sorted(tokenizer.eos) or None
        try:
            self._tokens = LLTokenizer(tokenizer.backend.to_str(), n_vocab=self.size, eos_token=ends)
        except ValueError as error:
            raise InputError(f"the model's tokenizer cannot be constrained: {error}") from None
        # Where the model names no end token, llguidance takes one that looks like it, which here ends nothing.
        self.foreign_ends = [token for token in self._tokens.eos_tokens if token not in tokenizer.eos]

    def matcher(self, grammar: Grammar) -> Any:  # Any: llguidance may be missing
        """A new one, which has seen no token."""
        return self._new_matcher(self._tokens, grammar.text, log_level=0)


class GrammarConstraint:
    """See `Constraint` and `Foreseeing`: for one text of a grammar.

    End tokens are allowed where the text may end. A text that cannot go on is finished without one.

    Raises:
        InputError: the grammar is wrong, here or later, when it becomes too complex or no token can follow.
    """

    def __init__(self, tokens: GrammarTokens, grammar: Grammar) -> None:
        self._tokens, self._grammar = tokens, grammar
        self._matcher = tokens.matcher(grammar)
        self._check()

    @property
    def finished(self) -> bool:
        """See `Constraint`."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> np.ndarray:
        """See `Constraint`."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        mask = np.unpackbits(bits, count=self._tokens.vocabulary, bitorder="little").view(bool)
        mask[self._tokens.foreign_ends] = False
        return mask

    def take(self, token: int) -> None:
        """See `Constraint`."""
        self._matcher.consume_token(token)
        self._check()

    def forced(self) -> list[int]:
        """See `Foreseeing`."""
        return [token for token in self._matcher.compute_ff_tokens() if token < self._tokens.vocabulary]

    def _check(self) -> None:
        if self._matcher.is_error():
            fault = self._matcher.get_error().partition("<state>")[0].strip()
            told = "no output can meet it" if fault.startswith("NoExtension") else fault
            raise InputError(f"{self._grammar.source}: {told}")


def constraints_of(grammar: Grammar, tokenizer: Tokenizer, vocabulary: int) -> Callable[[], GrammarConstraint]:
    """Makes a constraint for each text; see `GrammarTokens`.

    Raises:
        InputError: see both classes.
    """
    tokens = GrammarTokens(tokenizer, vocabulary)
    return lambda: GrammarConstraint(tokens, grammar)
