"""What a merged folder says of itself: the config as it was written, and a README.md for people. Needs no network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from quantlab.checkpoint.source import HUB_ID
from quantlab.merging.config import MergeConfig
from quantlab.merging.methods.table import METHODS
from quantlab.merging.plan_types import MergePlan
from quantlab.merging.references import ModelReference

CONFIG_FILE = "merge_config.yml"
CARD_FILE = "README.md"


def card_files(config: MergeConfig, plan: MergePlan, name: str, stored_as: str) -> Mapping[str, bytes]:
    """The files by name.

    Args:
        name: of the merged model.
        stored_as: what its weights are kept in.
    """
    text = config.text if config.text.endswith("\n") else f"{config.text}\n"
    return {CONFIG_FILE: text.encode(), CARD_FILE: _card(config, plan, name, stored_as).encode()}


def _card(config: MergeConfig, plan: MergePlan, name: str, stored_as: str) -> str:
    method = METHODS[config.method]
    merged = [reference for reference in config.references if reference != config.base]
    lines = [
        *_front_matter(config),
        f"# {name}",
        "",
        f"A merge of {_count(len(merged), 'model')} with quantlab: method `{config.method}` ({method.source}).",
        "",
    ]
    if config.base is not None:
        lines += [f"Base model: `{_shown(config.base)}`", ""]
    lines += ["Merged:", "", *(f"- `{_shown(reference)}`" for reference in merged), ""]
    lines += [f"Weights: {len(plan.tensors)} tensors, {stored_as}.", ""]
    if plan.notes:
        lines += [*(f"- {note}" for note in plan.notes), ""]
    fence = "`" * max(3, 1 + _longest_run(config.text, "`"))
    lines += ["## Configuration", "", f"{fence}yaml", config.text.strip("\n"), fence, ""]
    return "\n".join(lines)


def _front_matter(config: MergeConfig) -> list[str]:
    """The hub's metadata: models that have ids there, and tags."""
    ids = dict.fromkeys(r.model for r in config.references if HUB_ID.fullmatch(r.model) and not Path(r.model).exists())
    named = ["base_model:", *(f"- {json.dumps(model)}" for model in ids)] if ids else []
    return ["---", *named, "library_name: transformers", "tags:", "- merge", "- quantlab", "---", ""]


def _shown(reference: ModelReference) -> str:
    """A model as others know it: a path's last part, a hub id as it is."""
    text = str(reference)
    return text if HUB_ID.fullmatch(reference.model) else " + ".join(
        Path(part).name for part in (reference.model, reference.adapter) if part
    )  # fmt: skip


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _longest_run(text: str, sign: str) -> int:
    longest = run = 0
    for character in text:
        run = run + 1 if character == sign else 0
        longest = max(longest, run)
    return longest
