"""Two models' predictions compare only if their tokens are the same events."""

from __future__ import annotations

from collections.abc import Sequence

from quantlab.checkpoint import Tokenizer
from quantlab.errors import InputError
from quantlab.evaluation.windows import Window


def check_same_vocabulary(a: Tokenizer, b: Tokenizer, names: tuple[str, str]) -> None:
    """Refuse vocabularies that give a number to different tokens; one that leaves the number out does not differ.

    Raises:
        InputError: the first id whose tokens differ.
    """
    for number in range(min(a.size, b.size)):
        one, other = a.backend.id_to_token(number), b.backend.id_to_token(number)
        if one != other and one is not None and other is not None:
            raise _refusal(names, f"token {number} is {one!r} in the first and {other!r} in the second")


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
                raise _refusal(names, f"{where} is {told}" if place else f"a window begins with {told}")
    raise _refusal(names, "one makes more tokens of it")


def _refusal(names: tuple[str, str], difference: str) -> InputError:
    both = f"{names[0]} and {names[1]}"
    return InputError(f"{both} turn text into different tokens ({difference}); only models of one tokenizer compare")
