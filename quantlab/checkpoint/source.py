"""From what a user types as MODEL to a folder on this machine: a path, or a hub id through huggingface_hub."""

from __future__ import annotations

import re
from pathlib import Path

from quantlab.errors import InputError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SMALL_FILES = ("*.json", "*.txt", "*.jinja", "tokenizer.model", "LICENSE*", "README.md")


def local_folder(model: str | Path) -> Path:
    """The folder of `model`; a hub id is downloaded first if it is not at hand (HF_HOME, HF_HUB_OFFLINE, HF_TOKEN).

    Raises:
        InputError: nothing is there under that name, neither as a path nor on the hub.
    """
    if not str(model):
        raise InputError("the model's name is empty; give a folder or a hub id")
    try:
        path = Path(model).expanduser()
    except RuntimeError:  # ~name of nobody
        raise InputError(f"{model}: no such folder") from None
    if path.is_dir():
        return path
    if path.is_file():
        raise InputError(f"{path}: is a file; give the folder with config.json and the safetensors files")
    if not HUB_ID.fullmatch(str(model)):
        raise InputError(f"{model}: no such folder")
    return _download(str(model))


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repository, allow_patterns=[*SMALL_FILES, "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(repository, allow_patterns=[*SMALL_FILES, "pytorch_model*.bin"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{repository}: no such folder here, and the hub did not give it: {reason}") from None
    return folder
