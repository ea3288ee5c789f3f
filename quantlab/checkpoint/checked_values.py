"""Read values that somebody else wrote, key by key: what has the wrong type or size becomes a one-line error."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from quantlab.errors import InputError

MAX_INTEGER = 2**31 - 1  # llama.cpp keeps sizes and positions in int32
_FP32 = np.finfo(np.float32)
_ABSENT = object()


class CheckedValues:
    """Some JSON object's or GGUF file's values. A missing key takes its value in `defaults`, or else the one that the
    caller gives; null is a value.

    `source` is the file that errors name, `prefix` goes before every key, `way_out` ends every error.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        source: str,
        *,
        prefix: str = "",
        defaults: Mapping[str, Any] | None = None,
        way_out: str = "mend it",
    ) -> None:
        self.source, self.prefix, self.way_out = source, prefix, way_out
        self._values, self._defaults = values, defaults or {}

    def fault(self, key: str, problem: str, way_out: str | None = None) -> InputError:
        """The error for what is wrong with `key`."""
        return InputError(f"{self.source}: {self.prefix}{key} {problem}; {way_out or self.way_out}")

    def refusal(self, key: str, known: str, way_out: str | None = None) -> InputError:
        """The error for a value that is none of the `known` ones."""
        return self.fault(key, f"is {_brief(self.get(key))} instead of {known}", way_out)

    def has(self, key: str) -> bool:
        """Whether the key is there, null or not."""
        return self.prefix + key in self._values

    def get(self, key: str, default: Any = _ABSENT) -> Any:  # Any: JSON
        """The unchecked value.

        Raises:
            InputError: the key is missing and has no default.
        """
        if self.has(key):
            return self._values[self.prefix + key]
        value = self._defaults.get(key, default)
        if value is _ABSENT:
            raise self.fault(key, "is missing")
        return value

    def integer(self, key: str, default: Any = _ABSENT, *, least: int = 1, most: int = MAX_INTEGER) -> int:
        """A whole number."""
        value = self.get(key, default)
        if type(value) is not int or not least <= value <= most:
            raise self._wrong(key, value, f"a whole number from {least} to {most}")
        return value

    def number(self, key: str, default: Any = _ABSENT) -> float:
        """A positive number that fp32 can hold."""
        value = self.get(key, default)
        if not is_positive(value):
            raise self._wrong(key, value, "a positive number")
        return float(value)

    def flag(self, key: str, default: Any = _ABSENT) -> bool:
        """True or false; null counts as false."""
        value = self.get(key, default)
        if value is None:
            return False
        if type(value) is not bool:
            raise self._wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: Any = _ABSENT) -> str:
        """A string."""
        value = self.get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "text")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        """A JSON object; missing and null count as empty."""
        value = self.get(key, None)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self._wrong(key, value, "an object")
        return dict(value)

    def below(self, key: str, values: Mapping[str, Any]) -> CheckedValues:
        """The object that lies under `key`; errors name its keys as `key.name`."""
        dotted = {f"{self.prefix}{key}.{name}": value for name, value in values.items()}
        return CheckedValues(dotted, self.source, prefix=f"{self.prefix}{key}.", way_out=self.way_out)

    def _wrong(self, key: str, value: object, wanted: str) -> InputError:
        return self.fault(key, f"is {_brief(value)} instead of {wanted}")


def _brief(value: object) -> str:
    """One short line, even for an array."""
    return " ".join(reprlib.repr(value).split())


def is_positive(value: object) -> bool:
    """Whether this is a number above zero that fp32 holds, as a normal number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return float(_FP32.tiny) <= value <= float(_FP32.max)


def shortest(value: float) -> float:
    """The number with the fewest digits that has the same fp32: 1e-05 for the 9.99999974e-06 that a GGUF file gives."""
    return float(str(np.float32(value)))
