"""From a target to a file: sizes to the byte, resumption, plans that can be run again, refusals."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from quantlab import InputError, open_checkpoint, quantize_checkpoint
from quantlab.calibration.calibrated import CalibrationOptions
from quantlab.calibration.samples import CalibrationRequest
from quantlab.formats import FORMATS
from quantlab.search import sensitivities
from quantlab.search.allocate import quantize_to_target
from quantlab.search.budget import Budget
from quantlab.search.candidates import CANDIDATES, choosable
from quantlab.search.measuring import Meter

FAMILIES = [("llama", True), ("llama", False), ("gpt2", True), ("gpt_neox", False), ("phi3", True), ("gemma2", True)]


@pytest.fixture
def allocate(prose):
    """A function (model, out, options ...) -> report, on windows of 32 tokens."""

    def run(model: Path, out: Path, *, samples: int | None = None, **options):
        calibration = CalibrationOptions(request=CalibrationRequest(prose, samples=samples, length=32))
        return quantize_to_target(model, out, calibration=calibration, threads=1, **options)

    return run


@pytest.fixture(scope="module")
def bound_model(make_model, tmp_path_factory) -> Path:
    """With layers that matter so differently that no uniform format is a good choice."""
    return make_model(tmp_path_factory.mktemp("bound"), "llama", seed=3)


def spread(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
@pytest.mark.parametrize("suffix", ["", ".gguf"])
def test_sizes_are_those_of_the_written_file(make_model, tmp_path, family, tied, suffix):
    model = make_model(tmp_path / "model", family, tied=tied)
    checkpoint, out = open_checkpoint(model), tmp_path / f"out{suffix}"
    names = choosable(checkpoint)
    formats = {name: CANDIDATES[number % len(CANDIDATES)] for number, name in enumerate(names)}
    recipe = tmp_path / "recipe.yaml"
    rules = "".join(f"  - [{name}, {format.name}]\n" for name, format in formats.items())
    recipe.write_text(f"rules:\n{rules}")
    report = quantize_checkpoint(model, out, recipe=str(recipe))
    budget = Budget(checkpoint, names, out)
    assert budget.bytes_of(formats) == report.bytes == open_checkpoint(out).nbytes
    assert budget.bits_per_weight(report.bytes) == report.bits_per_weight
    assert not out.with_name(f".{out.name}.lock").exists()


@pytest.mark.parametrize("suffix", ["", ".gguf"])
def test_a_size_is_met_and_the_plan_can_be_run_again(allocate, bound_model, tmp_path, suffix):
    out = tmp_path / f"out{suffix}"
    report = allocate(bound_model, out, target_bpw=5.6)
    assert 5.45 < report.bits_per_weight <= 5.6
    assert report.bytes == open_checkpoint(out).nbytes
    assert report.plan == f"{out}.plan.yaml"
    assert report.plan_text == Path(report.plan).read_text(encoding="utf-8")
    again = tmp_path / f"again{suffix}"
    quantize_checkpoint(bound_model, again, recipe=report.plan)
    assert [t.format for t in report.tensors if t.format in FORMATS]
    assert again.read_bytes() == out.read_bytes() if suffix else spread(again) == spread(out)
    assert not out.with_name(f"{out.name}.planning").exists()


def test_figures_are_those_of_an_independent_measurement(allocate, bound_model, tmp_path):
    from quantlab.search.windows import measuring_text

    report = allocate(bound_model, tmp_path / "out", target_bpw=5.0)
    prose = Path(__file__).parents[1] / "data" / "prose.txt"
    checkpoint = open_checkpoint(bound_model)
    text = measuring_text(checkpoint, CalibrationRequest(prose, length=32), calibrates=False)
    held_out = Meter(checkpoint, text.held_out).measure(tmp_path / "out")
    assert (report.kld, report.kld_stderr) == (held_out.kld, held_out.stderr)
    assert report.kld_joint == Meter(checkpoint, text.sensitivity).measure(tmp_path / "out").kld
    assert report.kld_sum_of_parts == pytest.approx(report.kld_joint, rel=0.5)


def test_a_mix_beats_the_uniform_format_of_its_size(allocate, bound_model, tmp_path):
    quantize_checkpoint(bound_model, tmp_path / "uniform", format="q4_1", uniform=True)
    uniform = open_checkpoint(tmp_path / "uniform")
    size = 8 * uniform.nbytes / uniform.parameters
    report = allocate(bound_model, tmp_path / "mixed", target_bpw=size)
    assert report.bytes <= uniform.nbytes
    from quantlab.search.windows import measuring_text

    prose = Path(__file__).parents[1] / "data" / "prose.txt"
    checkpoint = open_checkpoint(bound_model)
    text = measuring_text(checkpoint, CalibrationRequest(prose, length=32), calibrates=False)
    assert report.kld < Meter(checkpoint, text.held_out).measure(tmp_path / "uniform").kld


class InterruptionError(Exception):
    """Like Ctrl-C, at a chosen moment."""


@pytest.mark.parametrize("after", [1, 9, 16])
def test_a_run_that_was_broken_off_goes_on_to_the_same_bytes(allocate, bound_model, tmp_path, monkeypatch, after):
    whole = allocate(bound_model, tmp_path / "whole", target_bpw=5.2)
    overlays = []

    class Counted(sensitivities.OverlaidCheckpoint):
        def __init__(self, *arguments) -> None:
            overlays.append(None)
            if len(overlays) == after + 1:
                raise InterruptionError
            super().__init__(*arguments)

    monkeypatch.setattr(sensitivities, "OverlaidCheckpoint", Counted)
    with pytest.raises(InterruptionError):
        allocate(bound_model, tmp_path / "out", target_bpw=5.2)
    assert not (tmp_path / "out").exists()
    report = allocate(bound_model, tmp_path / "out", target_bpw=5.2)
    assert report.plan_text == whole.plan_text
    assert spread(tmp_path / "out") == spread(tmp_path / "whole")
    assert any(note.startswith(f"{after} figures that were measured before") for note in report.notes)
    assert len(overlays) == after + 1 + report.measurements - after


def test_figures_serve_other_targets(allocate, bound_model, tmp_path):
    work = tmp_path / "work"
    alone = allocate(bound_model, tmp_path / "alone", target_bpw=6.0)
    allocate(bound_model, tmp_path / "one", target_bpw=4.8, plan_work=work)
    shared = allocate(bound_model, tmp_path / "two", target_bpw=6.0, plan_work=work)
    assert shared.plan_text == alone.plan_text
    assert (work / "figures.jsonl").is_file()


def test_measurements_can_be_rationed(allocate, bound_model, tmp_path):
    report = allocate(bound_model, tmp_path / "out", target_bpw=5.0, measurements=4)
    assert report.measurements == 4
    assert report.bits_per_weight <= 5.0


def test_a_dry_run_writes_nothing_but_a_plan_that_is_asked_for(allocate, bound_model, tmp_path):
    out, plan, work = tmp_path / "out", tmp_path / "plan.yaml", tmp_path / "work"
    report = allocate(bound_model, out, target_bpw=5.0, dry_run=True, plan_work=work)
    assert report.plan is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["work"]
    assert allocate(bound_model, out, target_bpw=5.0, dry_run=True, plan=plan, plan_work=work).plan == str(plan)
    assert not out.exists()
    written = quantize_checkpoint(bound_model, out, recipe=str(plan))
    assert (written.bytes, written.bits_per_weight) == (report.bytes, report.bits_per_weight)
    assert [t.format for t in written.tensors] == [t.format for t in report.tensors]


@pytest.mark.parametrize("method", ["search", "gptq"])
def test_calibrated_methods_take_targets_too(allocate, bound_model, tmp_path, method):
    report = allocate(bound_model, tmp_path / "out", target_bpw=4.9, method=method, samples=20)
    assert report.bits_per_weight <= 4.9
    assert 0 < report.kld < 1
    config = open_checkpoint(tmp_path / "out").config["quantization_config"]
    assert config["method"] == method
    assert config["calibration"]["samples"] >= 20


def test_the_smallest_mix_within_a_divergence(allocate, bound_model, tmp_path):
    middle = allocate(bound_model, tmp_path / "middle", target_bpw=5.5)
    report = allocate(bound_model, tmp_path / "out", max_kld=middle.kld_upper)
    assert report.kld_upper <= middle.kld_upper
    assert report.bytes <= 1.01 * middle.bytes
    loose = allocate(bound_model, tmp_path / "loose", max_kld=1e3)
    assert loose.bits_per_weight < 4.7  # everything in Q4_0 will do


def test_a_divergence_that_nothing_meets_is_refused_with_the_best(allocate, bound_model, tmp_path):
    with pytest.raises(InputError, match=r"no mix meets it with method rtn; the best found, at 8\.\d+ bits per weight"):
        allocate(bound_model, tmp_path / "out", max_kld=1e-9)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one target"),
        ({"target_bpw": 5.0, "max_kld": 0.1}, "give one target"),
        ({"target_bpw": 4.4}, r"the least possible is 4\.\d+ bits per weight \(all q4_0"),
        ({"target_bpw": 9.5}, r"the most that can be used is 8\.\d+ bits per weight \(all q8_0\)"),
        ({"target_bpw": float("nan")}, "must be a positive number"),
        ({"max_kld": -1.0}, "must be a positive number"),
        ({"target_bpw": 5.0, "measurements": 0}, "at least 1 is needed"),
        ({"target_bpw": 5.0, "method": "best"}, "unknown method"),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_measured(allocate, bound_model, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        allocate(bound_model, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_the_least_that_is_named_is_possible(allocate, bound_model, tmp_path):
    with pytest.raises(InputError) as error:
        allocate(bound_model, tmp_path / "out", target_bpw=1.0)
    least = float(str(error.value).partition("least possible is ")[2].split()[0])
    report = allocate(bound_model, tmp_path / "out", target_bpw=least)
    assert {t.format for t in report.tensors if t.format in FORMATS} == {"q4_0"}


def test_an_output_that_is_not_ours_is_kept(allocate, bound_model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(InputError, match="exists already"):
        allocate(bound_model, out, target_bpw=5.0)
    with contextlib.suppress(FileNotFoundError):
        assert not (tmp_path / "out.planning").exists()


def test_learned_starts_from_gptqs_sensitivities(allocate, bound_model, tmp_path):
    from quantlab.calibration.learned import LearnSettings

    options = {"target_bpw": 4.9, "samples": 20}
    report = allocate(bound_model, tmp_path / "out", method="learned", learning=LearnSettings(steps=2), **options)
    plain = allocate(bound_model, tmp_path / "plain", method="gptq", **options)
    assert [t.format for t in report.tensors] == [t.format for t in plain.tensors]
    assert report.kld_sum_of_parts == plain.kld_sum_of_parts
    assert open_checkpoint(tmp_path / "out").config["quantization_config"]["method"] == "learned"
