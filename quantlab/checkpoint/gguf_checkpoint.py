"""Open a GGUF file as a checkpoint: Hugging Face's names, rows and norms again, blocks as they are."""

from __future__ import annotations

import re
import reprlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from quantlab.checkpoint.checkpoint import Checkpoint
from quantlab.checkpoint.families import family_of
from quantlab.checkpoint.gguf_architectures import head_counts
from quantlab.checkpoint.gguf_config import config_of
from quantlab.checkpoint.gguf_file import GgufEntry, GgufFile
from quantlab.checkpoint.gguf_types import FLOAT_TYPES
from quantlab.checkpoint.json_file import parse_json
from quantlab.checkpoint.read_ahead import PartReader
from quantlab.checkpoint.rope import ROPE_TENSORS
from quantlab.checkpoint.tensors import TensorEntry, to_fp32
from quantlab.errors import InputError
from quantlab.formats import FORMATS, BlockFormat, Recipe

NORM_RESIDUALS = "quantlab.norm_residuals"
SPLIT_NAME = re.compile(r"(?P<stem>.*)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf")
DEQUANTIZE_ELEMENTS = 1 << 22  # at a time: the gguf package takes many times the memory of its result


class GgufCheckpoint(Checkpoint):
    """A GGUF file, or all files of a split one; see `Checkpoint`.

    The five block formats stay packed. Other block types count as fp32 tensors, which `read_bytes` dequantizes.

    Attributes:
        metadata: of the (first) file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = open_split(path)
        self.metadata: dict[str, Any] = self._files[0].metadata
        self._stored: dict[str, tuple[GgufFile, GgufEntry]] = {}
        theirs = {entry.name: (file, entry) for file in self._files for entry in file.entries.values()}
        self._holders = {name: file for name, (file, _) in theirs.items()}
        self.stored_names = tuple(theirs)
        shapes = {name: entry.shape for name, (_, entry) in theirs.items()}
        self.config = config_of(self.metadata, shapes, lambda name: self._read_fp32(*theirs[name]), str(path))
        self.family = family_of(self.config, str(path))
        self._heads = head_counts(self.config, str(path))
        for gguf_name, (file, entry) in theirs.items():
            if gguf_name not in ROPE_TENSORS:
                self._stored[self._checked_name(file, entry)] = (file, entry)
        self.tied = self._drop_tied_head()
        self.config["tie_word_embeddings"] = self.tied
        self.names = tuple(self._stored)
        self.recipe = self._recipe()
        self._residuals = self._norm_residuals()

    def entry(self, name: str) -> TensorEntry:
        entry = self._lookup(name)[1]
        if entry.type.word in FORMATS:
            rows, columns = entry.shape
            return TensorEntry(name, "U8", (rows, FORMATS[entry.type.word].row_bytes(columns)))
        is_kept = entry.type.is_plain and not self.family.gguf_offset(name)
        return TensorEntry(name, entry.type.word if is_kept else "F32", entry.shape)

    def stored_type(self, name: str) -> str:
        return self._lookup(name)[1].type.word.lower()

    def stored_bytes(self, name: str) -> int:
        return self._lookup(name)[1].nbytes

    def read_bytes(self, name: str) -> np.ndarray:
        file, entry = self._lookup(name)
        offset = self.family.gguf_offset(name)
        is_kept = (entry.type.is_plain or entry.type.word in FORMATS) and not offset
        data = file.read(entry.name) if is_kept else self._read_fp32(file, entry)
        if offset:
            data = (data - np.float32(offset)) + self._residuals.get(name, np.float32(0))
        rows = self.family.gguf_rows(name, entry.shape[0], self._heads)
        if rows is not None:
            theirs = data.reshape(entry.shape[0], -1)
            data = np.empty_like(theirs)
            data[rows] = theirs
        return np.ascontiguousarray(data).reshape(-1).view(np.uint8)

    def part_reader(self, name: str) -> PartReader | None:
        file, entry = self._lookup(name)
        lies_alike = self.entry(name).nbytes == entry.nbytes and not self.family.gguf_offset(name)
        if not lies_alike or self.family.gguf_rows(name, entry.shape[0], self._heads) is not None:
            return None
        return lambda begin, out: file.read_part(entry.name, begin, out)

    def read_stored(self, stored_name: str) -> np.ndarray:
        return self._holders[stored_name].read(stored_name)

    def sidecar(self, name: str) -> dict[str, Any] | None:
        text = self.metadata.get(f"quantlab.{name}")
        if text is None:
            return None
        try:
            value = parse_json(text.encode()) if isinstance(text, str) else None
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise InputError(f"{self.path}: metadata 'quantlab.{name}' is no JSON object; damaged")
        return value

    def full_name(self, stored_name: str) -> str:
        return self.family.name_of_gguf(stored_name) or stored_name

    def _lookup(self, name: str) -> tuple[GgufFile, GgufEntry]:
        try:
            return self._stored[name]
        except KeyError:
            raise self.no_such_tensor(name) from None

    def _checked_name(self, file: GgufFile, entry: GgufEntry) -> str:
        where = f"{file.path}: tensor {entry.name}"
        name = self.family.name_of_gguf(entry.name)
        if name is None:
            raise InputError(f"{where}: is no part of a {self.family.gguf.architecture} model that quantlab reads")
        if entry.type.is_plain and entry.type.word not in FLOAT_TYPES:
            raise InputError(
                f"{where}: holds {entry.type.word} numbers; weights are {', '.join(FLOAT_TYPES)} or blocks"
            )
        if len(entry.shape) > 2 or (len(entry.shape) == 1 and entry.type.word in FORMATS):
            raise InputError(f"{where}: shape {list(entry.shape)} in {entry.type.word} is no vector or matrix")
        return name

    def _drop_tied_head(self) -> bool:
        """Forget a stored copy of the embedding where config says that it is one, as NeoX's files must have."""
        embedding, head = self.family.embedding, self.family.head
        if head not in self._stored:
            return True
        if not self.config.get("tie_word_embeddings") or embedding not in self._stored:
            return False
        (_, one), (_, other) = self._stored[embedding], self._stored[head]
        if (one.type, one.shape) != (other.type, other.shape):
            return False
        if not np.array_equal(self.read_bytes(head), self.read_bytes(embedding)):
            return False
        del self._stored[head]
        return True

    def _recipe(self) -> Recipe | None:
        formats = {name: FORMATS.get(self._lookup(name)[1].type.word) for name in self.names}
        if not any(formats.values()):
            return None
        return Recipe(tuple(_rules(formats)))

    def _norm_residuals(self) -> dict[str, np.ndarray]:
        """What fp32 lost of each norm weight when 1 was added to it; see `GgufWriter`."""
        values = self.metadata.get(NORM_RESIDUALS)
        norms = [name for name in self.names if self.family.gguf_offset(name)]
        sizes = [self._lookup(name)[1].shape[0] for name in norms]
        if values is None or not norms:
            return {}
        if not isinstance(values, np.ndarray) or values.dtype != np.float32 or values.size != sum(sizes):
            raise InputError(f"{self.path}: metadata {NORM_RESIDUALS!r} does not fit the norms; damaged")
        return dict(zip(norms, np.split(values, np.cumsum(sizes)[:-1]), strict=True))

    def _read_fp32(self, file: GgufFile, entry: GgufEntry) -> np.ndarray:
        """The values, fp32 in the entry's shape."""
        raw = file.read(entry.name)
        if entry.type.word in FLOAT_TYPES:
            return to_fp32(raw, entry.type.word).reshape(entry.shape)
        return _dequantize(raw, entry, file.path)


