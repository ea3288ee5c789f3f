"""Requests that are wrong: status 2 and one line for every fault."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_processes import Quantized, Run


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
    faults = {"absent.txt": "cannot be read: No such file or directory", "empty.txt": "holds no text",
              "blank.txt": "holds no text", "latin.txt": "not UTF-8 text (byte 3); convert it to UTF-8 first",
              "folder": "cannot be read: Is a directory"}  # fmt: skip
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.txt").write_text("\n \n<|endoftext|>\n")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (tmp_path / "folder").mkdir()
    for name, fault in faults.items():
        for command in (("perplexity", llama_model), ("compare", llama_model, llama_model)):
            line = refusal(*command, tmp_path / name, "--context", 64)
            assert line == f"{tmp_path / name}: {fault}"


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
    monkeypatch.setattr(sys, "stdin", None)  # as Python has it where it is closed
    line = refusal("generate", llama_model, "-p", "-")
    assert line == "standard input is closed; give the prompt itself instead of -"
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


def test_outs_that_cannot_be_are_named(
    refusal: Callable[..., str], llama_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name too long, a place below a file, and the current folder, which an empty name stands for."""
    (tmp_path / "file").touch()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "precious").touch()
    name = "x" * 300
    assert refusal("quantize", llama_model, name) == f"{name}: File name too long; choose another name"
    line = refusal("quantize", llama_model, tmp_path / "file" / "out.gguf")
    assert line == f"{tmp_path / 'file'}: cannot be written: Not a directory"
    for out in ("", ".", "..", tmp_path / "here"):
        assert "is the current folder, or one around it" in refusal("quantize", llama_model, out, "--overwrite")
    assert {path.name for path in tmp_path.rglob("*")} == {"file", "here", "precious"}


@pytest.mark.parametrize("more", [[], ["--dry-run"], ["--method", "gptq"]], ids=["rtn", "dry run", "gptq"])
def test_levels_that_no_format_has(
    refusal: Callable[..., str], llama_model: Path, tmp_path: Path, more: list[str]
) -> None:
    for levels in (1, 17):
        line = refusal("quantize", llama_model, tmp_path / "out", "--levels", levels, *more)
        assert line == f"q4_1 cannot use {levels} levels; choose 2 to 16"
    assert list(tmp_path.iterdir()) == []


def test_a_kernel_that_does_not_exist_is_named(
    refusal: Callable[..., str], llama_model: Path, prose: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("QUANTLAB_CPU_KERNEL", "abacus")
    for arguments in (
        ("generate", llama_model, "-p", "a"),
        ("perplexity", llama_model, prose, "--context", 16),
        ("bench", llama_model, "--prompt-tokens", 8, "--generate-tokens", 2),
        ("quantize", llama_model, tmp_path / "out"),
    ):
        line = refusal(*arguments)
        assert line.startswith("QUANTLAB_CPU_KERNEL=abacus: there is no such kernel; set it to one of scalar")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "status", "line"),
    [
        (errno.ENOSPC, 1, "the disk is full; nothing was left half-written"),
        (errno.EFBIG, 1, "cannot write so much: File too large; nothing was left half-written"),
        (errno.ENOENT, 2, "the current folder is not there any more; change to another one"),
    ],
)
def test_what_the_system_refuses_is_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, code: int, status: int, line: str
) -> None:
    def refused(path: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("quantlab.checkpoint.summary.summarize", refused)
    outcome = run("inspect", "model")
    assert (outcome.status, outcome.err) == (status, f"quantlab: {line}\n")


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
