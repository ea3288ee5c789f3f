"""`evaluate --template` and `generate --template`: tables, JSON, and requests that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile_models import Run

from quantlab.generation.kojima import ANSWER_TOKENS, REASONING_TOKENS


@pytest.fixture(scope="module")
def model(make_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "llama", max_position_embeddings=256)


@pytest.fixture
def task(tmp_path: Path) -> Path:
    rows = [{"question": f"{number} + 1?", "answer": number + 1, "passages": [f"{number} p"]} for number in range(4)]
    path = tmp_path / "task.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


# evaluate


def test_templates_are_compared_as_json(run: Run, model: Path, task: Path, tmp_path: Path) -> None:
    """All that the contract names; the paper's numbers of tokens are the bounds."""
    found = run(
        "evaluate", model, "--task", task, "--template", "zero-shot", "--template", "zero-shot-cot",
        "--template", "rag", "--save", tmp_path / "said.jsonl", "--limit", 2, "-t", 1, "--json",
    ).json  # fmt: skip
    assert (found["n"], found["rules"], found["chat_template"]) == (2, "strict", False)
    assert list(found["per_template"]) == ["zero-shot", "zero-shot-cot", "rag"]
    for one in found["per_template"].values():
        assert {"accuracy", "stderr", "interval", "n", "prompt_tokens", "generated_tokens"} <= one.keys()
    assert found["per_template"]["zero-shot"]["generated_tokens"] <= ANSWER_TOKENS
    assert found["per_template"]["zero-shot-cot"]["generated_tokens"] <= REASONING_TOKENS + ANSWER_TOKENS
    assert [{"a", "b", "only_a", "only_b", "p", "p_holm"} == set(pair) for pair in found["pairs"]] == [True] * 3
    assert len((tmp_path / "said.jsonl").read_text().splitlines()) == 6


def test_templates_are_compared_in_tables(run: Run, model: Path, task: Path) -> None:
    outcome = run(
        "evaluate", model, "--task", task, "--template", "cot", "--trigger", "First,", "--trigger", "Hm.", "-n", 4,
        "--limit", 1, "-t", 1, "--rules", "kojima",
    )  # fmt: skip
    assert (outcome.status, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0].rstrip() == "task.jsonl, 1 questions, plain text, kojima rules"
    assert [line.split("  ")[0] for line in lines if line] == [
        lines[0].split("  ")[0], "template", "cot: First,", "cot: Hm.", "McNemar", "cot: First, / cot: Hm.",
    ]  # fmt: skip


def test_a_template_file_in_an_evaluation(run: Run, model: Path, task: Path, tmp_path: Path) -> None:
    """Its name in the table is the one that was given."""
    file = tmp_path / "mine.jinja"
    file.write_text("{{ passages[0].text }}: {{ question }}")
    found = run(
        "evaluate", model, "--task", task, "--template", file, "-n", 4, "--save", tmp_path / "said", "--json"
    ).json
    assert list(found["per_template"]) == [str(file)]
    saved = json.loads((tmp_path / "said").read_text().splitlines()[1])
    assert saved["samples"][0]["steps"][0]["prompt"] == "1 p: 1 + 1?"
    assert saved["sources"] == ["passages 1"]


def test_plain_prompts_stay_as_they_were(run: Run, model: Path, task: Path) -> None:
    one, other = (
        run("evaluate", model, "--task", task, *options, "--json").json for options in ((), ("--template", "plain"))
    )
    assert one == other
    assert list(one["per_template"]) == ["plain"]


def test_wrong_evaluations(refusal: Callable[..., str], model: Path, task: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jinja").write_text("{{ questoin }}")
    arguments = ("evaluate", model, "--task", task)
    for options, fault in (
        (("--template", "cott"), "template 'cott': choose one of: zero-shot, "),
        (("--template", "few-shot"), f"{task}: line 1, template few-shot: worked examples are missing; give a file"),
        (("--template", tmp_path / "bad.jinja"), f"{tmp_path / 'bad.jinja'}: undefined variable questoin; the"),
        (("--template", "cot", "-n", 0), "--max-tokens 0: at least 1 is needed"),
        (("--template", "cot", "--rules", "lax"), "answer rules 'lax': choose one of: strict, kojima"),
        (("--rules", "strict"), "--rules: means nothing without a --template"),
        (("--samples", 3), "--samples: means nothing without a --template"),
    ):
        assert refusal(*arguments, *options).startswith(fault)
