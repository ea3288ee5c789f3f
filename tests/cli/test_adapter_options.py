"""--adapter and its like: what reaches the library, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_processes import Quantized, Run
from quantlab.cli.options import weighted_adapters

import quantlab
from quantlab.adapters.adapter import Adapter, LowRankPair
from quantlab.adapters.peft_folder import write_peft_folder
from quantlab.errors import InputError
from quantlab.evaluation import bench


def write_adapter(folder: Path, seed: int = 0) -> Path:
    """For the queries of the tiny Llama."""
    random = np.random.default_rng(seed)
    pairs = {
        f"model.layers.{layer}.self_attn.q_proj.weight": LowRankPair(
            random.normal(0, 1, (4, 64)).astype(np.float32), random.normal(0, 1, (64, 4)).astype(np.float32), 1.0
        )
        for layer in range(2)
    }
    write_peft_folder(Adapter(folder, "lora", pairs), {"peft_type": "LORA", "r": 4, "lora_alpha": 4}, folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapters") / "one")


def test_generate_and_perplexity_apply_adapters(
    run: Run, quantized: Quantized, text: Path, adapter: Path, tmp_path: Path
) -> None:
    other = write_adapter(tmp_path / "other", 1)
    options = "--adapter", adapter, "--adapter", f"{other}=-0.5"
    chosen = [adapter, (other, -0.5)]
    found = run("perplexity", quantized.folder, text, "--context", 64, *options, "--json").json
    twin = quantlab.perplexity(quantized.folder, text, context=64, adapters=chosen)
    assert found == json.loads(json.dumps(dataclasses.asdict(twin)))
    assert found["nll"] != run("perplexity", quantized.folder, text, "--context", 64, "--json").json["nll"]
    found = run("generate", quantized.folder, "-p", "Once", "-n", 12, "--temp", 0, *options, "--json").json
    params = quantlab.SamplingParams(temperature=0)
    twin = quantlab.generate(quantized.folder, "Once", max_tokens=12, params=params, adapters=chosen)
    assert tuple(found["token_ids"]) == twin.token_ids


def test_adapters_need_no_torch(quantized: Quantized, adapter: Path) -> None:
    code = (
        "import sys; from quantlab.cli import _run; status = _run(); "
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules), 'imported'; sys.exit(status)"
    )
    command = [sys.executable, "-c", code, "generate", quantized.folder, "-p", "a", "-n", "2", "--adapter", adapter]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_compare_adapts_either_side(run: Run, quantized: Quantized, text: Path, adapter: Path) -> None:
    both = run(
        "compare", quantized.folder, quantized.folder, text, "--context", 64, "--json",
        "--adapter-a", adapter, "--adapter-b", f"{adapter}=1",
    ).json  # fmt: skip
    assert both["kld_max"] == 0
    one = run("compare", quantized.folder, quantized.folder, text, "--context", 64, "--json", "--adapter-b", adapter)
    assert one.json["kld_mean"] > 0
    assert one.json["nll_b"] == both["nll_a"]


def test_bench_counts_the_factors(
    run: Run, quantized: Quantized, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "RULER_BYTES", 1 << 16)
    arguments = "bench", quantized.folder, "--prompt-tokens", 4, "--generate-tokens", 2, "--repeat", 1, "--json"
    more = run(*arguments, "--adapter", adapter).json["weight_bytes_per_token"]
    assert more - run(*arguments).json["weight_bytes_per_token"] == 2 * 4 * (4 * 64 + 64 * 4)


def test_folders_and_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rank=8").mkdir()
    given = ["plain", "plain=0.5", "rank=8", "rank=8=-2", "gone=1e-1"]
    expected = [("plain", 1.0), ("plain", 0.5), ("rank=8", 1.0), ("rank=8", -2.0), ("gone", 0.1)]
    assert weighted_adapters(given) == [(Path(folder), weight) for folder, weight in expected]
    assert weighted_adapters(None) == []
    for wrong in ("plain=half", "=1", "plain=nan", "plain=inf", "rank=8="):
        with pytest.raises(InputError, match=f"--adapter {wrong}: no such folder, and behind = no weight"):
            weighted_adapters([wrong])


def test_wrong_adapters(refusal: Callable[..., str], quantized: Quantized, text: Path, tmp_path: Path) -> None:
    for options in (("generate", quantized.folder, "-p", "a"), ("perplexity", quantized.folder, text)):
        assert "gone: no such adapter" in refusal(*options, "--adapter", tmp_path / "gone")
        assert "holds no adapter_config.json" in refusal(*options, "--adapter", quantized.folder)
        assert "expected DIR or DIR=WEIGHT" in refusal(*options, "--adapter", f"{tmp_path}=x")
    message = refusal("compare", quantized.folder, quantized.folder, text, "--adapter-b", f"{tmp_path}=x")
    assert message.startswith("--adapter-b ")


def test_adapters_come_from_a_yaml_file(
    run: Run, quantized: Quantized, text: Path, adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "options.yaml").write_text(f"adapter: ['{adapter}=0.5']\ncontext: 64\n")
    found = run("perplexity", quantized.folder, text, "--config", tmp_path / "options.yaml", "--json").json
    twin = quantlab.perplexity(quantized.folder, text, context=64, adapters=[(adapter, 0.5)])
    assert found["nll"] == twin.nll
