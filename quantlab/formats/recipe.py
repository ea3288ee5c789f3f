"""Recipes: which tensor gets which format, as ordered rules; also what `quantization_config` holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from quantlab.errors import InputError
from quantlab.formats.blocks import BlockFormat, format_named

QUANT_METHOD = "quantlab"
RULES_VERSION = 1


@dataclass(frozen=True)
class Recipe:
    """Ordered rules (pattern of tensor names, format name or None); the first match decides, no match means no format.

    Patterns are shell globs (`*` also crosses dots) over full Hugging Face names, such as
    `model.layers.*.mlp.down_proj.weight`.
    """

    rules: tuple[tuple[str, str | None], ...]

    def __post_init__(self) -> None:
        for _, name in self.rules:
            if name is not None:
                format_named(name)

    def format_for(self, name: str, shape: tuple[int, ...]) -> BlockFormat | None:
        """The format of tensor `name`; None where it stays as it is.

        Rows that are no whole number of blocks stay too, whatever the rules say.
        """
        format = self.format_by_name(name)
        return format if format is not None and format.fits(shape) else None

    def format_by_name(self, name: str) -> BlockFormat | None:
        """The format that the rules ask for, whatever the tensor's shape."""
        for pattern, format_name in self.rules:
            if fnmatchcase(name, pattern):
                return None if format_name is None else format_named(format_name)
        return None

    def to_config(self) -> dict[str, Any]:
        """The JSON form, a `quantization_config` of config.json."""
        rules = [list(rule) for rule in self.rules]
        return {"quant_method": QUANT_METHOD, "rules_version": RULES_VERSION, "rules": rules}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str) -> Recipe:
        """Read a `quantization_config`; `source` is the file that errors name.

        Raises:
            InputError: another method's config, a newer version, or malformed rules.
        """
        method, version = config.get("quant_method"), config.get("rules_version")
        if method != QUANT_METHOD:
            raise InputError(f"{source}: quantized by {method!r}, which quantlab does not read; use the original model")
        if version != RULES_VERSION:
            raise InputError(f"{source}: rules_version is {version!r}, this quantlab reads {RULES_VERSION}; upgrade it")
        rules = config.get("rules")
        if not isinstance(rules, list) or not all(_is_rule(rule) for rule in rules):
            raise InputError(f"{source}: quantization_config.rules must be a list of [pattern, format] pairs")
        try:
            return cls(tuple((pattern, format_name) for pattern, format_name in rules))
        except InputError as error:
            raise InputError(f"{source}: {error}") from None


def _is_rule(rule: object) -> bool:
    return (
        isinstance(rule, list)
        and len(rule) == 2
        and isinstance(rule[0], str)
        and (rule[1] is None or isinstance(rule[1], str))
    )
