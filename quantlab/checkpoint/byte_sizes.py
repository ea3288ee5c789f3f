"""Numbers of bytes as people write them."""

from __future__ import annotations

import re

from quantlab.errors import InputError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"\s*(?P<number>\d+(\.\d+)?)\s*(?P<unit>[kmgt]?i?)b?\s*", re.IGNORECASE)


def bytes_of(text: str, option: str = "--max-ram") -> int:
    """The bytes that `2GB`, `500M`, `1.5GiB` or a plain number name.

    Raises:
        InputError: it is no size.
    """
    found = _SIZE.fullmatch(text)
    unit = found["unit"].lower() if found else "i"
    if found is None or unit not in _UNITS or float(found["number"]) <= 0:
        raise InputError(f"{option} {text}: is no size; write it as 2GB, 500MB or 1.5GiB")
    return int(float(found["number"]) * _UNITS[unit])
