"""Which tensors of a model are trained in which format, and what cannot be."""

from __future__ import annotations

from dataclasses import dataclass

from quantlab.adapters.targets import target_modules
from quantlab.checkpoint.checkpoint import Checkpoint
from quantlab.checkpoint.tensors import FLOAT_DTYPES
from quantlab.errors import InputError
from quantlab.formats import BlockFormat, Recipe, format_named
from quantlab.formats.blocks import check_own_scales
from quantlab.quantization.recipes import check_some_layer_fits, default_recipe, named_recipe
from quantlab.training.finetune_settings import FinetuneSettings
from quantlab.training.qat_settings import FORMAT, QatSettings


@dataclass(frozen=True)
class QatPlan:
    """`formats` by tensor name, with as many levels as are to be used; other tensors stay as they are. `adapted` are
    the modules with a LoRA. `notes` tell what one would have expected otherwise.
    """

    recipe: Recipe
    formats: dict[str, BlockFormat]
    adapted: tuple[str, ...]
    notes: tuple[str, ...]


def plan_qat(checkpoint: Checkpoint, settings: QatSettings, training: FinetuneSettings) -> QatPlan:
    """What to do with each tensor of `checkpoint`.

    Raises:
        InputError: the model cannot be trained so.
    """
    if any(checkpoint.format(name) is not None for name in checkpoint.names):
        return _packed_plan(checkpoint, settings)
    recipe = _recipe(checkpoint, settings)
    formats: dict[str, BlockFormat] = {}
    whole: dict[int, list[str]] = {}  # by the length of the blocks that their rows are no multiple of
    for name in checkpoint.names:
        if checkpoint.entry(name).dtype not in FLOAT_DTYPES:
            continue
        format = recipe.format_for(name, checkpoint.shape(name))
        if format is not None:
            in_vocabulary = name in (checkpoint.family.embedding, checkpoint.family.head)
            formats[name] = format if in_vocabulary else format.with_levels(settings.levels)
        elif (wanted := recipe.format_by_name(name)) is not None:
            whole.setdefault(wanted.block_size, []).append(name)
    check_some_layer_fits(checkpoint, recipe, {name: formats.get(name) for name in checkpoint.names})
    notes = [_stays_float(names, size) for size, names in whole.items()]
    if not formats:
        raise InputError(f"{checkpoint.path}: no tensor can be quantized" + "".join(f": {note}" for note in notes))
    _check_scales(checkpoint, formats, settings)
    adapted = _adapted(checkpoint, formats, training) if settings.train == "lora" else ()
    return QatPlan(recipe, formats, adapted, tuple(notes))


def _packed_plan(checkpoint: Checkpoint, settings: QatSettings) -> QatPlan:
    if not settings.trains_scales:
        raise InputError(
            f"{checkpoint.path}: is quantized, and --train {settings.train} trains float weights; give the model that "
            "it was made from, or use --train scales"
        )
    given = {
        "--format": settings.format, "--recipe": settings.recipe, "--levels": settings.levels,
        "--uniform": settings.uniform or None, "--method": None if settings.method == "rtn" else settings.method,
    }  # fmt: skip
    for option, value in given.items():
        if value is not None:
            raise InputError(f"{checkpoint.path}: is quantized, and its blocks keep their formats; leave out {option}")
    found = {name: checkpoint.format(name) for name in checkpoint.names}
    formats = {name: format for name, format in found.items() if format is not None}
    _check_scales(checkpoint, formats, settings)
    assert checkpoint.recipe is not None
    return QatPlan(checkpoint.recipe, formats, (), ())


def _recipe(checkpoint: Checkpoint, settings: QatSettings) -> Recipe:
    if settings.recipe is None:
        return default_recipe(checkpoint.family, format_named(settings.format or FORMAT), settings.uniform)
    if settings.uniform or settings.format is not None:
        raise InputError("--format and --uniform do not go with --recipe: a recipe names all formats itself")
    return named_recipe(settings.recipe, checkpoint.family, checkpoint.names)


def _stays_float(names: list[str], block: int) -> str:
    more = "" if len(names) == 1 else f" and {len(names) - 1} more"
    return f"{names[0]}{more}: stay float, for their rows are no multiple of {block}"


def _check_scales(checkpoint: Checkpoint, formats: dict[str, BlockFormat], settings: QatSettings) -> None:
    """Frozen codes leave the scales alone to train: one a tensor would be a single number for all of a layer."""
    for name, format in formats.items() if settings.trains_scales else ():
        check_own_scales(
            format, f"{checkpoint.path}: {name}: --train {settings.train}", "use --train full or lora on float weights"
        )
    if settings.train == "minimums" and not any(format.has_minimum for format in formats.values()):
        raise InputError(
            f"{checkpoint.path}: --train minimums needs blocks with a minimum, and no tensor has such: "
            "use q4_1 or q5_1, or --train scales"
        )


def _adapted(checkpoint: Checkpoint, formats: dict[str, BlockFormat], training: FinetuneSettings) -> tuple[str, ...]:
    modules = [name for name in target_modules(checkpoint, training.targets) if f"{name}.weight" in formats]
    if not modules:
        raise InputError(f"--targets {training.targets}: the recipe quantizes none of these layers")
    return tuple(modules)
