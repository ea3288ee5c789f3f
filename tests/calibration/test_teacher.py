"""Stored targets say what the live teacher says, whole or by the likeliest entries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from quantlab.calibration import teacher as module
from quantlab.calibration.teacher import LiveTeacher, StoredTeacher, Targets, open_teacher
from quantlab.loading import load_model

IDS = np.random.default_rng(0).integers(3, 512, (6, 20))
WANTED = np.array([1, 2, 4])


def definition(teacher: torch.Tensor, student: torch.Tensor, temperature: float) -> torch.Tensor:
    p, q = (F.softmax(logits.double() / temperature, dim=-1) for logits in (teacher, student))
    return (p * (p / q).log()).sum(dim=-1)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergence_is_the_definition(temperature):
    generator = torch.Generator().manual_seed(0)
    teacher, student = (3 * torch.randn(2, 5, 50, generator=generator) for _ in range(2))
    result = Targets(F.log_softmax(teacher, dim=-1)).divergence(student, temperature)
    assert torch.allclose(result.double(), definition(teacher, student, temperature), rtol=1e-5)
    assert torch.allclose(
        Targets(F.log_softmax(teacher, dim=-1)).divergence(teacher, 2.0), torch.zeros(2, 5), atol=1e-6
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_entries_that_were_not_kept_count_as_one(temperature):
    generator = torch.Generator().manual_seed(0)
    teacher, student = (3 * torch.randn(2, 5, 50, generator=generator) for _ in range(2))
    log_p = F.log_softmax(teacher, dim=-1)
    top, ids = log_p.topk(8, dim=-1)
    others = log_p.scatter(-1, ids, -torch.inf)
    targets = Targets(top, ids, {temperature: (others / temperature).logsumexp(dim=-1)})
    p, q = (F.softmax(logits.double() / temperature, dim=-1) for logits in (teacher, student))
    merged = [torch.cat([x.gather(-1, ids), 1 - x.gather(-1, ids).sum(-1, keepdim=True)], dim=-1) for x in (p, q)]
    expected = (merged[0] * (merged[0] / merged[1]).log()).sum(dim=-1)
    assert torch.allclose(targets.divergence(student, temperature).double(), expected, rtol=1e-4)


@pytest.fixture
def model(llama_model):
    return load_model(llama_model)


@pytest.mark.parametrize("kept", [512, 64])
def test_stored_targets_are_the_live_ones(model, tmp_path, monkeypatch, kept):
    if kept < 512:
        monkeypatch.setattr(module, "FULL_VOCABULARY", 100)
        monkeypatch.setattr(module, "LIKELIEST", kept)
    live = LiveTeacher(model, IDS)
    stored = open_teacher(model, IDS, WANTED, 2.0, tmp_path / "teacher")
    assert isinstance(stored, StoredTeacher)
    student = torch.randn(2, 15, 512, generator=torch.Generator().manual_seed(0))
    windows = np.array([4, 1])
    for temperature in (1.0, 2.0):
        expected = live.targets(windows, 15).divergence(student, temperature)
        result = stored.targets(windows, 15).divergence(student, temperature)
        if kept == 512:
            assert torch.allclose(result, expected, rtol=1e-3)
        else:
            assert bool((result < expected).all())
            assert bool((result > 0.3 * expected).all())


def test_what_is_stored_is_read_again(model, tmp_path):
    open_teacher(model, IDS, WANTED, 2.0, tmp_path / "teacher")
    again = open_teacher(model, IDS, WANTED, 2.0, tmp_path / "teacher", lambda done, total: pytest.fail("computed"))
    assert isinstance(again, StoredTeacher)


def test_too_large_a_file_is_not_written(model, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LARGEST_FILES", 1000)
    assert isinstance(open_teacher(model, IDS, WANTED, 2.0, tmp_path / "teacher"), LiveTeacher)
    assert not (tmp_path / "teacher").exists()
