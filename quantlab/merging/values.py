"""Parameters of a merge as a config gives them: one value, a gradient over layers, or alternatives by tensor name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

Scalar = float | int | bool | str
Gradient = tuple[float, ...]
EVERYWHERE = "*"  # a filter that all names pass
BEGINNING, END = Fraction(0), Fraction(1)


@dataclass(frozen=True)
class Alternative:
    """A value, or numbers spread over the layers, for the tensors whose names contain `filter` (None: all)."""

    value: Scalar | Gradient
    filter: str | None = None

    def matches(self, name: str) -> bool:
        """Whether it is meant for tensor `name`."""
        return self.filter is None or self.filter == EVERYWHERE or self.filter in name


@dataclass(frozen=True)
class Setting:
    """One parameter at one place of a config; of its alternatives the first that matches counts."""

    alternatives: tuple[Alternative, ...]

    def at(self, name: str, position: Fraction) -> Scalar | None:
        """The value for tensor `name`; None if no alternative is meant for it.

        Args:
            position: of the tensor's layer, from 0 for the first to 1 for the last one.
        """
        for alternative in self.alternatives:
            if alternative.matches(name):
                value = alternative.value
                return interpolated(value, position) if isinstance(value, tuple) else value
        return None

    @property
    def filters(self) -> tuple[str, ...]:
        """The parts of names that it asks for."""
        return tuple(each.filter for each in self.alternatives if each.filter is not None)


def interpolated(gradient: Gradient, position: Fraction) -> float:
    """The value at `position` in [0, 1] of numbers that stand at equal distances, straight lines between them."""
    steps = position * (len(gradient) - 1)
    before = int(steps)
    share = float(steps - before)
    return gradient[before] + (gradient[before + 1] - gradient[before]) * share if share else gradient[before]


def position_of(layer: int, layers: int) -> Fraction:
    """Of layer `layer` among `layers`, from 0 to 1, exactly; a single layer stands at the beginning."""
    return Fraction(layer, layers - 1) if layers > 1 else BEGINNING


def value_at(levels: Sequence[Setting | None], name: str, position: Fraction) -> Scalar | None:
    """The value of a parameter for tensor `name`: that of the first level that has one for it."""
    for setting in levels:
        value = None if setting is None else setting.at(name, position)
        if value is not None:
            return value
    return None
