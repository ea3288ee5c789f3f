"""Read legacy `pytorch_model.bin` files: never unpickled as code (`weights_only=True`), mapped, tensor by tensor."""

from __future__ import annotations

import os
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from quantlab.checkpoint.positioned import open_to_read
from quantlab.checkpoint.tensors import TensorEntry, check_name, dtype_name, raw_bytes
from quantlab.errors import InputError

if TYPE_CHECKING:
    import torch

WAY_OUT = "get it, or save it again, as safetensors"


class TorchFile:
    """An open .bin file with the interface of `SafetensorsFile`."""

    def __init__(self, path: Path) -> None:
        import torch

        self.path = path
        descriptor = open_to_read(path)
        self._size = os.fstat(descriptor).st_size
        os.close(descriptor)
        try:
            loaded = _load(path, self._size)
        except pickle.UnpicklingError:  # torch's message advises to run whatever the file holds
            raise InputError(f"{path}: damaged, or holds more than tensors, which could run code; {WAY_OUT}") from None
        except Exception as error:
            reason = " ".join([f"{type(error).__name__}:", *str(error).splitlines()[:1]])
            raise InputError(f"{path}: no checkpoint of plain tensors: {reason}") from None
        # A pickle may give dictionary and tensors attributes in place of their methods: only their types' own are used.
        if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in dict.values(loaded)):
            raise InputError(f"{path}: holds something else than named tensors; {WAY_OUT}")
        self._tensors = {name: torch.Tensor.detach(tensor) for name, tensor in dict.items(loaded)}
        self.metadata: dict[str, str] = {}
        self.entries = {name: _entry(name, tensor, path, self._size) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """The bytes of tensor `name`, a fresh uint8 array."""
        if not self.path.exists() or self.path.stat().st_size < self._size:  # touching what is gone kills the process
            raise InputError(f"{self.path}: was cut or removed while open, at tensor {name}")
        return raw_bytes(self._tensors[name]).copy()

    def close(self) -> None:
        """Drop the mapped tensors."""
        self._tensors = {}


def _entry(name: object, tensor: torch.Tensor, path: Path, size: int) -> TensorEntry:
    import torch

    if not isinstance(name, str):
        raise InputError(f"{path}: a tensor is named {name!r}, which is no text; {WAY_OUT}")
    check_name(name, path)
    is_dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_nested
    if not is_dense or tensor.is_neg():
        raise InputError(f"{path}: tensor {name}: is sparse or has no data of its own; {WAY_OUT}")
    try:
        entry = TensorEntry(name, dtype_name(tensor.dtype), tuple(tensor.shape))
    except KeyError:
        raise InputError(f"{path}: tensor {name}: element type {tensor.dtype} is not supported") from None
    if entry.nbytes > size:  # one number may stand for any number of equal ones
        raise InputError(f"{path}: tensor {name}: claims {entry.nbytes} bytes in a file of {size}; {WAY_OUT}")
    return entry


def _load(path: Path, size: int) -> object:
    import torch

    # Files from before torch 1.6 are no zip archives and cannot be mapped: they are read whole.
    is_archive = zipfile.is_zipfile(path)
    if is_archive:
        _check_archive(path, size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pickle protocols; the file is read or refused, and that says it all
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)


def _check_archive(path: Path, size: int) -> None:
    """torch stores, and maps, its parts as they are: compressed ones may grow a thousandfold, and be mapped packed."""
    with zipfile.ZipFile(path) as archive:
        for part in archive.infolist():
            if part.compress_type != zipfile.ZIP_STORED or part.file_size > size:
                raise ValueError(f"its part {part.filename!r} is compressed or larger than the file")
