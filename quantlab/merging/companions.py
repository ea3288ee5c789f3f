"""Tokenizer, chat template and licence of a merged model, gathered in a folder from which every writer takes them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quantlab.checkpoint.checkpoint import Checkpoint
from quantlab.checkpoint.folder_writer import COMPANION_FILES
from quantlab.checkpoint.gguf_checkpoint import GgufCheckpoint
from quantlab.checkpoint.writer import Companions


@dataclass
class CompanionFolder:
    """A folder of companions' files; see `writer.Companions`."""

    path: Path


def gathered(source: Checkpoint, changes: Mapping[str, bytes | None], folder: Path) -> Companions:
    """The companions of `source` with some files replaced, or left out (None).

    A GGUF file whose tokenizer stays as it is stands for itself: what it says to llama.cpp goes along as it is.
    """
    if isinstance(source, GgufCheckpoint) and not changes:
        return source
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if isinstance(source, GgufCheckpoint):
        from quantlab.checkpoint.gguf_tokenizer import tokenizer_files

        for name, content in tokenizer_files(source.metadata, str(source.path)).items():
            (folder / name).write_bytes(content)
    else:
        for name in COMPANION_FILES:
            if (source.path / name).is_file():
                shutil.copyfile(source.path / name, folder / name)
    for name, changed in changes.items():
        if changed is None:
            (folder / name).unlink(missing_ok=True)
        else:
            (folder / name).write_bytes(changed)
    return CompanionFolder(folder)
