"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="Model folder or hub id.", show_default=False)]
Text = Annotated[Path, typer.Argument(help="UTF-8 text file; lines <|endoftext|> part documents.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Threads = Annotated[
    int | None, typer.Option("--threads", "-t", help="Threads to compute with.", show_default="all cores")
]
Context = Annotated[int, typer.Option("--context", help="Tokens per window.")]
Stride = Annotated[
    int | None, typer.Option("--stride", help="Move windows on by this many tokens.", show_default="a whole window")
]
