"""Copies of models, to be damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = Callable[..., str]
READERS = ("inspect", "quantize", "export")  # these read tensors alone
RUNNERS = ("compare",)  # builds the model in torch


def copy_of(model: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model, folder))


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
