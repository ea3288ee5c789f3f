"""Caches of prompts in a folder, for processes to come: what any of them computed of a prompt's beginning is reused.

A sequence lies there by blocks of 64 tokens, the last one shorter, each in a file (saved_cache.py). A block's key is
the SHA-256 of the key before it and of its tokens; the key before the first is the model's identity. So sequences that
begin alike share files, and one that grows adds files only. A file's name has the key before it, its own, and a hash of
its first tokens: looking a prompt up reads one listing of the folder, and the headers of those blocks that have these
tokens where the prompt leaves what is known.

A file that is missing, damaged or another's is a miss, and what is left is computed. Files appear complete; they are
not synced, because one that a crash cut short fails its checksum. Only files with names of ours are ever removed:
damaged ones, those that a longer block replaces, and beyond the folder's size the ones that were not used for longest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantlab.errors import InputError
from quantlab.generation.saved_cache import read_cache, read_tokens, write_to

if TYPE_CHECKING:
    from quantlab.generation.native_engine import NativeEngine

BLOCK_TOKENS = 64  # whole tiles of the core's cache
LEAST_TOKENS = 32  # shorter sequences are not written: see docs/generation.md
LEAST_GAIN = 8  # tokens that a restored cache must spare, and that a block has
DEFAULT_SIZE = 1_000_000_000  # bytes
STALE_SECONDS = 3600  # after which an unfinished file is a dead process's

_NAME = re.compile(r"(?P<first>\d{9})-(?P<place>[0-9a-f]{32}-[0-9a-f]{8})-(?P<key>[0-9a-f]{32})\.cache")
_UNFINISHED = re.compile(r"\.\d{9}-[0-9a-f]{32}-[0-9a-f]{8}-[0-9a-f]{32}\.cache\.[0-9a-f]{16}\.partial")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Block:
    """Tokens first .. first + len(tokens) - 1 of a sequence, behind those that the key `before` stands for."""

    first: int
    before: str
    tokens: tuple[int, ...]

    @cached_property
    def key(self) -> str:
        return _key(self.before, self.tokens)

    @cached_property
    def place(self) -> str:
        """What blocks that may share tokens with this one have in common."""
        return f"{self.before}-{_key('', self.tokens[:LEAST_GAIN])[:8]}"

    @property
    def name(self) -> str:
        """Of the file."""
        return f"{self.first:09d}-{self.place}-{self.key}.cache"


class PromptCache:
    """A folder of caches, of any models; for engines whose `prompt_cache` it is.

    Args:
        folder: made if it is not there.
        size: bytes that its files may take. Least recently used ones go first.

    Raises:
        InputError: the folder cannot be made or written, or the size is none.
    """

    def __init__(self, folder: str | Path, size: int = DEFAULT_SIZE) -> None:
        if size < 1:
            raise InputError(f"a prompt cache of {size} bytes: at least 1 is needed")
        self.folder, self.size = Path(folder), size
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            is_writable = os.access(self.folder, os.W_OK | os.X_OK)
        except OSError as error:
            raise InputError(f"{folder}: no folder for a prompt cache: {error.strerror}") from None
        if not is_writable:
            raise InputError(f"{folder}: the prompt cache cannot be written")

    def restore(self, engine: NativeEngine, token_ids: Sequence[int]) -> None:
        """Let the engine's sequence be the longest beginning of `token_ids` that it or the folder has.

        Nothing changes where the folder has fewer than `LEAST_GAIN` tokens more than the engine.
        """
        identity = engine.identity()
        known = common_prefix(engine.tokens, token_ids)
        chain, found = self._longest(self._files(), identity, token_ids)
        if found - known < LEAST_GAIN:
            return
        first = known // BLOCK_TOKENS  # blocks before it are there
        engine.rewind(first * BLOCK_TOKENS)
        for block in chain[first:]:
            if not self._take(engine, identity, block, min(len(block.tokens), found - block.first)):
                break
        self._mark_used(chain)

    def save(self, engine: NativeEngine) -> None:
        """Write what the folder lacks of the engine's sequence; a folder that cannot be written is told of and left."""
        if engine.position < LEAST_TOKENS:
            return
        identity = engine.identity()
        files = self._files()
        blocks = [block for block in _blocks(identity, engine.tokens) if len(block.tokens) >= LEAST_GAIN]
        missing = [block for block in blocks if not self._has(files, identity, block)]
        try:
            for block in missing:
                self._write(block, identity, engine.cache_of(block.first, block.first + len(block.tokens)))
                self._remove_beginnings(files, identity, block)
            self._mark_used(blocks)
            if missing:
                self._make_room()
        except OSError as error:
            logger.warning("%s: the prompt cache is not written: %s", self.folder, error.strerror)

    def _files(self) -> dict[str, list[str]]:
        """Names of the folder's files, by `_Block.place`."""
        names: dict[str, list[str]] = {}
        with contextlib.suppress(OSError):
            for name in os.listdir(self.folder):  # noqa: PTH208 names only: a path for each would take longer
                if match := _NAME.fullmatch(name):
                    names.setdefault(match["place"], []).append(name)
        return names

    def _longest(
        self, files: Mapping[str, list[str]], identity: Mapping[str, str], token_ids: Sequence[int]
    ) -> tuple[list[_Block], int]:
        """The stored blocks that begin as `token_ids` do, and how many tokens these have in common with them."""
        chain: list[_Block] = []
        for block in _blocks(identity, token_ids):
            if block.name in files.get(block.place, ()):
                chain.append(block)
                continue
            alike = self._alike(files, identity, block)
            if alike is None:
                return chain, block.first
            return [*chain, alike], block.first + common_prefix(alike.tokens, block.tokens)
        return chain, len(token_ids)

    def _alike(self, files: Mapping[str, list[str]], identity: Mapping[str, str], block: _Block) -> _Block | None:
        """Of the stored blocks in the same place the one that has most tokens in common with this one."""
        stored = {each: common_prefix(each.tokens, block.tokens) for each in self._beside(files, identity, block)}
        best = max(stored, key=stored.__getitem__, default=None)
        return best if best is not None and stored[best] else None

    def _beside(self, files: Mapping[str, list[str]], identity: Mapping[str, str], block: _Block) -> Iterator[_Block]:
        """The stored blocks in the same place."""
        for name in files.get(block.place, ()):
            if tokens := read_tokens(self.folder / name, _part(identity, block)):
                yield _Block(block.first, block.before, tuple(tokens))

    def _has(self, files: Mapping[str, list[str]], identity: Mapping[str, str], block: _Block) -> bool:
        """Whether the block is there, or a longer one that begins with it."""
        if block.name in files.get(block.place, ()):
            return True
        beside = self._beside(files, identity, block) if len(block.tokens) < BLOCK_TOKENS else ()
        return any(each.tokens[: len(block.tokens)] == block.tokens for each in beside)

    def _take(self, engine: NativeEngine, identity: Mapping[str, str], block: _Block, count: int) -> bool:
        """Give the engine a block's first `count` tokens; a block that is damaged is removed."""
        path = self.folder / block.name
        found = read_cache(path, _part(identity, block))
        if found is not None and found[0] == list(block.tokens) and engine.take_cache(*found, count):
            return True
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        return False

    def _write(self, block: _Block, identity: Mapping[str, str], cache: np.ndarray) -> None:
        path = self.folder / block.name
        temporary = path.with_name(f".{block.name}.{secrets.token_hex(8)}.partial")
        try:
            with temporary.open("xb") as file:
                write_to(file, _part(identity, block), list(block.tokens), cache)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _remove_beginnings(self, files: Mapping[str, list[str]], identity: Mapping[str, str], block: _Block) -> None:
        """Of what the new block begins with nothing is needed any more."""
        for each in self._beside(files, identity, block):
            if len(each.tokens) < len(block.tokens) and block.tokens[: len(each.tokens)] == each.tokens:
                (self.folder / each.name).unlink(missing_ok=True)

    def _mark_used(self, blocks: Sequence[_Block]) -> None:
        """All at the same time: a block is never older than one behind it."""
        now = time.time_ns()
        for block in blocks:
            with contextlib.suppress(OSError):  # another process may have removed it
                os.utime(self.folder / block.name, ns=(now, now))

    def _make_room(self) -> None:
        """Remove what was not used for longest, ends of sequences before their beginnings."""
        files, total = [], 0
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    if not entry.is_file(follow_symlinks=False):
                        continue
                    status = entry.stat(follow_symlinks=False)
                    if match := _NAME.fullmatch(entry.name):
                        files.append((status.st_mtime_ns, -int(match["first"]), entry.name, status.st_size))
                        total += status.st_size
                    elif _UNFINISHED.fullmatch(entry.name) and time.time() - status.st_mtime > STALE_SECONDS:
                        (self.folder / entry.name).unlink(missing_ok=True)
        for _, _, name, size in sorted(files):
            if total <= self.size:
                return
            (self.folder / name).unlink(missing_ok=True)
            total -= size


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    length = min(len(one), len(other))
    for index in range(length):
        if one[index] != other[index]:
            return index
    return length


def _key(before: str, tokens: Sequence[int]) -> str:
    return hashlib.sha256(before.encode() + np.asarray(tokens, "<i4").tobytes()).hexdigest()[:32]


def _blocks(identity: Mapping[str, str], token_ids: Sequence[int]) -> Iterator[_Block]:
    before = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    for first in range(0, len(token_ids), BLOCK_TOKENS):
        block = _Block(first, before, tuple(token_ids[first : first + BLOCK_TOKENS]))
        yield block
        before = block.key


def _part(identity: Mapping[str, str], block: _Block) -> dict[str, Any]:
    """What a block's file says that it is."""
    return {**identity, "first": block.first, "before": block.before}
