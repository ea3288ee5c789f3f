"""What a file says of one tensor, and the element types files use."""

from __future__ import annotations

import math
from dataclasses import dataclass
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


def raw_bytes(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a CPU tensor in row-major order, uint8 [nbytes]."""
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
