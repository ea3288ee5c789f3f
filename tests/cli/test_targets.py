"""`quantize` with a target as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml


@pytest.fixture
def measured(prose: Path) -> tuple[object, ...]:
    return ("--calibration", prose, "--calibration-length", 32, "-t", 1)


FIELDS = {
    "parameters", "bytes", "bits_per_weight", "seconds", "tensors", "plan", "kld", "kld_stderr", "kld_upper",
    "kld_joint", "kld_sum_of_parts", "measurements", "target_bpw", "max_kld",
}  # fmt: skip


def test_json_has_the_targets_fields(run, llama_model, measured, tmp_path):
    report = run("quantize", llama_model, tmp_path / "out", "--target-bpw", 5, *measured, "--json").json
    assert set(report) >= FIELDS
    assert report["bits_per_weight"] <= 5
    assert report["target_bpw"] == 5
    assert report["max_kld"] is None
    assert report["plan"] == str(tmp_path / "out.plan.yaml")
    seen = run("inspect", tmp_path / "out", "--json").json
    assert seen["bits_per_weight"] == report["bits_per_weight"]


def test_the_outcome_and_the_plan_are_shown(run, llama_model, measured, tmp_path):
    plan = tmp_path / "my.yaml"
    outcome = run("quantize", llama_model, tmp_path / "out.gguf", "--target-bpw", 5, "--plan", plan, *measured)
    assert outcome.status == 0, outcome.err
    assert "KL divergence" in outcome.out
    assert "sum of the parts" in outcome.out
    assert f"plan: {plan}" in outcome.out
    assert run("quantize", llama_model, tmp_path / "again.gguf", "--recipe", plan).status == 0
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "out.gguf").read_bytes()


def test_a_dry_run_prints_the_plan(run, llama_model, measured, tmp_path):
    outcome = run("quantize", llama_model, tmp_path / "out", "--target-bpw", 5, "--dry-run", *measured)
    assert outcome.status == 0, outcome.err
    text = "# quantlab plan" + outcome.out.partition("# quantlab plan")[2].partition("dry run:")[0]
    assert len(yaml.safe_load(text)["rules"]) == 15
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.plan.yaml").exists()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--target-bpw", 5, "--max-kld", 0.1), "--target-bpw and --max-kld exclude each other"),
        (("--target-bpw", 5, "--format", "q4_1"), "--target-bpw chooses the formats itself; leave --format out"),
        (("--target-bpw", 5, "--recipe", "q4_1-mixed"), "leave --recipe out"),
        (("--max-kld", 0.1, "--uniform"), "--max-kld chooses the formats itself; leave --uniform out"),
        (("--max-kld", 0.1, "--levels", 4), "leave --levels out"),
        (("--plan", "x.yaml"), "--plan goes with --target-bpw or --max-kld"),
        (("--plan-work", "x"), "--plan-work goes with"),
        (("--measurements", 5), "--measurements goes with"),
        (("--target-bpw", 2), "the least possible is 4."),
        (("--target-bpw", 12), "the most that can be used is 8."),
        (("--max-kld", "nan"), "must be a positive number"),
        (("--target-bpw", 5, "--statistics", "x.safetensors"), "do not go with a target"),
    ],
)
def test_options_that_contradict_each_other_are_refused(refusal, llama_model, tmp_path, options, line):
    assert line in refusal("quantize", llama_model, tmp_path / "out", *options)
    assert list(tmp_path.iterdir()) == []


def test_a_format_from_a_configuration_file_counts_as_given(refusal, llama_model, tmp_path):
    config = tmp_path / "options.yaml"
    config.write_text(json.dumps({"format": "q4_0"}))
    line = refusal("quantize", llama_model, tmp_path / "out", "--target-bpw", 5, "--config", config)
    assert "leave --format out" in line


def test_a_divergence_out_of_reach_names_the_best(refusal, llama_model, measured, tmp_path):
    line = refusal("quantize", llama_model, tmp_path / "out", "--max-kld", 1e-9, *measured)
    assert "no mix meets it with method rtn; the best found, at 8." in line
    assert not (tmp_path / "out").exists()
