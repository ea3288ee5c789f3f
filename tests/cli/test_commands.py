"""The commands as a user types them: fields of --json, exit codes, one line for every fault, clean interruption."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import quantlab
from quantlab.checkpoint.summary import summarize

QUANTLAB = (sys.executable, "-m", "quantlab.cli")
Run = Callable[..., Any]  # see conftest.py
PATIENCE = 120  # seconds until a subprocess that does not do what it should counts as hung


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", **changes}


def quantlab_process(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the installed command to its end."""
    command = [*QUANTLAB, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment(), **options)


def plain(result: Any) -> dict[str, Any]:
    """A result of the library as JSON has it."""
    return json.loads(json.dumps(dataclasses.asdict(result)))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, prose: Path) -> Path:
    """The first 40 lines of the prose."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(prose.read_text(encoding="utf-8").splitlines(keepends=True)[:40]), encoding="utf-8")
    return file


@dataclass(frozen=True)
class Quantized:
    folder: Path
    report: dict[str, Any]


@pytest.fixture(scope="module")
def quantized(llama_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """The tiny Llama as `quantlab quantize MODEL OUT --json` makes it."""
    out = tmp_path_factory.mktemp("quantized") / "out"
    done = quantlab_process("quantize", llama_model, out, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    return Quantized(out, json.loads(done.stdout))


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


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["quantise"], "No such command 'quantise'"),
        (["--colour"], "No such option: --colour"),
        (["quantize", "--bits", "4", "a", "b"], "No such option: --bits"),
        (["quantize"], "Missing argument 'model'"),
        (["quantize", "model"], "Missing argument 'out'"),
        (["generate", "model"], "Missing option '--prompt'"),
        (["generate", "model", "-p"], "Option '-p' requires an argument"),
        (["generate", "model", "-p", "a", "-n", "few"], "Invalid value for '--max-tokens'"),
        (["perplexity", "model", "text", "more"], "Got unexpected extra argument"),
        (["generate", "model", "-p", "a", "--temp", "-1"], "temperature must be 0 or more"),
        (["generate", "model", "-p", "a", "--top-p", "1.5"], "top-p must be above 0 and at most 1"),
        (["generate", "model", "-p", "a", "--temp", "nan"], "temperature must be 0 or more"),
        (["generate", "model", "-p", "a", "--frequency-penalty", "inf"], "frequency penalty must be finite"),
        (["generate", "model", "-p", "a", "--logit-bias", "5"], "--logit-bias 5: expected ID=BIAS"),
        (["generate", "model", "-p", "a", "--logit-bias", "x=1"], "--logit-bias x=1: expected ID=BIAS"),
        (["generate", "model", "-p", "a", "--logit-bias", "5=nan"], "logit bias must be a number below infinity"),
        (["generate", "model", "-p", "a", "--seed", "-1"], "seed must be at least 0"),
        (["generate", "model", "-p", "a", "--engine", "steam"], "--engine steam: choose one of: auto, native, torch"),
        (["perplexity", "model", "text", "-t", "0"], "--threads 0: at least 1 is needed"),
        (["generate", "model", "-p", "a\udcff"], "--prompt is not UTF-8 text"),
        (["inspect", "no/such/folder"], "no/such/folder: no such folder or file"),
        (["inspect", "nothing-here"], "nothing-here: no such folder or file"),
        (["inspect", "nobody/nothing"], "nobody/nothing: no such folder here, and the hub did not give it"),
        (["pretrain", "absent.yaml", "data", "out"], "absent.yaml: cannot be read: No such file or directory"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    refusal: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], fault: str
) -> None:
    """Unknown commands and options, missing or malformed arguments, models that are not there: status 2."""
    monkeypatch.chdir(tmp_path)
    assert refusal(*arguments).lower().startswith(fault.lower())  # typer's versions differ in MODEL and model


def test_a_parse_error_says_where_help_is(refusal: Callable[..., str]) -> None:
    """The line ends with the command that explains the options."""
    assert refusal("quantize").endswith("(see: quantlab quantize --help)")


def test_no_arguments_show_the_help(run: Run) -> None:
    """`quantlab` and `quantlab --help` print the same list of commands."""
    alone, asked = run(), run("--help")
    assert alone.status == asked.status == 0
    for name in ("quantize", "inspect", "generate", "perplexity", "compare", "pretrain"):
        assert re.search(rf"^\s+{name}\s", alone.out, flags=re.MULTILINE)
        assert re.search(rf"^\s+{name}\s", asked.out, flags=re.MULTILINE)


def every_reader(model: Path, text: Path, out: Path) -> list[tuple[object, ...]]:
    """Each command that reads a model."""
    return [
        ("quantize", model, out),
        ("inspect", model),
        ("generate", model, "-p", "a"),
        ("perplexity", model, text),
        ("compare", model, model, text),
    ]


def copy_of(model: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model, folder))


def test_a_folder_that_is_no_model_is_named(refusal: Callable[..., str], tmp_path: Path, text: Path) -> None:
    """Every command says that config.json is missing, and makes nothing."""
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments in every_reader(empty, text, tmp_path / "out"):
        line = refusal(*arguments)
        assert str(empty) in line
        assert "config.json" in line or "holds no tokenizer" in line
    assert [entry.name for entry in tmp_path.iterdir()] == ["empty"]


def test_truncated_weights_are_named(
    refusal: Callable[..., str], llama_model: Path, tmp_path: Path, text: Path
) -> None:
    """A safetensors file cut in its data or in its header is refused by every command; nothing is made."""
    model = copy_of(llama_model, tmp_path / "model")
    whole = (model / "model.safetensors").read_bytes()
    for length in (len(whole) - 1, 1000, 5, 0):
        (model / "model.safetensors").write_bytes(whole[:length])
        for arguments in every_reader(model, text, tmp_path / "out"):
            line = refusal(*arguments)
            assert f"{model}/model.safetensors" in line
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_texts_that_cannot_be_scored_are_named(refusal: Callable[..., str], llama_model: Path, tmp_path: Path) -> None:
    """Missing, empty, blank, not UTF-8, or a folder: perplexity and compare name the file and its fault."""
    faults = {"absent.txt": "No such file", "empty.txt": "holds no text", "blank.txt": "holds no text",
              "latin.txt": "not UTF-8", "folder": "Is a directory"}  # fmt: skip
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.txt").write_text("\n \n<|endoftext|>\n")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (tmp_path / "folder").mkdir()
    for name, fault in faults.items():
        for command in (("perplexity", llama_model), ("compare", llama_model, llama_model)):
            line = refusal(*command, tmp_path / name, "--context", 64)
            assert line.startswith(str(tmp_path / name))
            assert fault in line


def test_contexts_and_strides_out_of_range_are_refused(
    refusal: Callable[..., str], llama_model: Path, text: Path
) -> None:
    """The default context of 512 is too long for a model of 128; the line says how many it holds."""
    assert "the model holds 128 tokens" in refusal("perplexity", llama_model, text)
    assert "the model holds 128 tokens" in refusal("compare", llama_model, llama_model, text)
    assert "context 1: at least 2" in refusal("perplexity", llama_model, text, "--context", 1)
    assert "stride 64" in refusal("perplexity", llama_model, text, "--context", 64, "--stride", 64)


def test_prompts_that_cannot_be_continued_are_refused(
    refusal: Callable[..., str], llama_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Too long for the context, not UTF-8 on stdin, no token asked for, an empty stop string."""
    line = refusal("generate", llama_model, "-p", "word " * 200)
    assert re.fullmatch(r"the prompt has \d+ tokens; the context holds 128", line)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with (tmp_path / "latin.txt").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert refusal("generate", llama_model, "-p", "-") == "standard input is not UTF-8 text"
    assert "at least one token" in refusal("generate", llama_model, "-p", "a", "-n", 0)
    assert "token id 512 is outside the vocabulary of 512" in refusal(
        "generate", llama_model, "-p", "a", "--logit-bias", "512=1"
    )
    assert "stop string is empty" in refusal("generate", llama_model, "-p", "a", "--stop", "")