def _dequantize(raw: np.ndarray, entry: GgufEntry, path: Path) -> np.ndarray:
    """Blocks of any ggml type through the `gguf` package, some rows at a time."""
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType(entry.type.number)
    out = np.empty(entry.shape, np.float32)
    rows, columns = out.reshape(-1, entry.shape[-1]), entry.shape[-1]
    blocks = raw.reshape(len(rows), -1)
    step = max(1, DEQUANTIZE_ELEMENTS // columns)
    try:
        for start in range(0, len(rows), step):
            rows[start : start + step] = quants.dequantize(blocks[start : start + step], kind)
    except NotImplementedError:
        raise InputError(f"{path}: tensor {entry.name}: element type {entry.type.word} cannot be read") from None
    return out


def _rules(formats: dict[str, BlockFormat | None]) -> Iterator[tuple[str, str | None]]:
    """One rule for tensors that differ in the layer alone, as far as they agree; else a rule each."""
    kinds: dict[str, set[str | None]] = {}
    for name, format in formats.items():
        kinds.setdefault(_kind(name), set()).add(None if format is None else format.name)
    seen = set()
    for name, format in formats.items():
        kind = _kind(name)
        word = None if format is None else format.name
        agreed = len(kinds[kind]) == 1
        if word is not None and not (agreed and kind in seen):
            yield (kind if agreed else name), word
        seen.add(kind)


def _kind(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name, count=1)


def open_split(path: Path) -> list[GgufFile]:
    """The file, or all files of which it is the first, as `split.*` metadata and file names tell.

    Raises:
        InputError: a damaged file, not the first one, or one of the others missing or out of place.
    """
    first = GgufFile(path)
    count = _split_number(first, "count", 1)
    if count in (0, 1):
        return [first]
    name = SPLIT_NAME.fullmatch(path.name)
    if name is None or int(name["count"]) != count:
        raise InputError(f"{path}: split.count is {count}, which its name (...-00001-of-0000N.gguf) does not bear out")
    if int(name["number"]) != 1 or _split_number(first, "no") != 0:
        number = int(name["number"])
        raise InputError(f"{path}: is part {number} of {count}; name the first, ...-00001-of-{count:05}.gguf")
    files = [first]
    for number in range(2, count + 1):
        part = path.with_name(f"{name['stem']}-{number:05}-of-{count:05}.gguf")
        if not part.is_file():
            raise InputError(f"{path}: its part {part.name} is missing; download it")
        file = GgufFile(part)
        if (_split_number(file, "no"), _split_number(file, "count")) != (number - 1, count):
            raise InputError(f"{part}: is not part {number} of {count}, whatever its name says; download it again")
        files.append(file)
    names = [name for file in files for name in file.entries]
    if len(set(names)) != len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise InputError(f"{path}: tensor {twice} is in two of its parts; download them again")
    expected = _split_number(first, "tensors.count", len(names))
    if expected != len(names):
        raise InputError(f"{path}: split.tensors.count is {expected}, and its parts hold {len(names)} tensors")
    return files


def _split_number(file: GgufFile, key: str, default: int = -1) -> int:
    number = file.metadata.get(f"split.{key}", default)
    if type(number) is not int:
        raise InputError(f"{file.path}: split.{key} is {reprlib.repr(number)} instead of a whole number; damaged")
    return number
