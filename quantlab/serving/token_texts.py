"""Tokens as the bytes that they stand for, which need be no text: a character may have several tokens."""

from __future__ import annotations

import json
import re
from functools import cached_property

from quantlab.checkpoint import Tokenizer
from quantlab.checkpoint.gguf_bpe import byte_letters
from quantlab.checkpoint.tokenizer import SPACE

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenTexts:
    """Of one tokenizer's vocabulary."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token adds to a text; none for an id that has no token."""
        spelling = self._tokenizer.backend.id_to_token(token)
        if spelling is None:
            return b""
        if token in self._added:
            return spelling.encode("utf-8")
        if self._is_byte_level:
            return bytes(self._letters[c] for c in spelling if c in self._letters)
        if match := _BYTE.fullmatch(spelling):
            return bytes([int(match[1], 16)])
        return spelling.replace(SPACE, " ").encode("utf-8")

    def text_of(self, token: int) -> str:
        """The same as text, for those who show it; OpenAI's way to write what is none."""
        content = self.bytes_of(token)
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._tokenizer.backend.get_added_tokens_decoder())

    @cached_property
    def _is_byte_level(self) -> bool:
        return '"ByteLevel"' in json.dumps(json.loads(self._tokenizer.backend.to_str()).get("decoder"))

    @cached_property
    def _letters(self) -> dict[str, int]:
        return {letter: byte for byte, letter in enumerate(byte_letters())}
