"""Where candidates of a search are made, scored and thrown away: a folder for each process, beside the destination."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from quantlab.errors import InputError
from quantlab.merging.merge import merge_checkpoints
from quantlab.search.study import process_exists

PREFIX = "worker-"


@dataclass(frozen=True)
class MergeOptions:
    """How every candidate is merged; see `merge_checkpoints`."""

    max_ram: int | str | None
    seed: int
    threads: int | None


class Workshop:
    """Makes models of merge configs.

    Args:
        folder: that all processes of this machine share.
    """

    def __init__(self, folder: Path, options: MergeOptions) -> None:
        self.folder, self._options = folder, options
        self.own = folder / f"{PREFIX}{socket.gethostname()}-{os.getpid()}"

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Have the folder while the block runs; what killed processes left in it goes."""
        try:
            self.own.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be written: {error.strerror}") from None
        self._sweep()
        try:
            yield
        finally:
            shutil.rmtree(self.own, ignore_errors=True)
            with contextlib.suppress(OSError):
                self.folder.rmdir()  # if nothing is kept in it

    @contextlib.contextmanager
    def candidate(self, config: str, name: str) -> Iterator[Path]:
        """The model of a merge config (YAML), while the block runs.

        Raises:
            InputError: it cannot be merged.
        """
        folder = self.own / name
        try:
            self.merge(config, folder)
            yield folder
        finally:
            for left in self.own.glob(f"*{name}*"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()

    def merge(self, config: str, out: Path, *, overwrite: bool = False, dry_run: bool = False) -> None:
        """Merge to stay."""
        options = self._options
        merge_checkpoints(
            config,
            out,
            max_ram=options.max_ram,
            seed=options.seed,
            threads=options.threads,
            overwrite=overwrite,
            dry_run=dry_run,
        )

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other process is in such a block."""
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _sweep(self) -> None:
        host = socket.gethostname()
        for folder in self.folder.glob(f"{PREFIX}{host}-*"):
            number = folder.name.rpartition("-")[2]
            if number.isdigit() and not process_exists(int(number)):
                shutil.rmtree(folder, ignore_errors=True)
