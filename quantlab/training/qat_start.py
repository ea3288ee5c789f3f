"""The quantized model that training of scales starts from, where a float one was given."""

from __future__ import annotations

import random

from quantlab.calibration.calibrated import CalibrationOptions
from quantlab.calibration.quantize import quantize_checkpoint
from quantlab.calibration.samples import LEAST_TOKENS, CalibrationRequest
from quantlab.calibration.work_folder import work_folder_of
from quantlab.checkpoint import load_tokenizer, open_checkpoint
from quantlab.checkpoint.atomic import atomic_file
from quantlab.checkpoint.checkpoint import Checkpoint
from quantlab.documents import DOCUMENT_END
from quantlab.training.qat_settings import FORMAT, QatSettings
from quantlab.training.surroundings import is_first_process
from quantlab.training.tuning import Tuning

START = "start"
CALIBRATION = "calibration.txt"
CALIBRATION_TOKENS = 1 << 18  # of training rows; calibration draws its windows from these
CALIBRATION_SAMPLES = 512  # windows of up to 512 tokens: training costs far more


def quantized_start(tuning: Tuning, settings: QatSettings) -> Checkpoint:
    """Quantize the model into the work folder, unless an interrupted run did so.

    Training rows calibrate; where they are too few, the text that quantlab brings along does.
    """
    import torch

    start = tuning.work / START
    if not (start / "config.json").is_file() and is_first_process():
        request = None
        if settings.method != "rtn" and sum(len(row.input_ids) for row in tuning.data.train) >= 2 * LEAST_TOKENS:
            _write_calibration(tuning)
            request = CalibrationRequest(tuning.work / CALIBRATION, CALIBRATION_SAMPLES, seed=tuning.settings.seed)
        quantize_checkpoint(
            tuning.source,
            start,
            format=settings.format or FORMAT,
            uniform=settings.uniform,
            recipe=settings.recipe,
            method=settings.method,
            levels=settings.levels,
            calibration=CalibrationOptions(request, resume=work_folder_of(start).is_dir()),
            threads=torch.get_num_threads(),
        )
    _wait_for_others()
    return open_checkpoint(start)


def _write_calibration(tuning: Tuning) -> None:
    """Training rows in an order drawn by the seed, as a text whose documents they are."""
    tokenizer, chosen, tokens = load_tokenizer(tuning.source), [], 0
    rows = list(tuning.data.train)
    random.Random(tuning.settings.seed).shuffle(rows)  # noqa: S311 no secret
    for row in rows:
        chosen.append(tokenizer.decode(row.input_ids, skip_special_tokens=True))
        tokens += len(row.input_ids)
        if tokens >= CALIBRATION_TOKENS:
            break
    with atomic_file(tuning.work / CALIBRATION, replace=True) as path:
        path.write_text(f"\n{DOCUMENT_END}\n".join(chosen), encoding="utf-8")


def _wait_for_others() -> None:
    from accelerate import PartialState

    PartialState().wait_for_everyone()
