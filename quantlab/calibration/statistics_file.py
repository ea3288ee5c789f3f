"""Input statistics in a safetensors file: to be looked at, and used again for other formats and recipes.

Linear layers that read the same inputs share a tensor: `NAME.second_moment` [in, in], `NAME.tiles`
[in / 32, 32, 32] along its diagonal, or `NAME.mean_squares` [in], with
NAME that of the first of them. The metadata's "layers" leads from every weight to its tensor. `NAME.drift` [in, in]
or `NAME.output_drift` [out, in] lies beside a second moment that was taken behind quantized layers (`InputStatistics`).
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantlab.checkpoint.atomic import atomic_file
from quantlab.checkpoint.json_file import parse_json
from quantlab.checkpoint.positioned import write_all
from quantlab.checkpoint.safetensors_file import SafetensorsFile
from quantlab.checkpoint.tensors import raw_bytes
from quantlab.errors import InputError

if TYPE_CHECKING:
    from quantlab.quantization.statistics import InputStatistics

KIND = "quantlab.statistics"
VERSION = "2"
DRIFTS = ("drift", "output_drift")  # fields of `InputStatistics`, and what tensors are called


@dataclass(frozen=True)
class LayerSummary:
    """One kind of inputs: the weights that read them, how many there are, and their mean square over tokens and inputs;
    `dead` of the inputs were zero throughout.
    """

    weights: tuple[str, ...]
    inputs: int
    kind: str
    mean_square: float
    dead: int


@dataclass(frozen=True)
class StatisticsSummary:
    """What a statistics file holds."""

    statistics: str
    model: str
    tokens: int
    calibration: dict[str, Any]
    bytes: int
    layers: tuple[LayerSummary, ...]


class StatisticsFile:
    """An open statistics file.

    Attributes:
        model: the fingerprint of the checkpoint that it was taken from.
        method: for which quantizer, and so with what predecessors: float ones for `search`, quantized ones for `gptq`.
        calibration: where the tokens came from, as in a quantized model's configuration.

    Raises:
        InputError: no such file, or no statistics in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = SafetensorsFile(path)
        metadata = self._file.metadata
        if metadata.get(KIND) != VERSION:
            raise InputError(f"{path}: holds no statistics of quantlab's version {VERSION}")
        self.model, self.method = metadata.get("model", ""), metadata.get("method", "")
        try:
            self.calibration: dict[str, Any] = parse_json(metadata["calibration"].encode())
            self.layers: dict[str, str] = parse_json(metadata["layers"].encode())
            self.tokens = int(metadata["tokens"])
        except (KeyError, ValueError, TypeError, RecursionError):
            raise InputError(f"{path}: its metadata is damaged; collect the statistics again") from None
        entries = self._file.entries
        if not isinstance(self.layers, dict) or not all(
            key in entries and entries[key].dtype == "F32" for key in self.layers.values()
        ):
            raise InputError(f"{path}: names layers without statistics; damaged, collect them again")

    def statistics(self, name: str) -> InputStatistics | None:
        """Of the inputs of linear weight `name`; None if it has none."""
        import torch

        from quantlab.quantization.statistics import InputStatistics

        key = self.layers.get(name)
        if key is None:
            return None
        values = torch.from_numpy(self._values(key))
        if values.ndim == 2:
            keys = {drift: _beside(key, drift) for drift in DRIFTS}
            known = {drift: torch.from_numpy(self._values(k)) for drift, k in keys.items() if k in self._file.entries}
            return InputStatistics.of_second_moment(self.tokens, values, **known)
        if values.ndim == 3:
            return InputStatistics.of_tiles(self.tokens, values)
        return InputStatistics(self.tokens, values)

    @property
    def is_full(self) -> bool:
        """Whether it holds whole second moments."""
        return all(len(self._file.entries[key].shape) == 2 for key in self.layers.values())

    def check_model(self, fingerprint: str, checkpoint: Path) -> None:
        """Refuse statistics of another model.

        Raises:
            InputError: they are.
        """
        if fingerprint != self.model:
            raise InputError(f"{self.path}: statistics of another model than {checkpoint}; collect them again")

    def summary(self) -> StatisticsSummary:
        """What it holds, by layer."""
        groups: dict[str, list[str]] = {}
        for weight, key in self.layers.items():
            groups.setdefault(key, []).append(weight)
        layers = tuple(self._layer(key, weights) for key, weights in groups.items())
        size = sum(entry.nbytes for entry in self._file.entries.values())
        calibration = {key: value for key, value in self.calibration.items() if key != "fingerprint"}
        return StatisticsSummary(self.method, self.model, self.tokens, calibration, size, layers)

    def _layer(self, key: str, weights: Sequence[str]) -> LayerSummary:
        values = self._values(key)
        squares = values if values.ndim == 1 else np.diagonal(values, axis1=-2, axis2=-1).reshape(-1)
        mean, kind = float(squares.mean(dtype=np.float64)), key.rpartition(".")[2]
        return LayerSummary(tuple(weights), len(squares), kind, mean, int((squares == 0).sum()))

    def _values(self, key: str) -> np.ndarray:
        return self._file.read(key).view("<f4").reshape(self._file.entries[key].shape)


