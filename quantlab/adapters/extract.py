"""A low-rank adapter out of two models: the leading singular directions of what fine-tuning changed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from quantlab.adapters.adapter import Adapter, LowRankPair, Training
from quantlab.adapters.peft_config import peft_config
from quantlab.adapters.peft_folder import write_peft_folder
from quantlab.adapters.targets import target_modules
from quantlab.adapters.truncated_svd import truncated_svd
from quantlab.checkpoint.atomic import check_destination
from quantlab.checkpoint.checkpoint import Checkpoint
from quantlab.checkpoint.checksums import model_digest
from quantlab.checkpoint.export import check_beside
from quantlab.checkpoint.reader import open_checkpoint
from quantlab.checkpoint.tensor_names import layer_and_kind
from quantlab.errors import InputError

MOST_RANK = 1 << 15  # which the kernels can sum

Progress = Callable[[int, int, str], None]  # (weights done, weights in all, the tensor at hand)


@dataclass(frozen=True)
class ExtractedTensor:
    """`captured` is the share of the change's squared Frobenius norm that the adapter holds, as its fp32 factors
    multiply; `change` the norm of the change over that of the base's weights; `rank` how many directions it takes.
    """

    name: str
    captured: float
    rank: int
    change: float


@dataclass(frozen=True)
class ExtractReport:
    """`adapter` is the folder; `captured` over all its tensors together; `tensors` are the weights that changed."""

    adapter: str
    captured: float
    parameters: int
    tensors: tuple[ExtractedTensor, ...]
    seconds: float
    notes: tuple[str, ...]


def extract_adapter(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    rank: int,
    targets: str = "all-linear",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExtractReport:
    """Write what `tuned` changed in the linear weights of `base` as a LoRA of rank `rank`, in peft's two files.

    The factors share the singular values: b = u sqrt(s), a = sqrt(s) v^T, with a scale of 1 (alpha = rank). Weights
    that did not change get no factors; where a change has fewer directions than `rank`, the other rows are zero.
    Changes elsewhere (norms, biases, embeddings, linear layers not among the targets) are left out and noted.

    Args:
        base, tuned: folder, GGUF file or hub id each, float or packed: what counts are the decoded weights.
        targets: "attention", "mlp", "all-linear", or ends of module names, parted by commas.
        overwrite: whether an existing `out` may be replaced.

    Raises:
        InputError: a wrong rank or target, models that do not belong together, or do not differ; `out` exists, or is
            one of the models.
    """
    started, out = time.monotonic(), Path(out)
    if not 1 <= rank <= MOST_RANK:
        raise InputError(f"--rank {rank}: 1 to {MOST_RANK} are possible")
    original, changed = open_checkpoint(base), open_checkpoint(tuned)
    for checkpoint in (original, changed):
        check_beside(checkpoint, out)
    modules = target_modules(original, targets)
    names = [f"{module}.weight" for module in modules]
    _check_pair(original, changed, names)
    check_destination(out, overwrite)
    report = _Reporter(progress, original)
    pairs: dict[str, LowRankPair] = {}
    tensors: list[ExtractedTensor] = []
    energy, kept = 0.0, 0.0
    for name in names:
        report(name)
        found = _extracted(original, changed, name, rank)
        if found is not None:
            pairs[name], tensor, whole = found
            tensors.append(tensor)
            energy, kept = energy + whole, kept + whole * tensor.captured
    notes = _notes(original, changed, set(names), report)
    if not pairs:
        raise InputError(f"{tuned}: its layers ({targets}) are those of {base}: there is nothing to extract")
    training = Training(base=model_digest(original), vocabulary=original.config.get("vocab_size", 0))
    adapter = Adapter(out, "lora", pairs, training)
    transposed = any(original.family.is_transposed(name) for name in pairs)
    config = peft_config(adapter, _place(base), tensors=original.names, transposed=transposed)
    write_peft_folder(adapter, config, out, replace=overwrite)
    return ExtractReport(
        str(out), kept / energy, adapter.parameters, tuple(tensors), time.monotonic() - started, tuple(notes)
    )


class _Reporter:
    """Counts the weights of the base as their tensors come up."""

    def __init__(self, progress: Progress | None, checkpoint: Checkpoint) -> None:
        self._progress, self._checkpoint, self._done = progress, checkpoint, 0

    def __call__(self, name: str) -> None:
        if self._progress is not None:
            self._progress(self._done, self._checkpoint.parameters, name)
        self._done += int(np.prod(self._checkpoint.shape(name)))


def _check_pair(base: Checkpoint, tuned: Checkpoint, names: list[str]) -> None:
    """Refuse models whose linear weights cannot be subtracted, naming all that differ."""
    if base.family.model_type != tuned.family.model_type:
        kinds = f"{tuned.family.model_type}, and {base.path} is {base.family.model_type}"
        raise InputError(f"{tuned.path}: is {kinds}; give the model that it was fine-tuned from")
    faults = []
    for name in names:
        if name not in tuned.names:
            faults.append(f"{name} is missing")
        elif base.shape(name) != tuned.shape(name):
            faults.append(f"{name} is {list(tuned.shape(name))}, in the base {list(base.shape(name))}")
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise InputError(
            f"{tuned.path}: does not fit {base.path}: {'; '.join(faults[:3])}{more}; "
            "give the model that it was fine-tuned from"
        )


@torch.inference_mode()
def _extracted(
    base: Checkpoint, tuned: Checkpoint, name: str, rank: int
) -> tuple[LowRankPair, ExtractedTensor, float] | None:
    """The pair, its report and the change's squared norm; None if there is no change."""
    original = _weights(base, name).to(torch.float64)
    size = float(original.square().sum())
    delta = _weights(tuned, name).to(torch.float64).sub_(original)
    del original
    energy = float(delta.square().sum())
    if not energy:
        return None
    found = truncated_svd(delta, rank)
    root = found.s.sqrt()
    a, b = torch.zeros(rank, delta.shape[1]), torch.zeros(delta.shape[0], rank)
    a[: found.rank], b[:, : found.rank] = root[:, None] * found.vh, found.u * root
    left = float(delta.sub_(b.to(torch.float64) @ a.to(torch.float64)).square().sum())
    change = (energy / size) ** 0.5 if size else float("inf")
    tensor = ExtractedTensor(name, max(0.0, 1 - left / energy), found.rank, change)
    return LowRankPair(a.numpy(), b.numpy(), 1.0), tensor, energy


