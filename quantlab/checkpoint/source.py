"""From what a user types as MODEL to a folder or GGUF file on this machine; hub ids go through huggingface_hub."""

from __future__ import annotations

import re
from pathlib import Path

from quantlab.errors import InputError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SMALL_FILES = ("*.json", "*.txt", "*.jinja", "tokenizer.model", "LICENSE*", "README.md")


def is_gguf(path: Path) -> bool:
    """Whether the path of a model, as `local_model` gives it, is a GGUF file's."""
    return not path.is_dir() and (path.suffix == ".gguf" or _begins_like_gguf(path))


def _begins_like_gguf(path: Path) -> bool:
    """Whatever its name is: caches of downloads name files by their hash."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def local_model(model: str | Path, revision: str | None = None) -> Path:
    """The folder or GGUF file of `model`; a hub id is downloaded first if it is not at hand (HF_HOME, HF_HUB_OFFLINE,
    HF_TOKEN), at its newest revision or the one given.

    Raises:
        InputError: nothing is there under that name, neither as a path nor on the hub; a path that is there and a
            revision.
    """
    if not str(model):
        raise InputError("the model's name is empty; give a folder, a GGUF file or a hub id")
    try:
        path = Path(model).expanduser()
        exists = path.exists()
    except PermissionError as error:
        raise InputError(f"{model}: cannot be read: {error.strerror}") from None
    except (RuntimeError, OSError, ValueError):  # ~name of nobody; a name too long; a zero byte in it
        raise InputError(f"{str(model)[:200]}: no such folder or file") from None
    if exists and revision is not None:
        raise InputError(f"{model}@{revision}: is here, not on the hub, and has no revisions; leave out @{revision}")
    if path.is_dir():
        return _single_gguf(path)
    if exists and path.suffix != ".gguf" and not (path.is_file() and _begins_like_gguf(path)):
        raise InputError(f"{path}: is no GGUF file; give one, or the folder with config.json and the safetensors files")
    if exists:
        return path
    if path.suffix == ".gguf" or not HUB_ID.fullmatch(str(model)):
        raise InputError(f"{model}: no such folder or file")
    return _download(str(model), revision)


def _single_gguf(folder: Path) -> Path:
    """A folder that holds one GGUF file and no config.json means that file."""
    try:
        if (folder / "config.json").exists():
            return folder
        files = sorted(folder.glob("*.gguf"))
    except OSError as error:  # such as: not ours to look into
        raise InputError(f"{folder}: cannot be read: {error.strerror}") from None
    if len(files) > 1:
        raise InputError(f"{folder}: holds {len(files)} GGUF files; name one of them: {files[0].name} ...")
    return files[0] if files else folder


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=[*SMALL_FILES, "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(
                snapshot_download(repository, revision=revision, allow_patterns=[*SMALL_FILES, "pytorch_model*.bin"])
            )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{repository}: no such folder here, and the hub did not give it: {reason}") from None
    return folder
