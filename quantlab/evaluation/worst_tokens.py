"""The tokens where two models differ most, shown in their context."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quantlab.checkpoint import Tokenizer
from quantlab.divergence import TokenDivergence
from quantlab.evaluation.windows import Window

TOKENS_BEFORE = 24
TOKENS_AFTER = 8


@dataclass(frozen=True)
class WorstToken:
    """Token `position` of document `document`, both counted from 0. `before` is what the models saw last, `token` what
    came, `after` what follows; `p_a` and `p_b` are the probabilities of `token`, `top_a` and `top_b` what either model
    puts first.
    """

    kld: float
    document: int
    position: int
    before: str
    token: str
    after: str
    p_a: float
    p_b: float
    top_a: str
    top_b: str


def worst_tokens(
    windows: Sequence[Window], values: Sequence[TokenDivergence], tokenizer: Tokenizer, count: int
) -> list[WorstToken]:
    """The `count` tokens of largest divergence, the largest first; of equal ones the earlier."""
    divergence = np.concatenate([value.kld for value in values])
    owner = np.repeat(np.arange(len(windows)), [window.scored for window in windows])
    starts = np.cumsum([0, *(window.scored for window in windows)])
    chosen = np.argsort(-divergence, kind="stable")[:count]
    return [
        _in_context(windows[owner[place]], values[owner[place]], int(place - starts[owner[place]]), tokenizer)
        for place in chosen
    ]


def _in_context(window: Window, value: TokenDivergence, index: int, tokenizer: Tokenizer) -> WorstToken:
    place = len(window.ids) - window.scored + index
    seen = window.ids[max(0, place - TOKENS_BEFORE) : place]
    through = window.ids[max(0, place - TOKENS_BEFORE) : place + 1]
    return WorstToken(
        kld=float(value.kld[index]),
        document=window.document,
        position=window.position + index,
        before=tokenizer.decode(seen),
        token=_piece(tokenizer, seen, window.ids[place : place + 1]),
        after=_piece(tokenizer, through, window.ids[place + 1 : place + 1 + TOKENS_AFTER]),
        p_a=math.exp(-float(value.nll_a[index])),
        p_b=math.exp(-float(value.nll_b[index])),
        top_a=_piece(tokenizer, seen, (int(value.top_a[index]),)),
        top_b=_piece(tokenizer, seen, (int(value.top_b[index]),)),
    )


def _piece(tokenizer: Tokenizer, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text of tokens behind others: decoders treat the start of a text differently."""
    known = tokenizer.decode(before)
    whole = tokenizer.decode([*before, *ids])
    if ids and whole == known:  # a special token, which decoding leaves out
        return tokenizer.decode(ids, skip_special_tokens=False)
    return whole[len(known) :] if whole.startswith(known) else tokenizer.decode(ids)
