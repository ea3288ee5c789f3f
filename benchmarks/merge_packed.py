"""Three packed models merged and packed again, beside the float merge packed: how much further from the float merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from merge_tasks import TASKS
from merge_work import Models
from quality_statistics import ratio, score_files
from quantlab.cli.console import print_table, progress

from quantlab import quantize_checkpoint
from quantlab.calibration.calibrated import CalibrationOptions
from quantlab.checkpoint import load_tokenizer, open_checkpoint
from quantlab.evaluation.windows import windows_of

FORMAT = "q4_1"
MERGED = TASKS[:3]
CONTEXT = 128
GATE = 1.35  # x the divergence of the float merge packed; independent errors of three models predict 1.33


def packed_table(models: Models, method: str) -> dict[str, Any]:
    """Print both divergences, their ratio and how the errors go together."""
    tuned = [models.tuned(task) for task in MERGED]
    parents = [_packed(models, path, f"{path.name}-{method}", method) for path in tuned]
    reference = models.merged("float-thirds", _thirds(tuned))
    merged_packed = _packed(models, reference, f"float-thirds-{method}", method)
    options = {"format": FORMAT, "method": method, "calibration": _calibration(method)}
    packed_merged = models.merged(f"packed-thirds-{method}", _thirds(parents), **options)
    windows = windows_of(models.general, load_tokenizer(models.base), CONTEXT)
    with progress("divergence", "tokens") as bar:
        one, other = score_files(reference, [merged_packed, packed_merged], windows, CONTEXT, models.threads, bar)
    share, error = ratio(other.kld, one.kld)
    found = {"the float merge packed": one, "packed models merged and packed": other}
    rows = [(name, "{:.6f} +- {:.6f}".format(*scores.mean_kld), f"{scores.same_top_share:.2%}")
            for name, scores in found.items()]  # fmt: skip
    print_table((f"{FORMAT} by {method}, three models", "KL from the float merge", "same top"), rows)
    together = correlation(tuned, parents)
    verdict = "holds" if share <= GATE else "MISSED"
    print(
        f"ratio {share:.3f} +- {error:.3f}; gate {GATE}: {verdict}; correlation of the models' errors {together:+.4f}\n"
    )
    return {"method": method, "kld_float_packed": one.mean_kld, "kld_packed_packed": other.mean_kld, "ratio": share,
            "stderr": error, "correlation": together}  # fmt: skip


def _thirds(paths: list[Path]) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": str(path)} for path in paths], "dtype": "float32"}


def _calibration(method: str) -> CalibrationOptions | None:
    return None if method == "rtn" else CalibrationOptions()


def _packed(models: Models, source: Path, name: str, method: str) -> Path:
    path = models.folder / name
    if not path.exists():
        quantize_checkpoint(source, path, format=FORMAT, method=method, threads=models.threads)
    return path


def correlation(originals: list[Path], packed: list[Path]) -> float:
    """Of the rounding errors of two models, over all weights in blocks; the mean over pairs of models."""
    ours, theirs = [open_checkpoint(path) for path in originals], [open_checkpoint(path) for path in packed]
    products = np.zeros((len(ours), len(ours)))
    for name in theirs[0].names:
        format = theirs[0].format(name)
        if format is None or format.name != FORMAT:
            continue
        errors = [b.read(name, torch.float32) - a.read(name, torch.float32) for a, b in zip(ours, theirs, strict=True)]
        flat = torch.stack([error.reshape(-1).double() for error in errors])
        products += (flat @ flat.T).numpy()
    sizes = np.sqrt(np.diag(products))
    shares = products / np.outer(sizes, sizes)
    return float(shares[np.triu_indices(len(ours), 1)].mean())