def test_quantize_refuses_what_it_cannot_do(
    refusal: Callable[..., str], quantized: Quantized, llama_model: Path, tmp_path: Path
) -> None:
    """Unknown format or method, a model that is quantized already, an OUT that is something else's or the model."""
    out = tmp_path / "out"
    assert "unknown format 'q3_7'; choose one of: q4_0, q4_1" in refusal("quantize", llama_model, out, "-f", "q3_7")
    assert "unknown method 'magic'" in refusal("quantize", llama_model, out, "--method", "magic")
    assert "is quantized already" in refusal("quantize", quantized.folder, out)
    assert "is the model itself" in refusal("quantize", llama_model, llama_model, "--overwrite")
    assert not out.exists()
    out.mkdir()
    (out / "precious").touch()
    assert refusal("quantize", llama_model, out).startswith(f"{out}: exists already")
    assert [entry.name for entry in out.iterdir()] == ["precious"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_config_files_are_checked(refusal: Callable[..., str], llama_model: Path, tmp_path: Path) -> None:
    """Missing, no YAML, no mapping, unknown names: the line names the file."""
    config = tmp_path / "options.yaml"
    assert refusal("inspect", llama_model, "-c", config).startswith(f"{config}: cannot be read")
    for content, fault in (
        ("[", "not a YAML file"),
        ("- 1", "must hold option names"),
        ("bits: 4", "unknown options bits"),
    ):
        config.write_text(content)
        assert refusal("inspect", llama_model, "-c", config).startswith(f"{config}: {fault}")


def test_a_defect_is_one_line_and_status_1(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is nobody's input is said to be unexpected, with the way to its traceback."""

    def broken(path: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.delenv("QUANTLAB_TRACEBACK", raising=False)
    monkeypatch.setattr("quantlab.checkpoint.summary.summarize", broken)
    outcome = run("inspect", "model")
    assert outcome.status == 1
    assert outcome.err.startswith("quantlab: unexpected ZeroDivisionError: division by zero (QUANTLAB_TRACEBACK=1")
    assert outcome.err.count("\n") == 1


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[Any]) -> None:
    """Wait for a sign of life of a process that must not end before it."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, "ended too early"
        assert time.monotonic() < deadline, "hung"
        time.sleep(0.01)


def heed_ctrl_c() -> None:
    """Whoever runs the tests in the background of a shell has Ctrl-C ignored, and so would their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def started(*arguments: object, **options: Any):
    """A running command, killed at the end if it is still there."""
    command = [*QUANTLAB, *map(str, arguments)]
    with subprocess.Popen(command, env=environment(), preexec_fn=heed_ctrl_c, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def write_endless_model(folder: Path) -> Path:
    """A Llama of 400 million weights that takes no space: its safetensors file is a hole behind its header."""
    side, layers = 4096, 24
    config = {"model_type": "llama", "hidden_size": side, "num_hidden_layers": layers, "num_attention_heads": 32,
              "vocab_size": 32, "tie_word_embeddings": True}  # fmt: skip
    shapes = {f"model.layers.{layer}.self_attn.q_proj.weight": [side, side] for layer in range(layers)}
    header, offset = {}, 0
    for name, (rows, columns) in {"model.embed_tokens.weight": [32, side], **shapes}.items():
        end = offset + 2 * rows * columns
        header[name] = {"dtype": "F16", "shape": [rows, columns], "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + offset)
    return folder


@pytest.mark.parametrize(
    ("number", "status", "line"),
    [
        (signal.SIGINT, 130, "quantlab: interrupted; nothing was left half-written\n"),
        (signal.SIGTERM, 143, ""),
    ],
)
def test_a_stopped_quantize_leaves_nothing(tmp_path: Path, number: int, status: int, line: str) -> None:
    """Stopped while it writes: no OUT, no hidden partial folder, and the status that shells expect."""
    model, out = write_endless_model(tmp_path / "model"), tmp_path / "out"
    partial = tmp_path / ".out.partial" / "model.safetensors"
    with started("quantize", model, out, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_until(partial.exists, process)
        process.send_signal(number)
        printed = process.communicate(timeout=PATIENCE)
    assert process.returncode == status
    assert printed == ("", line)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_stopped_generate_ends_with_130(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """Ctrl-C while text streams: what was written stays on stdout, stderr holds one line."""
    model = make_model(tmp_path / "model", "llama", max_position_embeddings=1 << 17)
    for name in ("tokenizer_config.json", "generation_config.json"):  # no end token: the text never ends by itself
        (model / name).unlink(missing_ok=True)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    command = ("generate", model, "-p", "Once upon", "-n", 100_000, "--temp", 0)
    with started(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, line = process.communicate(timeout=PATIENCE)
    assert first
    assert process.returncode == 130
    assert line.decode() == "quantlab: interrupted; nothing was left half-written\n"


def test_a_terminal_sees_progress_and_ctrl_c_ends_it(llama_model: Path, prose: Path, tmp_path: Path) -> None:
    """On a terminal, perplexity draws its bar with speed, time left and the figure so far; Ctrl-C ends with 130."""
    long_text = tmp_path / "long.txt"
    long_text.write_bytes(prose.read_bytes() * 100)
    master, terminal = pty.openpty()
    command = ("perplexity", llama_model, long_text, "--context", 64)
    with (
        os.fdopen(master, "rb", buffering=0) as screen,
        started(*command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=terminal) as process,
    ):
        os.close(terminal)
        seen = b""
        while not re.search(rb"tokens/s.*left.*\d:\d\d:\d\d.*perplexity \d+\.\d", seen):
            seen += screen.read(4096)  # an OSError here: the process ended too early
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # the terminal's other end closes with the process
            while piece := screen.read(4096):
                seen += piece
        out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert out == b""
    assert b"quantlab: interrupted; nothing was left half-written" in seen
    assert b"Traceback" not in seen


@pytest.mark.parametrize(
    "arguments",
    [("inspect",), ("inspect", "--json"), ("--help",), ("generate", "-p", "a", "-n", "3")],
    ids=["table", "json", "help", "generate"],
)
def test_a_reader_that_goes_early_is_no_traceback(llama_model: Path, arguments: tuple[str, ...]) -> None:
    """`quantlab ... | head -c 1`: stdout is closed before all is written; stderr stays empty."""
    read, write = os.pipe()
    os.close(read)  # a reader that has gone already is the hardest case
    model = [] if arguments == ("--help",) else [llama_model]
    with os.fdopen(write, "wb") as stdout:
        done = subprocess.run(
            [*QUANTLAB, *arguments, *map(str, model)], stdout=stdout, stderr=subprocess.PIPE, text=True,
            timeout=PATIENCE, env=environment(),
        )  # fmt: skip
    assert done.stderr == ""
    assert done.returncode == 1


def test_errors_of_the_installed_command(tmp_path: Path) -> None:
    """What `main` does with a wrong request, in a process of its own: status 2, one line, nothing on stdout."""
    done = quantlab_process("inspect", tmp_path / "absent")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"quantlab: {tmp_path / 'absent'}: no such folder or file\n"
