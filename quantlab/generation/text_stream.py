"""Generated tokens as text, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from quantlab.checkpoint import Tokenizer


class TextStream:
    """Generated tokens as text, released as soon as neither a following token nor a stop string can change it."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        stop: Sequence[str],
        on_text: Callable[[str], None] | None,
    ) -> None:
        self.token_ids: list[int] = []
        self.text = ""  # released
        self._tokenizer, self._stop, self._on_text = tokenizer, tuple(stop), on_text
        self._decoded = ""
        # Decoded behind a few tokens that are text already: decoders treat the start of a text differently.
        self._recent = self._tail(prompt_ids)
        self._known = len(self._recent)  # how many of the recent tokens are text already

    def add(self, token: int, *, is_end: bool) -> bool:
        """Take one token; True when the text ends with it."""
        self.token_ids.append(token)
        if is_end:
            return True
        self._recent.append(token)
        piece = self._new_text()
        if piece.endswith("\ufffd"):  # half a character: the next token may complete it
            return False
        self._take(piece)
        ends = [index for string in self._stop if (index := self._decoded.find(string)) >= 0]
        if ends:
            self._decoded = self._decoded[: min(ends)]
            return True
        self._release(len(self._decoded) - self._undecided())
        return False

    def _tail(self, prompt_ids: Sequence[int]) -> list[int]:
        """The last tokens of the prompt, from the beginning of a character on, which has up to four tokens."""
        for size in range(4, 8):
            tail = list(prompt_ids[-size:])
            if not self._tokenizer.decode(tail).startswith("\ufffd"):
                break
        return tail

    def _new_text(self) -> str:
        known = self._tokenizer.decode(self._recent[: self._known])
        text = self._tokenizer.decode(self._recent)
        if text.startswith(known):
            return text[len(known) :]
        return self._tokenizer.decode(self._recent[self._known :])  # stray bytes would spoil the known ones before them

    def _take(self, piece: str) -> None:
        self._decoded += piece
        self._recent = self._recent[self._known :] if piece else self._recent
        self._known = len(self._recent)

    def flush(self) -> None:
        """Release what is left; no token follows."""
        if len(self._recent) > self._known:
            self._take(self._new_text())
        self._release(len(self._decoded))

    def _release(self, length: int) -> None:
        piece = self._decoded[len(self.text) : length]
        if piece:
            self.text += piece
            if self._on_text is not None:
                self._on_text(piece)

    def _undecided(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        prefixes = (string[:size] for string in self._stop for size in range(len(string) - 1, 0, -1))
        return max((len(p) for p in prefixes if self._decoded.endswith(p)), default=0)
