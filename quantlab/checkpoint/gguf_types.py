"""GGUF's numbers for element types and metadata value types (ggml.h and gguf.h of https://github.com/ggml-org/ggml)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from quantlab.formats import FORMATS

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4

# Metadata value types: number -> numpy's little-endian word; a bool is one byte, 0 or 1.
SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "|b1", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9

# Element types that are read and written as they are: safetensors' word -> ggml's number.
PLAIN_TYPES = {"F32": 0, "F16": 1, "I8": 24, "I16": 25, "I32": 26, "I64": 27, "F64": 28, "BF16": 30}
FLOAT_TYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class ElementType:
    """`word` is safetensors' for plain types, ggml's name in lower case for blocks. A block holds `block_size` elements
    of a row in `block_bytes` bytes.
    """

    number: int
    word: str
    block_size: int
    block_bytes: int

    @property
    def is_plain(self) -> bool:
        """Whether elements lie one by one."""
        return self.block_size == 1


@lru_cache(maxsize=256)
def element_type(number: int) -> ElementType | None:
    """The element type that GGUF gives this number; None if there is none."""
    for word, plain in PLAIN_TYPES.items():
        if plain == number:
            return ElementType(number, word, 1, np.dtype("<u2" if word == "BF16" else _numpy_word(word)).itemsize)
    for format in FORMATS.values():
        if format.ggml_type == number:
            return ElementType(number, format.name, format.block_size, format.block_bytes)
    return _other_type(number)


def _numpy_word(word: str) -> str:
    return f"<{word[0].lower()}{int(word[1:]) // 8}"


def _other_type(number: int) -> ElementType | None:
    """Blocks that the `gguf` package knows and we only dequantize."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        return None
    size, nbytes = GGML_QUANT_SIZES[kind]
    return ElementType(number, kind.name.lower(), size, nbytes)
