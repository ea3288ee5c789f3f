"""A plan as a file: a recipe with one rule for each tensor, for `--recipe`, and what was measured as comments."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantlab.checkpoint.atomic import atomic_file
from quantlab.errors import InputError
from quantlab.formats import BlockFormat
from quantlab.search.candidates import CANDIDATES
from quantlab.search.sensitivities import Sensitivities

TITLE = "# quantlab plan"


@dataclass(frozen=True)
class Plan:
    """A format for each tensor that can have one, and the predicted sum of what they cost."""

    formats: Mapping[str, BlockFormat]
    bytes: int
    bits_per_weight: float
    sum_of_parts: float

    @property
    def digest(self) -> str:
        """A hash of the choice."""
        rules = [(name, format.name) for name, format in self.formats.items()]
        return hashlib.sha256(json.dumps(rules).encode()).hexdigest()[:16]


def plan_text(plan: Plan, table: Sensitivities, sizes: Mapping[str, int], facts: Sequence[str]) -> str:
    """The file: `facts` as comments, then the rules, each with its tensor's bytes (`sizes`) and figures."""
    names = [json.dumps(name) if _needs_quotes(name) else name for name in plan.formats]
    width = max(map(len, names)) + max(len(format.name) for format in plan.formats.values()) + len("  - [, ]")
    lines = [
        *(f"# {fact}" for fact in facts),
        f"# {plan.bits_per_weight:.4f} bits per weight, {plan.bytes} bytes; sum of the parts {plan.sum_of_parts:.6f}",
        "# Each rule: bytes, KL divergence that the tensor adds alone (nats per token), and in the other formats.",
        "# ~: estimated from the other formats' or tensors' figures. Edit the formats (null: as it is), then:",
        "#   quantlab quantize MODEL OUT --recipe THIS_FILE",
        "rules:",
    ]
    for written, (name, format) in zip(names, plan.formats.items(), strict=True):
        others = ", ".join(f"{f.name} {_figure(table, name, f)}" for f in CANDIDATES if f.name != format.name)
        rule = f"  - [{written}, {format.name}]"
        lines.append(f"{rule:<{width}}  # {sizes[name]} bytes, {_figure(table, name, format)}; {others}")
    body = "\n".join(lines) + "\n"
    return f"{TITLE} {_digest(body)}\n{body}"


def _needs_quotes(name: str) -> bool:
    return not name.replace("_", "").replace(".", "").isalnum() or not name[0].isalpha()


def _figure(table: Sensitivities, name: str, format: BlockFormat) -> str:
    figure = table.figure(name, format.name)
    return f"{figure.kld:.3g}" if figure.stderr is not None else f"~{figure.kld:.3g}"


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def plan_path_of(out: Path) -> Path:
    """Where the plan of destination `out` is written, unless the user says so."""
    return out.with_name(f"{out.name}.plan.yaml")


def check_plan_path(path: Path, overwrite: bool) -> None:
    """Refuse to lose a file that is no plan of ours, or one that was edited.

    Raises:
        InputError: there is one.
    """
    if overwrite or not os.path.lexists(path):
        return
    try:
        first, _, body = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        first, body = "", ""
    if first != f"{TITLE} {_digest(body)}":
        what = "an edited plan" if first.startswith(TITLE) else "no plan"
        raise InputError(f"{path}: exists and is {what}; name another with --plan, or pass --overwrite")


def write_plan(path: Path, text: str) -> None:
    """Put a plan's text into its file."""
    with atomic_file(path, replace=True) as temporary:
        temporary.write_text(text, encoding="utf-8")
