"""`quantlab generate --samples` and `--prompt-cache`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from command_processes import Quantized, quantlab_process
from hostile_models import Run


def test_samples_are_the_texts_of_their_seeds(run: Run, quantized: Quantized) -> None:
    """Beside the fields of a single text, which are the first one's; timings are of all."""
    arguments = ("generate", quantized.folder, "-p", "Once upon", "-n", 10, "--temp", 1.5, "--json")
    found = run(*arguments, "--seed", 4, "--samples", 3).json
    alone = [run(*arguments, "--seed", 4 + index).json for index in range(3)]
    fields = ("text", "token_ids", "finish_reason")
    assert found["samples"] == [{field: each[field] for field in fields} for each in alone]
    assert {field: found[field] for field in fields} == found["samples"][0]
    assert found["timings"]["generated_tokens"] == sum(len(each["token_ids"]) for each in alone)
    assert found["timings"]["prompt_tokens"] == alone[0]["timings"]["prompt_tokens"]
    assert found["timings"]["decode_tokens_per_second"] > 0


def test_samples_are_printed_one_after_another(run: Run, quantized: Quantized) -> None:
    arguments = ("generate", quantized.folder, "-p", "Once upon", "-n", 6, "--samples", 2)
    found, printed = run(*arguments, "--json").json, run(*arguments)
    lines = [f"--- {n} of 2, ended by length ---\n{each['text']}\n" for n, each in enumerate(found["samples"], 1)]
    assert printed.out == "".join(lines)
    assert "12 generated in all at " in printed.err


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_progress_is_shown(run: Run, quantized: Quantized, monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    """On stderr, also with --json."""
    monkeypatch.setattr("quantlab.cli.console.LINE_SECONDS", 0)
    arguments = ("generate", quantized.folder, "-p", "Once", "-n", 3, "--samples", 2, "--engine", engine, "--json")
    printed = run(*arguments)
    assert len(printed.json["samples"]) == 2
    assert "drawing: 6/6, " in printed.err
    assert "tokens/s" in printed.err


def test_torch_gives_samples_too(run: Run, quantized: Quantized) -> None:
    """One after another."""
    found = run("generate", quantized.folder, "-p", "Once", "-n", 3, "--samples", 2, "--engine", "torch", "--json").json
    assert found["engine"] == "torch"
    assert [len(each["token_ids"]) for each in found["samples"]] == [3, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--samples", 0), "0 samples: at least one must be asked for"),
        (("--samples", 2, "--logprobs", 1, "--json"), "--logprobs is for a single text; leave it or --samples out"),
        (("--samples", 2, "--draft", "x"), "--draft-model is for a single text; leave it or --samples out"),
        (("--prompt-cache", "{file}"), "no folder for a prompt cache: File exists"),
        (("--prompt-cache", "{new}", "--prompt-cache-size", "much"), "--prompt-cache-size much: is no size"),
        (
            ("--prompt-cache", "{new}", "--engine", "torch"),
            "the torch engine keeps no caches; leave the prompt cache out",
        ),
    ],
)
def test_what_is_refused(
    refusal: Callable[..., str], quantized: Quantized, tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    (tmp_path / "file").write_text("x")
    given = [str(each).format(file=tmp_path / "file", new=tmp_path / "new") for each in options]
    assert message in refusal("generate", quantized.folder, "-p", "Once upon", "-n", 2, *given)


def test_another_process_finds_the_prompt_cached(quantized: Quantized, tmp_path: Path) -> None:
    """And writes the same text."""
    prompt = "Once upon a time there was a lamp in the boathouse, and nobody knew who had lit it. " * 2
    command = ("generate", quantized.folder, "-p", prompt, "-n", 8, "--json", "--prompt-cache", tmp_path / "cache")
    first, second = (json_of(*command) for _ in range(2))
    assert first["timings"]["cached_tokens"] == 0
    assert second["timings"]["cached_tokens"] == second["timings"]["prompt_tokens"] - 1
    assert second["token_ids"] == first["token_ids"]
    several = json_of(*command, "--samples", 2)
    assert several["timings"]["cached_tokens"] == several["timings"]["prompt_tokens"] - 1
    assert several["token_ids"] == first["token_ids"]


def json_of(*command: object) -> dict:

    done = quantlab_process(*command)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)
