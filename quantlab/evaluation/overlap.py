"""A warning where a model is scored on the very text that it was calibrated on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from quantlab.calibration.fingerprint import overlap_note
from quantlab.checkpoint import open_checkpoint
from quantlab.evaluation.windows import Window

logger = logging.getLogger(__name__)


def warn_of_overlap(model: str | Path, windows: Sequence[Window]) -> None:
    """Log it if the fingerprint of the model's calibration text comes back in `windows`."""
    checkpoint = open_checkpoint(model)
    note = overlap_note(checkpoint.sidecar("calibration"), [window.ids for window in windows])
    if note is not None:
        logger.warning("%s: %s", checkpoint.path, note)
