"""Prompts with completions, and plain texts -> token ids and labels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from quantlab.checkpoint.continuation import continuing
from quantlab.checkpoint.tokenizer import Tokenizer
from quantlab.errors import InputError
from quantlab.training.row_forms import Completion
from quantlab.training.sample import Sample, sample_of


class TextEncoder:
    """Text to ids as generation has them: what follows a prompt is tokens of its own behind the prompt's.

    `end` is the token that ends a completion: the least id of those that end a text.

    Raises:
        InputError: no token ends a text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not tokenizer.eos:
            raise InputError(
                "the tokenizer has no end token, so that the model would not learn to stop: set eos_token_id in its "
                "generation_config.json, or name one of its tokens with --end-token"
            )
        self.tokenizer = tokenizer
        self.end = min(tokenizer.eos)
        self._continuing = continuing(tokenizer)

    def behind(self, prompt: list[int], text: str, whole: Callable[[], list[int]]) -> list[int]:
        """The ids of `text` behind those of a prompt; `whole` gives the ids of the text of both, encoded as one.

        Raises:
            InputError: the ids of both do not give the text of both back.
        """
        if prompt in ([], [self.tokenizer.bos]):  # the beginning of a text
            return self.tokenizer.encode(text, add_special_tokens=False)
        ids = self._continuing.encode(text, add_special_tokens=False)
        together = self._decoded([*prompt, *ids])
        if together != self._decoded(prompt) + text and together != self._decoded(whole()):
            raise InputError("the tokenizer changes the text where the completion joins the prompt")
        return ids

    def ended(self, ids: list[int]) -> list[int]:
        """`ids` with an end token behind them, unless they have one."""
        return ids if ids and ids[-1] in self.tokenizer.eos else [*ids, self.end]

    def _decoded(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def with_end_token(tokenizer: Tokenizer, piece: str) -> Tokenizer:
    """The tokenizer with `piece`, such as `<|im_end|>`, as the only token that ends a text.

    Raises:
        InputError: it is no token of the vocabulary.
    """
    token = tokenizer.backend.token_to_id(piece)
    if token is None:
        raise InputError(f"end token {piece!r}: the tokenizer has no such token")
    return Tokenizer(tokenizer.backend, tokenizer.bos, frozenset({token}))


def completion_sample(row: Completion, encoder: TextEncoder, place: str, *, completion_only: bool = True) -> Sample:
    """The prompt as `generate` encodes it, then the completion and the end token, which carry the loss; without
    `completion_only` the prompt does too.

    Raises:
        InputError: the tokenizer cannot encode the text, or changes it where the two join.
    """
    prompt = encoder.tokenizer.encode(row.prompt)
    whole = partial(encoder.tokenizer.encode, row.prompt + row.completion)
    completion = encoder.ended(encoder.behind(prompt, row.completion, whole))
    ids = [*prompt, *completion]
    return sample_of(ids, [(len(prompt) if completion_only else 0, len(ids))], place, as_served=True)


def text_samples(text: str, encoder: TextEncoder, place: str, context: int) -> list[Sample]:
    """A text and the end token, all of it with loss, in windows of up to `context` tokens.

    Each window begins with the start token; without one, with the last token of the window before it. So every token
    carries loss once, but the text's first where no start token precedes it.

    Raises:
        InputError: the tokenizer cannot encode the text.
    """
    bos = encoder.tokenizer.bos
    ids = encoder.ended(encoder.tokenizer.encode(text, add_special_tokens=False))
    if ids[0] == bos:  # written out
        ids = ids[1:]
    step = context - 1
    if bos is not None:
        windows = [[bos, *ids[start : start + step]] for start in range(0, len(ids), step)]
    else:
        windows = [ids[start : start + context] for start in range(0, max(1, len(ids) - 1), step)]
    return [sample_of(window, [(0, len(window))], place, as_served=None) for window in windows]
