"""The calibrated methods, and how tests look at what their runs leave behind or refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantlab import InputError

METHODS = ("search", "gptq")


def spread(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(quantize, *arguments, **options) -> str:
    with pytest.raises(InputError) as error:
        quantize(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)
