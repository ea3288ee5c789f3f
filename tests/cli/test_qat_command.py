"""`quantlab qat`: its JSON object, its words, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from command_processes import Quantized
from finetune_cases import write_rows
from hostile_models import Run

pytest.importorskip("accelerate")

QUICK = ("--context", "64", "-b", "2", "--max-steps", "3", "--lr", "1e-3", "-t", "1")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows", train=12, valid=0) / "train.jsonl"


def test_json_and_words(run: Run, llama_model: Path, data: Path, tmp_path: Path) -> None:
    """The contract's fields, and the same figures for people; the result is a model that other commands read."""
    out = tmp_path / "out"
    result = run("qat", llama_model, data, out, "--eval-split", "4", "--teacher", llama_model, *QUICK, "--json").json
    wanted = {"steps", "train_loss", "eval_loss", "kld_before", "kld_after", "tokens_per_second", "peak_rss_bytes",
              "bytes", "out"}  # fmt: skip
    assert wanted <= set(result)
    assert result["steps"] == 3
    assert result["kld_after"] < result["kld_before"]
    assert run("inspect", out, "--json").json["bytes"] == result["bytes"]
    told = run("qat", llama_model, data, tmp_path / "out.gguf", "--train", "minimums", *QUICK)
    assert told.status == 0
    assert told.out.startswith("minimums: ")
    assert told.out.rstrip().splitlines()[-1].startswith(f"written: {tmp_path / 'out.gguf'}, ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--train", "wat"), "--train wat: choose one of: full, scales, minimums, lora"),
        (("--format", "q9"), "unknown format 'q9'"),
        (("--train", "minimums", "--format", "q4_0"), "--train minimums needs blocks with a minimum"),
        (("--teacher", "absent/model"), "absent/model"),
        (("--float-steps", "3"), "--float-steps 3: the run has 3 steps"),
        (("--temperature", "0"), "--temperature 0.0: a positive number is needed"),
        (("--levels", "40"), "q4_1 cannot use 40 levels"),
    ],
)
def test_refusals(refusal: Callable[..., str], llama_model, data, tmp_path, options, message) -> None:
    assert message in refusal("qat", llama_model, data, tmp_path / "out", *QUICK, *options)
    assert not (tmp_path / "out").exists()


def test_a_quantized_model_and_an_existing_folder(
    refusal: Callable[..., str], quantized: Quantized, llama_model: Path, data: Path, tmp_path: Path
) -> None:
    assert "or use --train scales" in refusal("qat", quantized.folder, data, tmp_path / "out", *QUICK)
    (tmp_path / "out").mkdir()
    assert "exists already" in refusal("qat", llama_model, data, tmp_path / "out", *QUICK)
