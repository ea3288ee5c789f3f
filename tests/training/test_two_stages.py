"""The two-stage schedule: its rates by hand, and what an optimizer is told at each step of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_pretraining import STEP, write_recipe

from quantlab.training.pretrain import pretrain
from quantlab.training.two_stages import rate_share, second_stage


def test_rates_of_the_paper() -> None:
    """1.5e-3 after warm-up, 8e-4 at the half, from there 5e-4 to 0."""
    rates = [1.5e-3 * rate_share(step, 1000, 100) for step in (0, 50, 100, 300, 500, 750, 1000)]
    assert rates == pytest.approx([0, 0.75e-3, 1.5e-3, 1.15e-3, 5e-4, 2.5e-4, 0])
    assert 1.5e-3 * rate_share(499, 1000, 100) == pytest.approx(8e-4, abs=2e-6)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_runs_and_long_warmups(steps: int) -> None:
    shares = [rate_share(step, steps, 5) for step in range(steps + 1)]
    assert all(0 <= share <= 1 for share in shares)
    assert shares[-1] == 0
    assert second_stage(steps) == steps // 2


def test_a_run_has_both_stages(tmp_path: Path, prose: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW's rate and decay, step by step; vectors and biases never decay."""
    import torch

    seen = []
    original = torch.optim.AdamW.step

    def spy(optimizer, *arguments, **options):
        seen.append([(group["lr"], group["weight_decay"]) for group in optimizer.param_groups])
        return original(optimizer, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    recipe = write_recipe(
        tmp_path, optimizer="adamw", stages=2, tokens=8 * STEP, warmup_tokens=2 * STEP, weight_decay=0.1
    )
    pretrain(recipe, prose, tmp_path / "out")
    rates = [groups[0][0] for groups in seen]
    assert rates == pytest.approx([0.01 * rate_share(step, 8, 2) for step in range(8)])
    assert [groups[0][1] for groups in seen] == [0.1] * 4 + [0.0] * 4
    assert {groups[1][1] for groups in seen} == {0.0}
    log = json.loads((tmp_path / "out" / "training_log.json").read_text())
    assert log[-1]["step"] == 8
