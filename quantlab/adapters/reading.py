"""Open an adapter, whatever its files."""

from __future__ import annotations

from pathlib import Path

from quantlab.adapters.adapter import Adapter
from quantlab.adapters.peft_folder import CONFIG, read_peft_folder
from quantlab.checkpoint.source import HUB_ID
from quantlab.errors import InputError


def read_adapter(path: str | Path) -> Adapter:
    """The adapter in a peft folder.

    Raises:
        InputError: there is none, or it is damaged or of a kind that is not supported.
    """
    path = Path(path)
    check_folder(path)
    return read_peft_folder(path)


def local_adapter(adapter: str | Path, revision: str | None = None) -> Path:
    """The folder of an adapter; a hub id is downloaded first if it is not at hand, at its newest revision or the one
    given (HF_HOME, HF_HUB_OFFLINE, HF_TOKEN).

    Raises:
        InputError: nothing is there under that name, neither as a path nor on the hub.
    """
    path = Path(adapter).expanduser()
    if path.exists() or not HUB_ID.fullmatch(str(adapter)):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(adapter), revision=revision, allow_patterns=[CONFIG, "adapter_model.*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{adapter}: no such adapter here, and the hub did not give it: {reason}") from None


def check_folder(path: Path) -> None:
    """Refuse what can be no adapter.

    Raises:
        InputError: it is not there, or no folder.
    """
    if not path.exists():
        raise InputError(f"{path}: no such adapter; give the folder that holds adapter_config.json")
    if not path.is_dir():
        raise InputError(f"{path}: is no folder; give the one that holds adapter_config.json")


def check_not_around(adapter: Path, out: Path) -> None:
    """Refuse a destination whose replacement would take the adapter with it.

    Raises:
        InputError: `out` is the adapter's folder, or one around it.
    """
    if out.exists() and adapter.resolve().is_relative_to(out.resolve()):
        raise InputError(f"{out}: is the adapter itself, or a folder around it; choose another name")


def is_adapter(path: str | Path) -> bool:
    """Whether a path is a folder with an adapter in it."""
    return (Path(path) / CONFIG).is_file()
