"""What a tensor's full name tells: the layer that it is of, and its kind."""

from __future__ import annotations

import re

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")  # the first number between dots


def layer_and_kind(name: str) -> tuple[int | None, str]:
    """The layer, None outside the layers, and the name without layer and `.weight`."""
    stem = name.removesuffix(".weight")
    match = _LAYER.search(stem)
    if match is None:
        return None, stem.rpartition(".")[2]
    return int(match.group(1)), stem[match.end() :]
