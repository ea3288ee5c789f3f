"""Recipes by name, from files, and what `--format F` means for a model family."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.checkpoint.families import Family
from quantlab.errors import InputError
from quantlab.formats import FORMATS, BlockFormat, Recipe, format_named
from quantlab.formats.blocks import ALIASES

if TYPE_CHECKING:
    from quantlab.checkpoint.checkpoint import Checkpoint

VOCABULARY_FORMAT = "q8_0"  # small models lose most through embedding and head; large ones barely grow
KEPT = ("none", "float")  # a file's words, beside null, for a tensor that stays as it is
# GGUF's names of the matrices that lose most for their size (llama.cpp issue 1256, PR 2807); where queries, keys and
# values are one matrix, all of it.
SENSITIVE = ("blk.{}.attn_v", "blk.{}.attn_qkv", "blk.{}.ffn_down")


def default_recipe(family: Family, format: BlockFormat, uniform: bool = False) -> Recipe:
    """Linear weights in `format`; embedding and head in Q8_0 where `format` has fewer bits, or alike if `uniform`.

    Everything else (norms, biases, position tables) stays as it is.
    """
    vocabulary = format_named(VOCABULARY_FORMAT)
    if uniform or format.bits_per_weight >= vocabulary.bits_per_weight:
        vocabulary = format
    rules = [(family.embedding, vocabulary.name), (family.head, vocabulary.name)]
    return Recipe((*rules, *((pattern, format.name) for pattern in family.linear)))


def mixed_recipe(family: Family) -> Recipe:
    """Q4_1, with Q5_1 for attention values and down projections and Q8_0 for embedding and head."""
    stems = {theirs: ours for ours, theirs in family.gguf.stems}
    finer = [(f"{stems[stem].format('*')}.weight", "q5_1") for stem in SENSITIVE if stem in stems]
    return Recipe((*finer, *default_recipe(family, format_named("q4_1")).rules))


def _uniformly(name: str) -> Callable[[Family], Recipe]:
    return lambda family: default_recipe(family, format_named(name))


PRESETS: dict[str, Callable[[Family], Recipe]] = {
    **{name: _uniformly(name) for name in (*FORMATS, *ALIASES)},
    "q4_1-mixed": mixed_recipe,
}


def named_recipe(recipe: str, family: Family, names: Iterable[str]) -> Recipe:
    """A preset, or the recipe of a YAML file, for a model with tensors `names`.

    A file holds `rules`, a list of [pattern, format] of which the first that matches a tensor's full name decides
    (patterns are shell globs; a format of null leaves the tensor as it is), and `base`, a preset whose rules follow;
    without one, what no rule matches stays as it is.

    Raises:
        InputError: neither a preset nor a file, a broken file, an unknown format, or a pattern that matches no tensor.
    """
    if recipe in PRESETS:
        return PRESETS[recipe](family)
    path = Path(recipe).expanduser()
    if not path.is_file():
        raise InputError(f"recipe {recipe!r}: neither a file nor one of: {', '.join(PRESETS)}")
    data = _read_yaml(path)
    rules = tuple(_rules(data.get("rules"), path))
    try:
        own = Recipe(rules)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    listed = tuple(names)
    for pattern, _ in rules:
        if not any(fnmatchcase(name, pattern) for name in listed):
            raise InputError(f"{path}: pattern {pattern!r} matches no tensor of this model (see: quantlab inspect)")
    base = data.get("base")
    if base is None:
        return own
    if base not in PRESETS:
        raise InputError(f"{path}: base {base!r}: choose one of: {', '.join(PRESETS)}")
    return Recipe((*rules, *PRESETS[base](family).rules))


def _read_yaml(path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict) or (unknown := sorted(map(str, data.keys() - {"rules", "base"}))):
        found = f"knows no {unknown[0]!r}" if isinstance(data, dict) else "is no mapping"
        raise InputError(f"{path}: {found}; a recipe has rules: a list of [pattern, format], and maybe base: a preset")
    return data


def _rules(rules: object, path: Path) -> Iterator[tuple[str, str | None]]:
    if not isinstance(rules, list) or not rules:
        raise InputError(f"{path}: rules must be a list of [pattern, format]")
    for number, rule in enumerate(rules, start=1):
        match rule:
            case [str(pattern), str(format)]:
                yield pattern, None if format.lower() in KEPT else format
            case [str(pattern), None]:
                yield pattern, None
            case _:
                raise InputError(f"{path}: rule {number} is no [pattern, format]")


def check_some_layer_fits(checkpoint: Checkpoint, rules: Recipe, planned: Mapping[str, BlockFormat | None]) -> None:
    """Refuse a recipe under which no layer is packed: the output would be all but the original.

    Args:
        planned: what each tensor gets; embedding and head do not count.

    Raises:
        InputError: rows of all layers that the recipe names are no whole blocks of their formats.
    """
    vocabulary = (checkpoint.family.embedding, checkpoint.family.head)
    wanted = {name: f for name in planned if name not in vocabulary and (f := rules.format_by_name(name)) is not None}
    if wanted and all(planned[name] is None for name in wanted):
        name, format = next(iter(wanted.items()))
        raise InputError(
            f"{checkpoint.path}: no layer can be packed: {name} {list(checkpoint.shape(name))} and "
            f"{len(wanted) - 1} more have no rows of a multiple of {format.block_size} ({format.name}); "
            "choose another format"
        )
