"""The commands as a user types them: fields of --json, what people read, options from files."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_processes import Quantized, Run, quantlab_process

import quantlab
from quantlab.checkpoint.summary import summarize


def plain(result: Any) -> dict[str, Any]:
    """A result of the library as JSON has it."""
    return json.loads(json.dumps(dataclasses.asdict(result)))


def test_quantize_reports_what_it_wrote(quantized: Quantized, llama_model: Path, tmp_path: Path) -> None:
    """One JSON object with the library's own report; the folder holds the same bytes as the library's."""
    report = plain(quantlab.quantize_checkpoint(llama_model, tmp_path / "twin"))
    for field in ("parameters", "bytes", "bits_per_weight", "source_bytes", "tensors"):
        assert quantized.report[field] == report[field]
    assert quantized.report["seconds"] >= 0
    assert {"name", "format", "relative_error"} <= set(quantized.report["tensors"][0])
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (quantized.folder / name).read_bytes() == (tmp_path / "twin" / name).read_bytes()


def test_the_pipeline_from_quantize_to_perplexity(quantized: Quantized, text: Path) -> None:
    """A folder that the command wrote is a model to the next: its perplexity is the library's, to the last digit."""
    done = quantlab_process("perplexity", quantized.folder, text, "--context", 64, "-t", 1, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert {"perplexity", "nll", "stderr", "tokens"} <= set(found)
    assert found == plain(quantlab.perplexity(quantized.folder, text, context=64))


def test_generate_in_a_process_of_its_own(quantized: Quantized) -> None:
    """--json gives the continuation that the library gives, with counts and speeds."""
    done = quantlab_process("generate", quantized.folder, "-p", "Once upon", "-n", 12, "--seed", 7, "-t", 1, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert {"text", "token_ids", "finish_reason", "engine", "timings"} <= set(found)
    params = quantlab.SamplingParams(seed=7)
    twin = quantlab.generate(quantized.folder, "Once upon", max_tokens=12, params=params)
    assert (found["text"], tuple(found["token_ids"])) == (twin.text, twin.token_ids)
    assert (found["finish_reason"], found["engine"]) == (twin.finish_reason, "native")
    timings = found["timings"]
    prompt_tokens = len(quantlab.load_tokenizer(quantized.folder).encode("Once upon"))
    assert (timings["prompt_tokens"], timings["cached_tokens"]) == (prompt_tokens, 0)
    assert timings["generated_tokens"] == len(found["token_ids"])
    assert timings["prefill_tokens_per_second"] > 0
    assert timings["decode_tokens_per_second"] > 0


def test_inspect_lists_tensors(run: Run, quantized: Quantized) -> None:
    """--json is the library's summary; its tensors add up to its totals, and packed ones name their format."""
    found = run("inspect", quantized.folder, "--json").json
    assert found == plain(summarize(quantized.folder))
    assert found["architecture"] == "LlamaForCausalLM"
    assert sum(tensor["bytes"] for tensor in found["tensors"]) == found["bytes"] == quantized.report["bytes"]
    assert found["bits_per_weight"] == pytest.approx(8 * found["bytes"] / found["parameters"])
    formats = {tensor["name"]: tensor["format"] for tensor in found["tensors"]}
    assert formats["model.layers.0.mlp.up_proj.weight"] == "q4_1"
    assert formats["model.embed_tokens.weight"] == "q8_0"
    assert formats["model.norm.weight"] == "f32"


def test_compare_measures_divergence(run: Run, quantized: Quantized, llama_model: Path, text: Path) -> None:
    """--json is the library's result; each perplexity is the one that `perplexity` gives."""
    found = run("compare", llama_model, quantized.folder, text, "--context", 64, "--json").json
    assert found == plain(quantlab.compare(llama_model, quantized.folder, text, context=64))
    fields = {"perplexity_a", "perplexity_b", "kld_mean", "kld_stderr", "kld_p99", "same_top", "tokens"}
    assert fields <= set(found)
    alone = run("perplexity", quantized.folder, text, "--context", 64, "--json").json  # by the other engine
    assert found["perplexity_b"] == pytest.approx(alone["perplexity"], rel=1e-6)
    assert found["kld_mean"] > 0


def test_human_output_tells_the_main_numbers(
    run: Run, quantized: Quantized, llama_model: Path, text: Path, tmp_path: Path
) -> None:
    """Without --json each command prints what the JSON holds, for people; stderr stays empty."""
    bits = f"{quantized.report['bits_per_weight']:.3f} bits per weight"
    expected = {
        ("quantize", llama_model, tmp_path / "out"): [bits, f"written: {tmp_path / 'out'}", "q4_1", "q8_0"],
        ("quantize", llama_model, tmp_path / "dry", "--dry-run"): [bits, "dry run: nothing was written"],
        ("inspect", quantized.folder): [bits, "model.embed_tokens.weight", "LlamaForCausalLM"],
        ("perplexity", quantized.folder, text, "--context", 64): ["perplexity ", "nats per token"],
        ("compare", llama_model, quantized.folder, text, "--context", 64): ["KL divergence, mean", "same top token"],
    }
    for arguments, words in expected.items():
        outcome = run(*arguments)
        assert (outcome.status, outcome.err) == (0, "")
        assert [word for word in words if word not in outcome.out] == []
    assert not (tmp_path / "dry").exists()


def test_generated_text_is_on_stdout_and_its_speed_on_stderr(run: Run, quantized: Quantized) -> None:
    """What is printed as it is written is the text that --json holds, and one line break; speeds go to stderr."""
    arguments = ("generate", quantized.folder, "-p", "Once upon", "-n", 12)
    printed, found = run(*arguments), run(*arguments, "--json").json
    assert printed.out == found["text"] + "\n"
    assert re.match(r"\[native engine: \d+ prompt tokens at \d+/s, \d+ generated at ", printed.err)


def test_biases_and_penalties_reach_the_sampler(run: Run, quantized: Quantized) -> None:
    """The command's tokens are the library's with the same parameters; a bias that forbids a token is kept to."""
    arguments = ("generate", quantized.folder, "-p", "Once upon", "-n", 16, "--json")
    plain = run(*arguments, "--temp", 0).json["token_ids"]
    without = run(*arguments, "--temp", 0, "--logit-bias", f"{plain[0]}=-inf").json["token_ids"]
    assert plain[0] not in without
    penalties = ("--presence-penalty", 0.5, "--frequency-penalty", 0.25, "--repetition-penalty", 1.1)
    others = ("--penalty-window", 9, "--logit-bias", "7=1.5", "--logit-bias", "300=-2")
    found = run(*arguments, *penalties, *others).json["token_ids"]
    params = quantlab.SamplingParams(
        logit_bias={7: 1.5, 300: -2.0},
        repetition_penalty=1.1,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        penalty_window=9,
    )
    assert found == list(quantlab.generate(quantized.folder, "Once upon", max_tokens=16, params=params).token_ids)


def test_a_seed_gives_the_same_text_and_another_seed_another(run: Run, quantized: Quantized) -> None:
    """Generation is reproducible; what is drawn depends on the seed."""
    arguments = ("generate", quantized.folder, "-p", "Once upon", "-n", 24, "--temp", 1.5, "--json", "--seed")
    texts = [run(*arguments, seed).json["token_ids"] for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2] != texts[3]


def test_temperature_zero_takes_the_most_likely_tokens(run: Run, quantized: Quantized) -> None:
    """--temp 0 is transformers' own greedy generation, whatever the seed."""
    import torch

    arguments = (
        "generate",
        quantized.folder,
        "-p",
        "Once upon",
        "-n",
        10,
        "--temp",
        0,
        "--engine",
        "torch",
        "--json",
        "--seed",
    )
    first, second = (run(*arguments, seed).json["token_ids"] for seed in (1, 2))
    ids = torch.tensor([quantlab.load_tokenizer(quantized.folder).encode("Once upon")])
    model = quantlab.load_model(quantized.folder)
    greedy = model.generate(ids, max_new_tokens=10, do_sample=False)[0, ids.shape[1] :].tolist()
    assert first == second == greedy


def test_a_dash_reads_the_prompt_from_stdin(
    run: Run, quantized: Quantized, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`-p -` with a text on stdin continues it like `-p TEXT`; the line break that ends a file is left out."""
    prompt = "Once \u00fcpon a time,\nthere was"
    (tmp_path / "prompt.txt").write_text(prompt + "\n", encoding="utf-8")
    arguments = ("generate", quantized.folder, "-n", 8, "--json")
    with (tmp_path / "prompt.txt").open(encoding="ascii") as stdin:  # whatever the locale: the bytes are read as UTF-8
        monkeypatch.setattr(sys, "stdin", stdin)
        from_stdin = run(*arguments, "-p", "-").json
    as_option = run(*arguments, "-p", prompt).json
    for field in ("text", "token_ids"):
        assert from_stdin[field] == as_option[field]
    assert from_stdin["timings"]["prompt_tokens"] == as_option["timings"]["prompt_tokens"]


def test_options_come_from_a_yaml_file_and_the_command_line_wins(
    run: Run, quantized: Quantized, tmp_path: Path
) -> None:
    """-c gives option names with - or _; a flag beside it replaces its value."""
    config = tmp_path / "options.yaml"
    config.write_text("max-tokens: 5\ntemp: 0\nprompt: Once upon\n")
    assert len(run("generate", quantized.folder, "-c", config, "--json").json["token_ids"]) == 5
    found = run("generate", quantized.folder, "-c", config, "-n", 3, "--json").json
    assert len(found["token_ids"]) == 3


def test_pretrain_reports_its_run(run: Run, prose: Path, tmp_path: Path) -> None:
    """--json gives the contract's fields, for two steps of a tiny recipe; the folder is a model to `inspect`."""
    recipe = {
        "model": {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64},
        "vocabulary": {"size": 400},
        "schedule": {
            "tokens": 99999, "context": 64, "batch_tokens": 512, "micro_batch_tokens": 512, "learning_rate": "1e-3",
            "bf16": False,
        },
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "out"
    found = run("pretrain", tmp_path / "recipe.yaml", prose, out, "--tokens", 1024, "--json").json
    assert {"steps", "train_loss", "eval_loss", "tokens_per_second"} <= set(found)
    assert found["steps"] == 2
    assert run("inspect", out, "--json").json["parameters"] == found["parameters"]
    repeated = run("pretrain", tmp_path / "recipe.yaml", prose, out)
    assert (repeated.status, repeated.err) == (
        2,
        f"quantlab: {out}: exists already; remove it or choose another folder\n",
    )
