"""Two models' predictions compare, and one can teach the other, only if their tokens are the same events."""

from __future__ import annotations

from quantlab.checkpoint.tokenizer import Tokenizer
from quantlab.errors import InputError

COMPARING = "only models of one tokenizer compare"


def check_same_vocabulary(a: Tokenizer, b: Tokenizer, names: tuple[str, str], rule: str = COMPARING) -> None:
    """Refuse vocabularies that give a number to different tokens; one that leaves the number out does not differ.

    `rule` ends the message: why they may not.

    Raises:
        InputError: the first id whose tokens differ.
    """
    for number in range(min(a.size, b.size)):
        one, other = a.backend.id_to_token(number), b.backend.id_to_token(number)
        if one != other and one is not None and other is not None:
            raise other_tokens(names, f"token {number} is {one!r} in the first and {other!r} in the second", rule)


def other_tokens(names: tuple[str, str], difference: str, rule: str = COMPARING) -> InputError:
    """The error for models whose tokens are others."""
    both = f"{names[0]} and {names[1]}"
    return InputError(f"{both} turn text into different tokens ({difference}); {rule}")
