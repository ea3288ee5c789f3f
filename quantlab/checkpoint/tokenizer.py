"""Text <-> token ids for a model folder, on the `tokenizers` library.

transformers only converts what has no tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.checkpoint.reader import read_json
from quantlab.checkpoint.source import local_folder
from quantlab.errors import InputError

if TYPE_CHECKING:
    import tokenizers


class Tokenizer:
    """A model's tokenizer. `bos` is the start token's id where the model expects one before every text, else None;
    `eos` holds the ids that end a text.
    """

    def __init__(self, backend: tokenizers.Tokenizer, bos: int | None, eos: frozenset[int]) -> None:
        self.backend, self.bos, self.eos = backend, bos, eos

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; with `add_special_tokens`, after the start token where the model expects one."""
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return [self.bos, *ids] if add_special_tokens and self.bos is not None else ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    @property
    def size(self) -> int:
        """Number of token ids, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)


def load_tokenizer(model: str | Path) -> Tokenizer:
    """The tokenizer of a model folder or hub id.

    Raises:
        InputError: the folder holds no tokenizer, or a broken one.
    """
    folder = local_folder(model)
    backend = _backend(folder)
    return Tokenizer(backend, _start_token(backend), _end_tokens(folder, backend))


def _backend(folder: Path) -> tokenizers.Tokenizer:
    import tokenizers

    file = folder / "tokenizer.json"
    if file.is_file():
        try:
            return tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:
            raise InputError(f"{file}: cannot be read: {error}") from None
    if not any((folder / name).is_file() for name in ("tokenizer.model", "vocab.json")):
        raise InputError(f"{folder}: holds no tokenizer (tokenizer.json, tokenizer.model or vocab.json)")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False).backend_tokenizer
    except (ValueError, OSError, AttributeError, RuntimeError) as error:
        raise InputError(f"{folder}: its tokenizer cannot be converted: {str(error).splitlines()[0]}") from None


def _start_token(backend: tokenizers.Tokenizer) -> int | None:
    """The token that the tokenizer's own post-processor puts before a text."""
    with_special = backend.encode("a").ids
    without = backend.encode("a", add_special_tokens=False).ids
    starts_with_special = len(with_special) > len(without) and with_special[1 : 1 + len(without)] == without
    return with_special[0] if starts_with_special else None


def _end_tokens(folder: Path, backend: tokenizers.Tokenizer) -> frozenset[int]:
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            value: Any = read_json(folder / name).get("eos_token_id")  # Any: unchecked JSON
            ids.update(i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int))
    if (folder / "tokenizer_config.json").is_file():
        token: Any = read_json(folder / "tokenizer_config.json").get("eos_token")
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str) and (found := backend.token_to_id(content)) is not None:
            ids.add(found)
    return frozenset(ids)
