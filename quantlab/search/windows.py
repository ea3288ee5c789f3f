"""Text to measure on: windows for sensitivities, others for the result, and none of either among the calibration's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from quantlab.calibration.samples import SAMPLES, CalibrationRequest, CalibrationSamples, open_calibration
from quantlab.checkpoint import Checkpoint
from quantlab.errors import InputError

SENSITIVITY_WINDOWS = 16  # of the calibration's length: differences of one tensor show on little text
HELD_OUT_WINDOWS = 48
FEWEST_WINDOWS = 8  # of either kind: with fewer an error bar means nothing
DRAW = 1  # added to the seed, for a draw of its own

Ids = tuple[int, ...]


@dataclass(frozen=True)
class MeasuringText:
    """Windows of token ids: `sensitivity` to choose by, `held_out` to judge by. `calibration` is the request that the
    quantizer draws its own by, which meets none of them; None where the method reads no text.
    """

    sensitivity: tuple[Ids, ...]
    held_out: tuple[Ids, ...]
    calibration: CalibrationRequest | None
    notes: tuple[str, ...]


def measuring_text(checkpoint: Checkpoint, request: CalibrationRequest, calibrates: bool) -> MeasuringText:
    """Split the text that `request` names; `calibrates` tells whether the method reads some of it too.

    Raises:
        InputError: it is too short to have windows of every kind, or cannot be read (`open_calibration`).
    """
    wanted = SENSITIVITY_WINDOWS + HELD_OUT_WINDOWS
    calibration = request if calibrates else None
    samples = (request.samples or SAMPLES) if calibrates else 0
    drawn = open_calibration(checkpoint, replace(request, samples=samples + wanted, seed=request.seed + DRAW))
    free, notes = _free(checkpoint, drawn, calibration), []
    if calibration is not None and request.samples is None and _tokens(free) < wanted * drawn.length:
        fewer = min(samples, drawn.tokens // (2 * drawn.length))
        if fewer:  # half of a short text for each purpose
            calibration = replace(request, samples=fewer)
            free = _free(checkpoint, drawn, calibration)
            notes.append(f"the text is short: {fewer} x {drawn.length} tokens calibrate, the rest measures")
    sensitivity, held_out = _split(free, drawn.length)
    if min(len(sensitivity), len(held_out)) < FEWEST_WINDOWS:
        raise InputError(
            f"{request.text or 'the bundled text'}: too short to measure with: {len(free)} windows of up to "
            f"{drawn.length} tokens beside the calibration's, and {2 * FEWEST_WINDOWS} are needed; give --calibration "
            "more text, or a smaller --calibration-length"
        )
    return MeasuringText(sensitivity, held_out, calibration, tuple(notes))


def _free(checkpoint: Checkpoint, drawn: CalibrationSamples, calibration: CalibrationRequest | None) -> list[Ids]:
    """The drawn windows that are none of the calibration's, each once."""
    taken = set(open_calibration(checkpoint, calibration).windows) if calibration is not None else set()
    return [window for window in dict.fromkeys(drawn.windows) if window not in taken]


def _split(windows: Sequence[Ids], length: int) -> tuple[tuple[Ids, ...], tuple[Ids, ...]]:
    """The first windows to choose by, as many tokens as wanted but no more than their share; then held-out ones."""
    share = SENSITIVITY_WINDOWS / (SENSITIVITY_WINDOWS + HELD_OUT_WINDOWS)
    enough = min(SENSITIVITY_WINDOWS * length, int(max(share, 1 / 3) * _tokens(windows)))
    end, tokens = 0, 0
    while end < len(windows) and tokens < enough:
        tokens += len(windows[end])
        end += 1
    last, tokens = end, 0
    while last < len(windows) and tokens < HELD_OUT_WINDOWS * length:
        tokens += len(windows[last])
        last += 1
    return tuple(windows[:end]), tuple(windows[end:last])


def _tokens(windows: Sequence[Ids]) -> int:
    return sum(map(len, windows))
