"""Unfinished work and saved statistics: a run that goes on from them ends with the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from calibrated_runs import METHODS, refusal, spread
from safetensors.torch import load_file

from quantlab.calibration import blockwise
from quantlab.calibration.samples import CalibrationRequest
from quantlab.formats import FORMATS


class Killed(BaseException):
    """Stands for a signal."""


def kill_at(note: str):
    """A progress callback that dies once `note` is reported."""

    def progress(done: int, total: int, said: str) -> None:
        if said.startswith(note):
            raise Killed

    return progress


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("note", ["block 1 of 2: fitting o_proj", "block 2 of 2: reading", "embedding and head"])
def test_a_resumed_run_ends_with_the_bytes_of_an_uninterrupted_one(llama_model, method, note, quantize, tmp_path):
    options = {"method": method, "statistics_out": tmp_path / "first.safetensors"}
    quantize(llama_model, tmp_path / "first", **options)
    options["statistics_out"] = tmp_path / "second.safetensors"
    with pytest.raises(Killed):
        quantize(llama_model, tmp_path / "second", **options, progress=kill_at(note))
    assert not (tmp_path / "second").exists()
    work = tmp_path / "second.quantizing"
    assert (work / "block-0000.safetensors").exists() == (not note.startswith("block 1"))
    reports: list[str] = []
    report = quantize(
        llama_model, tmp_path / "second", **options, resume=True, progress=lambda *call: reports.append(call[2])
    )
    assert any(said.startswith("block 1") for said in reports) == note.startswith("block 1")
    assert spread(tmp_path / "first") == spread(tmp_path / "second")
    assert (tmp_path / "first.safetensors").read_bytes() == (tmp_path / "second.safetensors").read_bytes()
    assert not work.exists()
    again = quantize(llama_model, tmp_path / "third", method)
    assert report.tensors == again.tensors


def test_a_kill_after_the_last_step_needs_no_model(llama_model, quantize, monkeypatch, tmp_path):
    """All tensors are there; only the destination has to be written."""
    quantize(llama_model, tmp_path / "first")

    def fail(*_) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("quantlab.checkpoint.folder_writer.FolderWriter._finish", fail)
        with pytest.raises(Killed):
            quantize(llama_model, tmp_path / "second")
    with monkeypatch.context() as patch:
        patch.setattr(blockwise.BlockwiseQuantizer, "_embed", fail)
        quantize(llama_model, tmp_path / "second", resume=True)
    assert spread(tmp_path / "first") == spread(tmp_path / "second")


def test_unfinished_work_is_not_lost_by_accident(llama_model, quantize, tmp_path):
    out, work = tmp_path / "out", tmp_path / "out.quantizing"
    with pytest.raises(Killed):
        quantize(llama_model, out, progress=kill_at("block 2"))
    before = spread(work)
    message = refusal(quantize, llama_model, out)
    assert message == f"{work}: holds unfinished work; pass --resume to go on with it, or delete the folder"
    assert spread(work) == before
    quantize(llama_model, out, overwrite=True)
    assert not work.exists()


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"format": "q5_1"}, "recipe "),
        ({"method": "search"}, "method "),
        ({"levels": 8}, "method_options "),
        ({"method_options": {"refit_rounds": 0}}, "method_options "),
        ({"request": CalibrationRequest(length=64)}, "calibration "),
        ({"statistics_out": Path("statistics.safetensors")}, "statistics_out false, now it is true"),
    ],
)
def test_work_of_other_options_is_not_gone_on_with(llama_model, options, difference, quantize, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Killed):
        quantize(llama_model, tmp_path / "out", progress=kill_at("block 2"))
    message = refusal(quantize, llama_model, tmp_path / "out", resume=True, **options)
    begin = f"{tmp_path / 'out.quantizing'}: the unfinished work was begun with "
    assert message.startswith(begin + difference)
    assert message.endswith("; give the same options, or delete the folder")


def test_work_on_another_model_is_not_gone_on_with(llama_model, make_model, quantize, tmp_path):
    with pytest.raises(Killed):
        quantize(llama_model, tmp_path / "out", progress=kill_at("block 2"))
    other = make_model(tmp_path / "other", "llama", seed=1)
    assert "was begun with model " in refusal(quantize, other, tmp_path / "out", resume=True)


def test_nothing_to_resume_is_a_note(llama_model, quantize, tmp_path):
    report = quantize(llama_model, tmp_path / "out", resume=True)
    assert report.notes == (f"nothing to resume: {tmp_path / 'out.quantizing'} holds no unfinished work; began anew",)


# Saved statistics.


@pytest.fixture
def saved(untied, quantize, tmp_path):
    def save(method: str) -> Path:
        path = tmp_path / f"{method}.safetensors"
        quantize(untied, tmp_path / f"{method}-made", method, statistics_out=path)
        return path

    return save


@pytest.mark.parametrize("method", METHODS)
def test_saved_statistics_give_the_same_blocks_without_running_the_model(untied, method, saved, quantize, tmp_path):
    path = saved(method)
    report = quantize(untied, tmp_path / "out", method, statistics=path)
    first = load_file(tmp_path / f"{method}-made" / "model.safetensors")
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)
    told = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["calibration"]
    assert told["statistics_of"] == method
    assert report.notes == ()


def test_statistics_of_gptq_serve_search_but_not_the_other_way(untied, saved, quantize, tmp_path):
    full, diagonals = saved("gptq"), saved("search")
    report = quantize(untied, tmp_path / "out", "search", statistics=full)
    assert all(tensor.weighted_error for tensor in report.tensors if tensor.format in FORMATS)
    message = refusal(quantize, untied, tmp_path / "none", "gptq", statistics=diagonals)
    expected = "holds parts of second moments, and gptq needs whole ones; collect with --method gptq --statistics-out"
    assert message == f"{diagonals}: {expected}"


def test_statistics_of_another_model_are_refused(make_model, saved, quantize, tmp_path):
    path, other = saved("search"), make_model(tmp_path / "other", "llama", tied=False, seed=1)
    message = refusal(quantize, other, tmp_path / "none", "search", statistics=path)
    assert message == f"{path}: statistics of another model than {other}; collect them again"


def test_what_holds_no_statistics(untied, quantize, tmp_path):
    path = untied / "model.safetensors"
    message = refusal(quantize, untied, tmp_path / "none", "search", statistics=path)
    assert message == f"{path}: holds no statistics of quantlab's version 2"


def test_an_existing_statistics_file_is_not_overwritten(untied, saved, quantize, tmp_path):
    path = saved("search")
    message = refusal(quantize, untied, tmp_path / "none", "search", statistics_out=path)
    assert message == f"{path}: exists already; choose another name"
