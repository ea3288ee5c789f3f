"""The two-stage schedule of BitNet b1.58: a high rate with weight decay, then a lower one to zero without.

Training Tips, Code and FAQ of Ma et al. 2024 (arXiv 2402.17764): of their small models the rate falls from 1.5e-3 to
8e-4 in the first half of the steps and from 5e-4 to 0 in the second; weight decay is 0.1 and then 0. A latent weight
that nothing pulls to zero and a rate that halves at once let ternary weights settle.
"""

from __future__ import annotations

FIRST_END = 8 / 15  # shares of the highest rate
SECOND_START = 1 / 3


def second_stage(steps: int) -> int:
    """The first of `steps` steps, counted from 0, that belongs to the second stage."""
    return steps // 2


def rate_share(step: int, steps: int, warmup: int) -> float:
    """The learning rate of `step`, counted from 0, as a share of the highest, with so many steps of warm-up."""
    half = second_stage(steps)
    if step >= half:
        return SECOND_START * max(0, steps - step) / (steps - half)
    if step < warmup:
        return step / warmup
    return 1 - (1 - FIRST_END) * (step - warmup) / (half - warmup)
