"""Default recipes: what `--format F` means for a model family."""

from __future__ import annotations

from quantlab.checkpoint.families import Family
from quantlab.formats import BlockFormat, Recipe, format_named

VOCABULARY_FORMAT = "q8_0"  # small models lose most through embedding and head; large ones barely grow


def default_recipe(family: Family, format: BlockFormat, uniform: bool = False) -> Recipe:
    """Linear weights in `format`; embedding and head in Q8_0 where `format` has fewer bits, or alike if `uniform`.

    Everything else (norms, biases, position tables) stays as it is.
    """
    vocabulary = format_named(VOCABULARY_FORMAT)
    if uniform or format.bits_per_weight >= vocabulary.bits_per_weight:
        vocabulary = format
    rules = [(family.embedding, vocabulary.name), (family.head, vocabulary.name)]
    return Recipe((*rules, *((pattern, format.name) for pattern in family.linear)))
