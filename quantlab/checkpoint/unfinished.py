"""Folders of unfinished work beside a destination: one process at a time, and gone on with by the same options alone.

A folder holds OPTIONS, which says what decides the outcome, and whatever its owner keeps there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quantlab.checkpoint.atomic import atomic_file
from quantlab.checkpoint.json_file import read_json
from quantlab.errors import InputError

OPTIONS = "options.json"
SHOWN_CHARACTERS = 60


@contextlib.contextmanager
def locked(folder: Path, remedy: str = "choose another name") -> Iterator[None]:
    """Have `folder`, made if it is not there, for this process alone.

    Raises:
        InputError: another process has it (`remedy` says what else can be done), or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InputError(f"{folder}: another process is at work there; wait, or {remedy}") from None
    try:
        yield
    finally:
        os.close(descriptor)


def begin(
    folder: Path, options: Mapping[str, Any], *, begun: bool, resume: bool, discard: bool, say: list[str] | None = None
) -> bool:
    """Decide what becomes of the work in `folder`.

    Args:
        options: JSON values that decide the outcome; unfinished work of others is not gone on with.
        begun: whether there is any that could be.
        resume: go on with it.
        discard: throw it away otherwise, instead of refusing.
        say: takes a note where there is nothing to resume.

    Returns:
        Whether it is gone on with; else the folder is empty but for the options.

    Raises:
        InputError: there is unfinished work that was not asked for, or of other options.
    """
    if begun and resume:
        check_options(folder, options)
        return True
    if begun and not discard:
        raise InputError(f"{folder}: holds unfinished work; pass --resume to go on with it, or delete the folder")
    if resume and say is not None:
        say.append(f"nothing to resume: {folder} holds no unfinished work; began anew")
    clear(folder)
    write_options(folder, options)
    return False


def clear(folder: Path) -> None:
    """Leave nothing in it."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_options(folder: Path, options: Mapping[str, Any], name: str = OPTIONS) -> None:
    """Note what decides the outcome of the work in `folder`."""
    with atomic_file(folder / name, replace=True) as path:
        path.write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")


def check_options(folder: Path, options: Mapping[str, Any]) -> None:
    """Refuse work that was begun with other options, naming the first that differs."""
    if differing := difference(folder, options):
        key, before, now = differing
        raise InputError(
            f"{folder}: the unfinished work was begun with {key} {before}, now it is {now}; give the same options, or "
            "delete the folder"
        )


def difference(folder: Path, options: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """The first option that is another one now: its name, its value before and its value now, as short JSON."""
    before, now = read_json(folder / OPTIONS), json.loads(json.dumps(options))
    key = next((key for key in sorted({*before, *now}) if before.get(key) != now.get(key)), None)
    return None if key is None else (key, _short(before.get(key)), _short(now.get(key)))


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."
