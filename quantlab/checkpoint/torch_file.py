"""Read legacy `pytorch_model.bin` files: never unpickled as code (`weights_only=True`), mapped, tensor by tensor."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from quantlab.checkpoint.tensors import TensorEntry, dtype_name, raw_bytes
from quantlab.errors import InputError


class TorchFile:
    """An open .bin file with the interface of `SafetensorsFile`."""

    def __init__(self, path: Path) -> None:
        import torch

        self.path = path
        try:
            loaded = _load(path)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{path}: no checkpoint of plain tensors: {reason}") from None
        if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
            raise InputError(f"{path}: holds something else than named tensors; save it again as safetensors")
        self._tensors: dict[str, torch.Tensor] = loaded
        self.metadata: dict[str, str] = {}
        self.entries = {name: TensorEntry(name, dtype_name(t.dtype), tuple(t.shape)) for name, t in loaded.items()}

    def read(self, name: str) -> np.ndarray:
        """The bytes of tensor `name`, a fresh uint8 array."""
        return raw_bytes(self._tensors[name]).copy()

    def close(self) -> None:
        """Drop the mapped tensors."""
        self._tensors = {}


def _load(path: Path) -> object:
    import torch

    # Files from before torch 1.6 are no zip archives and cannot be mapped: they are read whole.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
