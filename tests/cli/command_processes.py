"""The installed command as a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

QUANTLAB = (sys.executable, "-m", "quantlab.cli")
Run = Callable[..., Any]  # see conftest.py
PATIENCE = 120  # seconds until a subprocess that does not do what it should counts as hung


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", **changes}


def quantlab_process(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the installed command to its end."""
    command = [*QUANTLAB, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment(), **options)


def heed_ctrl_c() -> None:
    """Whoever runs the tests in the background of a shell has Ctrl-C ignored, and so would their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass(frozen=True)
class Quantized:
    folder: Path
    report: dict[str, Any]
