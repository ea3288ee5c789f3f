"""What a file says of one tensor, and the element types files use."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from quantlab.errors import InputError

if TYPE_CHECKING:
    import torch

# safetensors' names and the bytes of one element; BOOL and the 8-bit floats are read as they are, never computed with.
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


MAX_NAME = 1024  # characters; the field's longest names have about 100


def check_name(name: str, path: Path) -> None:
    """Refuse names of a damaged or hostile file, which tables and reports would send to a terminal as they are.

    Raises:
        InputError: the name of a tensor in `path` is empty, endless, or holds characters that do not print.
    """
    if not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise InputError(f"{path}: tensor name {name[:99]!r} is not 1 to {MAX_NAME} printable characters; damaged")


@dataclass(frozen=True)
class TensorEntry:
    """Name, element type (safetensors' word) and shape of a stored tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return self.elements * DTYPE_BYTES[self.dtype]


# Unsigned words of an element's width, and the bits that are all set in NaN and infinity.
_EXPONENTS = {
    "F64": ("<u8", 0x7FF << 52),
    "F32": ("<u4", 0xFF << 23),
    "F16": ("<u2", 0x1F << 10),
    "BF16": ("<u2", 0xFF << 7),
}
FINITE_CHUNK = 1 << 20  # elements


def all_finite(raw: np.ndarray, dtype: str) -> bool:
    """Whether raw bytes (uint8 [nbytes]) of a float type hold neither NaN nor infinity."""
    return first_nonfinite(raw, dtype) is None


def first_nonfinite(raw: np.ndarray, dtype: str) -> int | None:
    """The first element that is NaN or infinite, counted from 0; None if there is none."""
    word, exponent = _EXPONENTS[dtype]
    bits = raw.view(word)
    mask = bits.dtype.type(exponent)
    for start in range(0, bits.size, FINITE_CHUNK):
        bad = (bits[start : start + FINITE_CHUNK] & mask) == mask
        if bad.any():
            return start + int(bad.argmax())
    return None


def to_fp32(raw: np.ndarray, dtype: str) -> np.ndarray:
    """The values of raw bytes of a float type, fp32 [elements]; exact but for F64."""
    if dtype == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return raw.view(f"<f{DTYPE_BYTES[dtype]}").astype(np.float32, copy=False)


def torch_tensor(raw: np.ndarray, entry: TensorEntry) -> torch.Tensor:
    """View raw bytes (uint8 [nbytes], writable) as the tensor that `entry` describes, without a copy.

    Raises:
        InputError: torch has no such element type.
    """
    import torch

    if entry.dtype not in _TORCH_NAMES:
        raise InputError(f"{entry.name}: element type {entry.dtype} is not supported")
    dtype = getattr(torch, _TORCH_NAMES[entry.dtype])
    if not entry.elements:
        return torch.empty(entry.shape, dtype=dtype)  # torch views no array of no bytes
    return torch.from_numpy(raw).view(dtype).reshape(entry.shape)


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors word of a torch element type."""
    words = {name: word for word, name in _TORCH_NAMES.items()}
    return words[str(dtype).removeprefix("torch.")]


def torch_dtype(word: str) -> torch.dtype:
    """torch's element type of a safetensors word that it has."""
    import torch

    dtype: torch.dtype = getattr(torch, _TORCH_NAMES[word])
    return dtype


def raw_bytes(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a CPU tensor in row-major order, uint8 [nbytes]."""
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
