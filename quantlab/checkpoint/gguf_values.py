"""Values of a GGUF file's metadata that make a vocabulary: texts, lists and ids, each checked before it is believed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from quantlab.checkpoint.checked_values import CheckedValues

NO_IDS = (-1, (1 << 32) - 1)  # how some converters write that there is no such token


class VocabularyValues(CheckedValues):
    """Checked access to metadata. Every method raises InputError for a value of another type than it is for."""

    def __init__(self, metadata: Mapping[str, Any], source: str) -> None:
        super().__init__(metadata, source, way_out="the file is damaged, or converted by a program with a fault")

    def token_id(self, key: str, tokens: int) -> int | None:
        """An id below `tokens`; None where there is none, or the file says that there is no such token."""
        value = self.get(key, None)
        if value is None or (type(value) is int and value in NO_IDS):
            return None
        return self.integer(key, least=0, most=tokens - 1)

    def texts(self, key: str) -> list[str]:
        """A list of texts, which must be there."""
        value = self.get(key)
        if not isinstance(value, list) or not {str}.issuperset(map(type, value)):
            raise self.refusal(key, "a list of texts")
        return value

    def numbers(self, key: str, kinds: str, count: int) -> np.ndarray:
        """`count` numbers of numpy's `kinds` ("iu" for whole ones, "iuf" for any), which must be there."""
        try:
            array = np.asarray(self.get(key))
        except ValueError:  # a list of lists
            array = np.empty((0, 0))
        if array.ndim != 1 or (array.size and array.dtype.kind not in kinds):
            raise self.refusal(key, "a list of numbers")
        if array.size != count:
            raise self.fault(key, f"has {array.size} numbers for {count} tokens")
        return array

    def names_below(self, prefix: str) -> list[str]:
        """What follows `prefix` in the keys that begin with it."""
        return [key.removeprefix(prefix) for key in self._values if key.startswith(prefix)]
