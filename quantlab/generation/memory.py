"""Whether a model fits into memory, asked before it is loaded: where memory runs out, systems kill without a word."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from quantlab.checkpoint import Checkpoint
from quantlab.errors import InputError
from quantlab.formats import FORMATS
from quantlab.generation.decoder_description import Description

GROUP_ROWS = 16  # rows that the core interleaves: the last group of a matrix is filled up
TILE_POSITIONS = 16  # tokens that the core's cache grows by
PASS_TOKENS = 64  # tokens that the decoder computes with at a time
BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "f64": 4.0}  # of an element in memory
CACHE_BYTES = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32}  # of a key's or value's element
PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Need:
    """Bytes that an engine takes, within a few percent."""

    weights: int
    cache: int
    scratch: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.cache + self.scratch


def needed_memory(checkpoint: Checkpoint, description: Description, context: int, kv: str) -> Need:
    """What a native engine needs for `context` tokens."""
    sizes = description.sizes
    positions = math.ceil(context / TILE_POSITIONS) * TILE_POSITIONS
    cache = 2 * sizes.blocks * sizes.kv_heads * sizes.head_dim * positions * CACHE_BYTES[kv]
    heads = (sizes.heads + sizes.kv_heads) * sizes.head_dim
    a_token = 4 * (4 * sizes.width + 2 * heads + 2 * sizes.feed_forward)
    angles = sum(rope.dims for rope in description.ropes) * context * 4 * 2  # tables, and their copies in the core
    weights = sum(_tensor_bytes(checkpoint, name) for name in checkpoint.names)
    return Need(int(weights), int(cache), PASS_TOKENS * a_token + angles)


def _tensor_bytes(checkpoint: Checkpoint, name: str) -> float:
    shape, word = checkpoint.shape(name), checkpoint.stored_type(name)
    if len(shape) != 2:
        return 4 * math.prod(shape)
    rows = math.ceil(shape[0] / GROUP_ROWS) * GROUP_ROWS
    format = FORMATS.get(word, FORMATS["q8_0"])  # what the core has no kernel for becomes Q8_0
    return rows * shape[1] * BYTES.get(word, format.block_bytes / format.block_size)


def available_memory() -> int | None:
    """Bytes that this process may still take without swapping; None where the system does not tell."""
    rooms = [room for room in (_free_memory(), *_cgroup_rooms()) if room is not None]
    return min(rooms) if rooms else None


def check_memory(source: str, need: Need) -> None:
    """Refuse what does not fit.

    Raises:
        InputError: more is needed than is available.
    """
    available = available_memory()
    if available is None or need.total <= available:
        return
    if need.weights + need.scratch > available:
        way_out = "the weights alone do not fit: quantize to fewer bits or free memory"
    else:
        way_out = "choose a smaller context or kv q8_0"
    raise InputError(
        f"{source}: {_gigabytes(need.total)} of memory needed (weights {_gigabytes(need.weights)}, "
        f"cache {_gigabytes(need.cache)}), {_gigabytes(available)} available; {way_out}"
    )


def check_branches(count: int, needed: int) -> None:
    """Refuse continuations of a sequence whose caches, `needed` bytes in all, do not fit.

    Raises:
        InputError: more is needed than is available.
    """
    available = available_memory()
    if available is not None and needed > available:
        raise InputError(
            f"{count} samples: {_gigabytes(needed)} of memory needed for their caches, {_gigabytes(available)} "
            f"available; ask for fewer samples or tokens, or choose kv q8_0"
        )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"


def _free_memory() -> int | None:
    """MemAvailable: the kernel's estimate, with the caches that it would give up."""
    for line in _lines(PROC / "meminfo"):
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def _cgroup_rooms() -> list[int | None]:
    """What the limits of this process's control groups leave, of either version and at every level."""
    rooms = []
    for line in _lines(PROC / "self" / "cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        root = CGROUPS / "memory" if controllers else CGROUPS
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        path = Path(name.lstrip("/"))
        rooms += [_room(root / level, *names) for level in (path, *path.parents)]
    return rooms


def _room(folder: Path, limit_name: str, used_name: str) -> int | None:
    limit, used = _number(folder / limit_name), _number(folder / used_name)
    if limit is None or used is None:
        return None
    stat = dict(line.partition(" ")[::2] for line in _lines(folder / "memory.stat"))
    files = stat.get("total_inactive_file", stat.get("inactive_file", "0"))  # caches that the kernel would give up
    return max(0, limit - used + (int(files) if files.isdigit() else 0))


def _number(path: Path) -> int | None:
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None  # "max": no limit


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []
