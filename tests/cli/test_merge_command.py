"""`quantlab merge`: what it prints, and what it refuses in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

WIDTH, VOCABULARY = 32, 10
NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": True,
    "dtype": "float32",
}


def model(folder: Path, value: float, vocabulary: int = VOCABULARY) -> Path:
    """One that holds one number everywhere."""
    linear = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    linear += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    tensors = {f"model.layers.0.{name}.weight": torch.full((WIDTH, WIDTH), value) for name in linear}
    norms = [NORM, "model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight"]
    tensors |= {name: torch.full((WIDTH,), value) for name in norms}
    tensors[EMBEDDING] = torch.full((vocabulary, WIDTH), value)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": vocabulary}))
    return folder


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The mean of 1 and 3, a quarter to three quarters."""
    one, three = model(tmp_path / "one", 1.0), model(tmp_path / "three", 3.0)
    file = tmp_path / "config.yml"
    file.write_text(
        f"merge_method: linear\nmodels:\n- {{model: {one}, parameters: {{weight: 1}}}}\n"
        f"- {{model: {three}, parameters: {{weight: 3}}}}\n"
    )
    return file


def test_the_json_object(run, config, tmp_path):
    found = run("merge", config, tmp_path / "out", "--json").json
    assert {"method", "tensors", "seconds", "peak_rss_bytes", "requantization_error"} <= found.keys()
    assert (found["method"], found["tensors"], found["requantization_error"]) == ("linear", 11, None)
    assert found["bytes"] == 4 * found["parameters"] == 4 * (7 * WIDTH**2 + 3 * WIDTH + VOCABULARY * WIDTH)
    from safetensors.torch import load_file

    assert all(bool((tensor == 2.5).all()) for tensor in load_file(tmp_path / "out" / "model.safetensors").values())


def test_what_is_printed(run, config, tmp_path):
    outcome = run("merge", config, tmp_path / "out", "--format", "q8_0", "--max-ram", "9.5GiB", "-t", 1)
    assert outcome.status == 0, outcome.err
    assert f"written: {tmp_path / 'out'}\n" in outcome.out
    assert "requantization error: 0.0" in outcome.out
    assert "linear: 11 tensors" in outcome.out
    dry = run("merge", config, tmp_path / "other", "--dry-run")
    assert dry.out.endswith(f"dry run: nothing was written (to {tmp_path / 'other'})\n")
    assert not (tmp_path / "other").exists()


def test_a_conflict_table(run, config, tmp_path):
    base = model(tmp_path / "base", 2.0)
    text = config.read_text().replace("linear", "task_arithmetic") + f"base_model: {base}\n"
    (tmp_path / "deltas.yml").write_text(text)
    outcome = run("merge", tmp_path / "deltas.yml", tmp_path / "out", "--report", tmp_path / "report")
    assert "where the models disagree" in outcome.out
    row = next(line for line in outcome.out.splitlines() if line.startswith(NORM) and "-1.000" in line)
    assert row.split() == [NORM, "-1.000", "-1.000", "100.0%", "1.00"]


OUT = "{tmp}/out"
WRONG = {
    "no config": (["{tmp}/absent.yml", OUT], "absent.yml: cannot be opened"),
    "a size that is none": (["{config}", OUT, "--max-ram", "much"], "--max-ram much: is no size; write it as 2GB"),
    "too little memory": (["{config}", OUT, "--max-ram", "1MB"], "--max-ram 0.01GB: linear needs"),
    "an unknown format": (["{config}", OUT, "--format", "q9"], "q9"),
    "an unknown recipe": (["{config}", OUT, "--recipe", "none-such"], "recipe 'none-such': neither a file nor one of"),
    "two formats": (["{config}", OUT, "-f", "q4_0", "--recipe", "q8_0"], "--recipe replaces --format"),
    "a method and no format": (["{config}", OUT, "--method", "gptq"], "--method: the output is float; give --format"),
    "an unknown quantizer": (["{config}", OUT, "-f", "q4_0", "--method", "awq"], "unknown method 'awq'; choose one of"),
    "ternary by gptq": (["{config}", OUT, "-f", "ternary", "--method", "gptq"], "--method gptq"),
    "rows that are no blocks": (["{config}", OUT, "-f", "ternary"], "no layer can be packed: model.layers.0."),
    "statistics of nothing": (["{config}", OUT, "--statistics", "one"], "--statistics one: expected MODEL=FILE"),
    "statistics for linear": (["{config}", OUT, "--statistics", "one={config}"], "linear reads no layer inputs"),
    "a rank of models": (["{config}", OUT, "--rank", "4"], "--rank 4: is for merging adapters"),
    "one of the models": (["{config}", "{tmp}/one", "--overwrite"], "is the model itself"),
    "what is there": (["{config}", "{config}"], "exists already; choose another name or pass --overwrite"),
    "no thread": (["{config}", OUT, "--threads", "0"], "--threads 0: at least 1 is needed"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests_are_one_line(case, refusal, config, tmp_path):
    arguments, expected = WRONG[case]
    before = sorted(tmp_path.rglob("*"))
    said = refusal("merge", *[argument.format(tmp=tmp_path, config=config) for argument in arguments])
    assert expected in said
    assert sorted(tmp_path.rglob("*")) == before


def test_models_that_do_not_go_together_are_all_named(refusal, config, tmp_path):
    """No row is cut off silently, and the way out is said."""
    other = model(tmp_path / "other", 1.0, vocabulary=VOCABULARY + 2)
    config.write_text(config.read_text() + f"- {{model: {other}, parameters: {{weight: 1}}}}\n")
    said = refusal("merge", config, tmp_path / "out")
    assert "[10, 32]" in said or "10" in said
    assert str(other) in said
    assert not (tmp_path / "out").exists()
