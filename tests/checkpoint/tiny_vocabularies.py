"""Vocabularies of a few hundred tokens, as GGUF metadata: small enough that ids can be told by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import pre_tokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())  # GPT-2's letters for bytes


def sentencepiece_vocabulary(
    pieces: dict[str, float], others: dict[str, int] | None = None, **settings: Any
) -> dict[str, Any]:
    """<unk>, <s>, </s>, all bytes, `pieces` with their scores, and `others` with their types."""
    others = others or {}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *others]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(pieces), *others.values()]
    scores = [0.0] * 259 + [*pieces.values()] + [-1000.0] * len(others)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array(scores, dtype=np.float32),
        "tokenizer.ggml.token_type": np.array(types, dtype=np.int32),
        **{f"tokenizer.ggml.{key}": value for key, value in settings.items()},
    }


def byte_level_vocabulary(
    merges: str, pre: str | None = "gpt-2", others: dict[str, int] | None = None, **settings: Any
) -> dict[str, Any]:
    """All letters for bytes, what `merges` ("a b, ab c") make, and `others` with their types."""
    others, pairs = others or {}, merges.split(", ") if merges else []
    made = dict.fromkeys(pair.replace(" ", "") for pair in pairs)
    tokens = [*ALPHABET, *made, *others]
    types = [NORMAL] * (len(tokens) - len(others)) + [*others.values()]
    return {
        "tokenizer.ggml.model": "gpt2",
        **({} if pre is None else {"tokenizer.ggml.pre": pre}),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, dtype=np.int32),
        "tokenizer.ggml.merges": pairs,
        **{f"tokenizer.ggml.{key}": value for key, value in settings.items()},
    }


def write_vocabulary(metadata: dict[str, Any], path: Path) -> Path:
    """A GGUF file without tensors, written by the gguf package."""
    writer = gguf.GGUFWriter(str(path), "llama")
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, np.ndarray):
            writer.add_array(key, value.tolist())
        elif value:  # gguf cannot write an empty list
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path