def _weights(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    values = checkpoint.read(name, torch.float32)
    if not bool(values.isfinite().all()):
        raise InputError(f"{checkpoint.path}: {name}: holds NaN or infinity; the checkpoint is damaged")
    return values


def _notes(base: Checkpoint, tuned: Checkpoint, captured: set[str], report: _Reporter) -> list[str]:
    """What changed beside the targets, by kind of tensor."""
    kinds: dict[str, list[float]] = {}
    lost = []
    known = set(tuned.names)
    for name in base.names:
        if name in captured:
            continue
        report(name)
        if name not in known:
            lost.append(f"{name} is not in {tuned.path}")
        elif base.shape(name) != tuned.shape(name):
            shapes = f"{list(tuned.shape(name))}, in the base {list(base.shape(name))}"
            lost.append(f"{name} is {shapes}: its new rows are not in the adapter")
        elif change := _change(base, tuned, name):
            kinds.setdefault(layer_and_kind(name)[1], []).append(change)
    lost += [
        f"{name} is not in {base.path}: it is not in the adapter" for name in tuned.names if name not in base.names
    ]
    notes = [
        f"{kind} ({_count(changes)}) changed too, by at most {max(changes):.1e} of its norm: not in the adapter"
        for kind, changes in kinds.items()
    ]
    return notes + lost


def _count(tensors: Sequence[float]) -> str:
    return f"{len(tensors)} tensor{'s' if len(tensors) > 1 else ''}"


def _change(base: Checkpoint, tuned: Checkpoint, name: str) -> float:
    """The norm of a tensor's change over that of the base's; 0 where nothing did."""
    original, changed = _weights(base, name), _weights(tuned, name)
    if torch.equal(original, changed):
        return 0.0
    size = float(original.norm(dtype=torch.float64))
    return float(changed.sub_(original).norm(dtype=torch.float64)) / size if size else float("inf")


def _place(model: str | Path) -> str:
    """What adapter_config.json calls the base: a place that holds in any folder, or a hub id."""
    path = Path(model).expanduser()
    return os.path.abspath(path) if path.exists() else str(model)  # noqa: PTH100 links keep their names
