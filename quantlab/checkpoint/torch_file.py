"""Read legacy `pytorch_model.bin` files: never unpickled as code (`weights_only=True`), mapped, tensor by tensor."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from quantlab.checkpoint.tensors import TensorEntry, dtype_name, raw_bytes
from quantlab.errors import InputError

if TYPE_CHECKING:
    import torch

WAY_OUT = "get it, or save it again, as safetensors"


class TorchFile:
    """An open .bin file with the interface of `SafetensorsFile`."""

    def __init__(self, path: Path) -> None:
        import torch

        self.path = path
        try:
            loaded = _load(path)
        except pickle.UnpicklingError:  # torch's message advises to run whatever the file holds
            raise InputError(f"{path}: damaged, or holds more than tensors, which could run code; {WAY_OUT}") from None
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{path}: no checkpoint of plain tensors: {reason}") from None
        if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
            raise InputError(f"{path}: holds something else than named tensors; {WAY_OUT}")
        self._tensors: dict[str, torch.Tensor] = loaded
        self.metadata: dict[str, str] = {}
        self.entries = {name: _entry(name, tensor, path) for name, tensor in loaded.items()}

    def read(self, name: str) -> np.ndarray:
        """The bytes of tensor `name`, a fresh uint8 array."""
        return raw_bytes(self._tensors[name]).copy()

    def close(self) -> None:
        """Drop the mapped tensors."""
        self._tensors = {}


def _entry(name: object, tensor: torch.Tensor, path: Path) -> TensorEntry:
    import torch

    if not isinstance(name, str):
        raise InputError(f"{path}: a tensor is named {name!r}, which is no text; {WAY_OUT}")
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise InputError(f"{path}: tensor {name}: is sparse or has no data; {WAY_OUT}")
    try:
        return TensorEntry(name, dtype_name(tensor.dtype), tuple(tensor.shape))
    except KeyError:
        raise InputError(f"{path}: tensor {name}: element type {tensor.dtype} is not supported") from None


def _load(path: Path) -> object:
    import torch

    # Files from before torch 1.6 are no zip archives and cannot be mapped: they are read whole.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
