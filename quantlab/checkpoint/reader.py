"""Open what a user names as MODEL."""

from __future__ import annotations

from pathlib import Path

from quantlab.checkpoint.checkpoint import Checkpoint
from quantlab.checkpoint.json_file import read_json
from quantlab.checkpoint.source import is_gguf, local_model

__all__ = ["Checkpoint", "open_checkpoint", "read_json"]


def open_checkpoint(model: str | Path, revision: str | None = None) -> Checkpoint:
    """Open a folder, a GGUF file or a hub id, this at its newest revision or the one given.

    Raises:
        InputError: what is missing or wrong, with the file's name.
    """
    path = local_model(model, revision)
    if is_gguf(path):
        from quantlab.checkpoint.gguf_checkpoint import GgufCheckpoint

        return GgufCheckpoint(path)
    from quantlab.checkpoint.huggingface_folder import HuggingFaceFolder

    return HuggingFaceFolder(path)