def is_statistics(path: Path) -> bool:
    """Whether a path is a file that claims to be one of statistics."""
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        return KIND in SafetensorsFile(path).metadata
    except InputError:
        return False


class StatisticsParts:
    """Statistics as they are collected, in files of a folder, so that memory stays flat and a resumed run has them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def add(self, step: str, weights: Sequence[str], statistics: InputStatistics) -> None:
        """Keep the statistics of the inputs that `weights` share."""
        kind, values = "mean_squares", statistics.diagonal
        for more, part in (("tiles", statistics.tiles), ("second_moment", statistics.second_moment)):
            if part is not None:
                kind, values = more, part
        key = f"{weights[0]}.{kind}"
        tensors = {key: values}
        for drift in DRIFTS:
            if (known := getattr(statistics, drift)) is not None:
                tensors[_beside(key, drift)] = known
        metadata = {"layers": json.dumps(list(weights)), "key": key, "tokens": str(statistics.tokens)}
        _write(self.folder / f"{step}-{weights[0]}.safetensors", tensors, metadata)

    def finish(self, out: Path, metadata: Mapping[str, str]) -> None:
        """Put everything into file `out`."""
        parts = [SafetensorsFile(path) for path in sorted(self.folder.glob("*.safetensors"))]
        layers: dict[str, str] = {}
        tokens = "0"
        for part in parts:
            layers |= dict.fromkeys(json.loads(part.metadata["layers"]), part.metadata["key"])
            tokens = part.metadata["tokens"]
        fields = {KIND: VERSION, **metadata, "tokens": tokens, "layers": json.dumps(layers)}
        _write(out, {key: part for part in parts for key in part.entries}, fields, replace=False)


def _beside(key: str, kind: str) -> str:
    return f"{key.rpartition('.')[0]}.{kind}"


def _write(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str], *, replace: bool = True) -> None:
    """Tensors are float32 ones of torch, or open files that hold them. Their order and everything else is fixed."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for key, tensor in tensors.items():
        shape = tensor.entries[key].shape if isinstance(tensor, SafetensorsFile) else tuple(tensor.shape)
        end = offset + 4 * int(np.prod(shape))
        header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-(8 + len(content)) % 64)
    with atomic_file(path, replace=replace) as temporary:
        descriptor = os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
        try:
            write_all(descriptor, memoryview(struct.pack("<Q", len(content)) + content), 0)
            for key, tensor in tensors.items():
                data = tensor.read(key) if isinstance(tensor, SafetensorsFile) else raw_bytes(tensor)
                write_all(descriptor, data.data, 8 + len(content) + header[key]["data_offsets"][0])
        finally:
            os.close(descriptor)
