"""Which linear layers an adapter is for."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from quantlab.checkpoint.checkpoint import Checkpoint
from quantlab.errors import InputError

TARGET_GROUPS = ("attention", "mlp", "all-linear")


def target_modules(checkpoint: Checkpoint, targets: str) -> list[str]:
    """Full names of the modules that `targets` means, in the checkpoint's order; never the embedding or the head.

    Args:
        targets: "attention", "mlp", "all-linear", or ends of module names ("q_proj", "mlp.c_proj"), parted by commas.

    Raises:
        InputError: a part that matches no linear layer; the message lists those there are.
    """
    linear = [name.removesuffix(".weight") for name in checkpoint.names if _is_linear(checkpoint, name)]
    if targets in TARGET_GROUPS:
        chosen = set(linear if targets == "all-linear" else _group(linear, targets))
    else:
        wanted = [part.strip() for part in targets.split(",") if part.strip()]
        found = {part: {name for name in linear if name == part or name.endswith(f".{part}")} for part in wanted}
        if not wanted or (missing := [part for part, names in found.items() if not names]):
            unknown = repr(missing[0]) if wanted else "nothing"
            raise InputError(
                f"--targets: {unknown} is no linear layer of {checkpoint.path}; "
                f"choose {', '.join(TARGET_GROUPS)}, or some of: {', '.join(sorted({short_name(n) for n in linear}))}"
            )
        chosen = set().union(*found.values())
    return [name for name in linear if name in chosen]


def short_name(module: str) -> str:
    """The last two parts of a module's name, which tell its layers' kinds apart in every family."""
    return ".".join(module.split(".")[-2:])


def shortest_names(tensors: Collection[str], modules: Sequence[str]) -> list[str]:
    """Ends of names by which peft finds exactly `modules` among the modules of a model with these tensors; the full
    names where no ends do.
    """
    ends = sorted({short_name(name) for name in modules})
    everything = [name.removesuffix(".weight") for name in tensors]
    found = {name for name in everything if any(name.endswith(f".{end}") for end in ends)}
    return ends if found == set(modules) else list(modules)


def _group(linear: list[str], group: str) -> list[str]:
    in_attention = [name for name in linear if "attn" in name or "attention" in name]
    return in_attention if group == "attention" else [name for name in linear if name not in set(in_attention)]


def _is_linear(checkpoint: Checkpoint, name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in checkpoint.family.linear)
