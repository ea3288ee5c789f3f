"""The result of quantization-aware training as a model: the blocks of the last forward pass, as they are."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.checkpoint import TensorEntry, open_writer
from quantlab.checkpoint.checkpoint import Checkpoint
from quantlab.checkpoint.export import packed_config
from quantlab.checkpoint.folder_writer import FolderWriter
from quantlab.checkpoint.tensors import torch_dtype
from quantlab.checkpoint.writer import CheckpointWriter
from quantlab.training.qat_model import QatModel
from quantlab.training.qat_plan import QatPlan
from quantlab.training.qat_settings import QatSettings
from quantlab.training.tuning import LOG

if TYPE_CHECKING:
    from quantlab.training.qat import QatResult

METHOD = "qat"


def write_trained(
    start: Checkpoint,
    trained: QatModel,
    plan: QatPlan,
    settings: QatSettings,
    result: QatResult,
    account: dict[str, Any],
    out: Path,
    overwrite: bool,
) -> QatResult:
    """Write the model to `out`; tensors that were not trained are copied from `start`.

    Returns:
        The result, with the written bytes and the writer's notes.
    """
    entries = [_entry(start, plan, name) for name in start.names]
    config = _config(start, plan, settings, result)
    calibration = start.sidecar("calibration")
    sidecars = {} if calibration is None else {"calibration": calibration}
    with open_writer(out, entries, config, companions=start, replace=overwrite, sidecars=sidecars) as writer:
        result = dataclasses.replace(result, bytes=writer.tensor_bytes, notes=(*result.notes, *writer.notes))
        _write_tensors(writer, start, trained, entries)
        if isinstance(writer, FolderWriter):
            log = json.dumps({"result": dataclasses.asdict(result), **account}, indent=2)
            writer.add_file(LOG, (log + "\n").encode())
    return result


def _write_tensors(writer: CheckpointWriter, start: Checkpoint, trained: QatModel, entries: list[TensorEntry]) -> None:
    state = trained.model.state_dict() if trained.all_trained else {}
    for entry in entries:
        if entry.name in trained.packed:
            writer.write_packed(entry.name, trained.packed[entry.name]())
        elif entry.name in state:
            weight = state[entry.name].detach().cpu()
            if start.family.is_transposed(entry.name):
                weight = weight.T
            writer.write(entry.name, weight.to(torch_dtype(entry.dtype)).contiguous())
        else:
            writer.copy(entry.name, start)


def _entry(start: Checkpoint, plan: QatPlan, name: str) -> TensorEntry:
    format = plan.formats.get(name)
    if format is None or start.format(name) is not None:
        stored = start.entry(name)
        return TensorEntry(name, stored.dtype, stored.shape)
    rows, columns = start.shape(name)
    return TensorEntry(name, "U8", (rows, format.row_bytes(columns)))


def _config(start: Checkpoint, plan: QatPlan, settings: QatSettings, result: QatResult) -> dict[str, Any]:
    """config.json, whose quantization_config tells how the blocks came about."""
    from importlib.metadata import version

    config = packed_config(start)
    made = config.get("quantization_config") or plan.recipe.to_config()
    own: dict[str, Any] = {"train": settings.train, "steps": result.steps, "float_steps": settings.float_steps}
    config["quantization_config"] = {
        **made,
        **({"after": made["method"]} if made.get("method") else {}),
        "method": METHOD,
        METHOD: own,
        "quantlab_version": version("quantlab"),
        **({} if settings.levels is None else {"levels": settings.levels}),
    }
    return config
