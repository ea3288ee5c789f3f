"""The token ids of a text that grows by turns: answers keep the tokens that were drawn, so that a cache stays good.

A model may draw other tokens for a text than its tokenizer makes of it. Encoded anew, such an answer would differ from
what the engine has cached, and all behind it would be computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from quantlab.checkpoint import Tokenizer
from quantlab.checkpoint.chat_text import chat_ids
from quantlab.checkpoint.continuation import continuing
from quantlab.generation.chat_layout import marks

CONTEXT_TOKENS = 8  # that an answer is decoded behind: decoders treat the start of a text differently


@dataclass(frozen=True)
class _Piece:
    text: str  # special tokens written out
    ids: list[int]
    was_drawn: bool


class Transcript:
    """Pieces of text whose tokens are known; one transcript per sequence."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pieces: list[_Piece] = []

    def ids(self, text: str) -> list[int]:
        """The token ids of `text`: those of the known pieces that it begins with, and behind them those that the
        tokenizer makes of the rest. What does not belong to `text` is forgotten.

        Raises:
            InputError: the tokenizer cannot encode the text.
        """
        kept: list[_Piece] = []
        position = 0
        for piece in self._pieces:
            if not text.startswith(piece.text, position):
                kept += self._beginning(kept, piece, text[position:]) if piece.was_drawn else []
                break
            kept.append(piece)
            position += len(piece.text)
        rest = text[sum(len(piece.text) for piece in kept) :]
        if rest:
            kept.append(_Piece(rest, self._continuation(_joined(kept), rest), was_drawn=False))
        self._pieces = kept
        return _joined(kept)

    def add_drawn(self, token_ids: Sequence[int]) -> None:
        """Note what was drawn behind the last text, its end token included."""
        if token_ids:
            self._pieces.append(_Piece(self._text(_joined(self._pieces), token_ids), list(token_ids), was_drawn=True))

    @property
    def text(self) -> str:
        """What is known."""
        return "".join(piece.text for piece in self._pieces)

    def _text(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """Of ids behind others."""
        context = list(before[-CONTEXT_TOKENS:])
        known = self._tokenizer.decode(context, skip_special_tokens=False)
        together = self._tokenizer.decode([*context, *ids], skip_special_tokens=False)
        if together.startswith(known):
            return together[len(known) :]
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _beginning(self, before: Sequence[_Piece], piece: _Piece, text: str) -> list[_Piece]:
        """As many tokens of a drawn piece as `text` begins with."""
        ids = _joined(before)
        common = common_length(piece.text, text)
        low, high = 0, len(piece.ids)  # the longest beginning of at most `common` characters is at least `low` tokens
        while low < high:
            middle = (low + high + 1) // 2
            if len(self._text(ids, piece.ids[:middle])) <= common:
                low = middle
            else:
                high = middle - 1
        while low and not text.startswith(self._text(ids, piece.ids[:low])):  # half a character
            low -= 1
        start = piece.ids[:low]
        return [_Piece(self._text(ids, start), start, was_drawn=True)] if low else []

    def _continuation(self, before: list[int], text: str) -> list[int]:
        """The ids of `text` behind others, as in a conversation that is encoded in one piece."""
        if not before:
            return chat_ids(text, self._tokenizer)
        last = before[-1]
        if last in self._marks:  # what follows such a token is encoded for itself, with that token's own rules
            name = self._tokenizer.backend.id_to_token(last)
            ids = self._tokenizer.encode(f"{name}{text}", add_special_tokens=False)
            if ids[:1] == [last]:
                return ids[1:]
        return self._continuing.encode(text, add_special_tokens=False)

    @cached_property
    def _marks(self) -> frozenset[int]:
        return marks(self._tokenizer)

    @cached_property
    def _continuing(self) -> Tokenizer:
        return continuing(self._tokenizer)


def common_length(one: str, other: str) -> int:
    """How many characters both begin with."""
    different = (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(different, min(len(one), len(other)))


def _joined(pieces: Sequence[_Piece]) -> list[int]:
    return [token for piece in pieces for token in piece.ids]
