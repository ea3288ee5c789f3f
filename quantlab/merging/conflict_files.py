"""The conflict report of a merge as files: measured while it runs, written when it is done."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from quantlab.errors import InputError, missing_extra
from quantlab.merging.conflicts import ConflictMeters, ConflictReport

if TYPE_CHECKING:
    import torch

    from quantlab.merging.plan_types import TensorPlan

DOTS = 120  # an inch, of the picture
TABLE, PLOT = "conflicts.json", "conflicts.png"


class ConflictFiles:
    """Takes the parts of a merge, and writes `conflicts.json` and `conflicts.png` to a folder.

    Raises:
        InputError: matplotlib is not installed, or the folder cannot be made: said before the merge, not after it.
    """

    def __init__(self, folder: Path) -> None:
        if find_spec("matplotlib") is None:
            raise missing_extra("matplotlib", "plot")
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: is no folder to write a conflict report to; choose another name")
        self._folder, self._meters = folder, ConflictMeters()

    def observe(self, plan: TensorPlan, base: torch.Tensor | None, tensors: Sequence[torch.Tensor]) -> None:
        """Take the next part of a tensor."""
        self._meters.observe(plan, base, tensors)

    def write(self, names: Sequence[str], errors: Mapping[str, float] | None) -> ConflictReport:
        """Write the report of the tensors `names`, with the errors of those that were packed."""
        from quantlab.checkpoint.atomic import atomic_file
        from quantlab.merging.conflict_plots import conflict_figure

        report = self._meters.report(names, errors)
        self._folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(self._folder / TABLE, replace=True) as path:
            path.write_text(json.dumps(asdict(report), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        with atomic_file(self._folder / PLOT, replace=True) as path:
            conflict_figure(report).savefig(path, dpi=DOTS, format="png")
        return report
