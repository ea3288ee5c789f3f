"""Two models' predictions compare only if their tokens are the same events."""

from __future__ import annotations

from collections.abc import Sequence

from quantlab.checkpoint import Tokenizer
from quantlab.checkpoint.same_vocabulary import other_tokens
from quantlab.evaluation.windows import Window


def check_same_windows(a: Sequence[Window], b: Sequence[Window], tokenizer: Tokenizer, names: tuple[str, str]) -> None:
    """Refuse texts that became different tokens, though the vocabularies agree.

    Raises:
        InputError: the first token that differs.
    """
    if list(a) == list(b):
        return
    for one, other in zip(a, b, strict=False):
        for place, (first, second) in enumerate(zip(one.ids, other.ids, strict=False)):
            if first != second:
                told = " and ".join(repr(tokenizer.backend.id_to_token(number)) for number in (first, second))
                where = f"document {one.document}, token {one.position + place - (len(one.ids) - one.scored)}"
                raise other_tokens(names, f"{where} is {told}" if place else f"a window begins with {told}")
    raise other_tokens(names, "one makes more tokens of it")
