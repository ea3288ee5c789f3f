"""Open an adapter, whatever its files."""

from __future__ import annotations

from pathlib import Path

from quantlab.adapters.adapter import Adapter
from quantlab.adapters.peft_folder import CONFIG, read_peft_folder
from quantlab.errors import InputError


def read_adapter(path: str | Path) -> Adapter:
    """The adapter in a peft folder.

    Raises:
        InputError: there is none, or it is damaged or of a kind that is not supported.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such adapter; give the folder that holds adapter_config.json")
    if not path.is_dir():
        raise InputError(f"{path}: is no folder; give the one that holds adapter_config.json")
    return read_peft_folder(path)


def is_adapter(path: str | Path) -> bool:
    """Whether a path is a folder with an adapter in it."""
    return (Path(path) / CONFIG).is_file()
