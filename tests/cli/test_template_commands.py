"""`evaluate --template` and `generate --template`: tables, JSON, and requests that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile_models import Run

from quantlab.generation.asking import ask
from quantlab.generation.kojima import ANSWER_TOKENS, REASONING_TOKENS


@pytest.fixture(scope="module")
def model(make_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "llama", max_position_embeddings=256)


@pytest.fixture
def run(run: Run) -> Run:
    """On one thread: tests run side by side."""
    return lambda *arguments: run(*arguments, "-t", 1)


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
        "--template", "rag", "--save", tmp_path / "said.jsonl", "--limit", 2, "--json",
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
        "--limit", 1, "--rules", "kojima",
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
        (("--template", "cot", "--examples", task), "--examples: none of the templates shows worked examples"),
        (("--template", "cot", "--role", "clerk"), "--role: none of the templates tells the model a role; add role"),
        (("--rules", "strict"), "--rules: means nothing without a --template"),
        (("--samples", 3), "--samples: means nothing without a --template"),
    ):
        assert refusal(*arguments, *options).startswith(fault)


def test_an_interrupted_evaluation_leaves_nothing(
    run: Run, model: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No part of a table, no part of a file."""
    calls = []

    def interrupted(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return ask(*arguments)

    monkeypatch.setattr("quantlab.evaluation.templates.ask", interrupted)
    (tmp_path / "out").mkdir()
    outcome = run("evaluate", model, "--task", task, "--template", "cot", "-n", 2, "--save", tmp_path / "out" / "said")
    assert (outcome.status, outcome.out) == (130, "")
    assert outcome.err == "quantlab: interrupted; nothing was left half-written\n"
    assert list((tmp_path / "out").iterdir()) == []


# generate


def test_reasoning_and_answer_are_shown(run: Run, model: Path) -> None:
    """All of the text as it comes, the template's words in it, then the extracted answer; speed on stderr."""
    outcome = run("generate", model, "-p", "Who?", "--template", "zero-shot-cot", "--answer-type", "text", "-n", 6)
    found = run(
        "generate", model, "-p", "Who?", "--template", "zero-shot-cot", "--answer-type", "text", "-n", 6, "--json"
    ).json
    first, second = found["steps"]
    assert first["prompt"] == "Q: Who?\nA: Let's think step by step."
    assert second["prompt"] == f"{first['prompt']}{first['text']} \nTherefore, the answer is"
    assert outcome.out == (
        f"Let's think step by step.{first['text']} \nTherefore, the answer is{second['text']}\n\n"
        f"answer: {found['answer'] or 'none was found'}\n"
    )
    assert outcome.err.startswith("[native engine: ")
    assert found["reasoning"] == f"Let's think step by step.{first['text']}".strip()
    assert (found["votes"], found["samples"], found["sources"]) == (None, [], [])


def test_the_contracts_fields_are_of_all_steps(run: Run, model: Path) -> None:
    found = run("generate", model, "-p", "Who?", "--template", "cot", "-n", 6, "--json").json
    assert found["text"] == "".join(step["text"] for step in found["steps"])
    assert len(found["token_ids"]) == found["timings"]["generated_tokens"] <= 6 + ANSWER_TOKENS
    assert found["timings"]["cached_tokens"] > 0  # the second step's beginning
    assert (found["finish_reason"], found["engine"]) == ("length", "native")


def test_templates_are_greedy_unless_told(run: Run, model: Path) -> None:
    """And samples vote at a temperature of their own; the same seed gives the same."""
    arguments = ("generate", model, "-p", "Who?", "--template", "zero-shot", "-n", 12, "--json")
    plain = run("generate", model, "-p", "Q: Who?\nA:", "--temp", 0, "--stop", "\nQ:", "-n", 12, "--json").json
    assert run(*arguments).json["text"] == run(*arguments, "--seed", 5).json["text"] == plain["text"]
    drawn = [run(*arguments, "--temp", 1.5, "--seed", seed).json["text"] for seed in (5, 5, 6)]
    assert drawn[0] == drawn[1] != drawn[2]
    votes = [
        run("generate", model, "-p", "Who?", "--template", "self-consistency", "-n", 4, "--seed", seed, "--json").json
        for seed in (1, 1, 2)
    ]
    assert votes[0]["samples"] == votes[1]["samples"] != votes[2]["samples"]
    assert len(votes[0]["samples"]) == 5
    few = run("generate", model, "-p", "Who?", "--template", "self-consistency", "-n", 4, "--samples", 2, "--json").json
    bare = run(*arguments, "--samples", 3, "--temp", 1.5).json
    assert (len(few["samples"]), len(bare["samples"])) == (2, 3)
    assert sum(votes[0]["votes"].values()) == sum(bool(sample["answer"]) for sample in votes[0]["samples"])


def test_votes_and_sources_are_shown(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "lamp.txt").write_text("Nell has the lamp.\n")
    (tmp_path / "more.jsonl").write_text('{"text": "The key is lost.", "source": "log"}\n{"text": "It rains."}\n')
    outcome = run(
        "generate", model, "-p", "Who?", "--template", "rag+self-consistency", "--passages", tmp_path / "lamp.txt",
        "--passages", tmp_path / "more.jsonl", "-n", 4, "--temp", 0.1,
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert "\n[1] lamp.txt\n[2] log\n[3] more.jsonl:2\nvotes: " in outcome.out
    assert " x" in outcome.out.split("votes: ")[1]


def test_pieces_by_options(run: Run, model: Path, tmp_path: Path) -> None:
    """Examples, a role beside any template, another trigger, another way to ask for the answer."""
    examples = tmp_path / "examples.jsonl"
    examples.write_text("\n".join(json.dumps({"question": f"{n}?", "answer": n}) for n in range(9)))
    common = ("generate", model, "-p", "Who?", "-n", 2, "--json", "--template")

    def prompt(*options: object) -> str:
        return run(*common, *options).json["steps"][0]["prompt"]

    shown = "Q: 0?\nA: 0\n\nQ: 1?\nA: 1\n\nQ: Who?\nA:"
    assert prompt("few-shot", "--examples", examples, "--shots", 2, "--role", "You are a clerk.") == (
        f"You are a clerk.\n\n{shown}"
    )
    assert prompt("cot", "--trigger", "First,") == "Q: Who?\nA: First,"
    assert prompt("zero-shot", "--answer-type", "yes/no") == "Q: Who?\nA: The answer (Yes or No) is"
    assert prompt("zero-shot", "--answer-trigger", "Say:") == "Q: Who?\nA: Say:"
    (tmp_path / "mine.jinja").write_text("{{ role }}> {{ question }}")
    assert prompt(tmp_path / "mine.jinja", "--role", "clerk") == "clerk> Who?"


def test_a_chat_template_underneath(run: Run, make_model, tmp_path: Path) -> None:
    """Unless it is to be ignored."""
    folder = make_model(tmp_path / "chat", "llama")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<it>{% endif %}"
    )
    arguments = ("generate", folder, "-p", "Who?", "--template", "cot", "-n", 2, "--json")
    assert run(*arguments).json["steps"][0]["prompt"] == "<user>Who?<it>Let's think step by step."
    assert run(*arguments, "--ignore-chat-template").json["steps"][0]["prompt"].startswith("Q: Who?")


def test_wrong_questions(refusal: Callable[..., str], model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "rows.jsonl").write_text('{"source": "x"}')
    common = ("generate", model, "-p", "Who?")
    for options, fault in (
        (("--template", "rag"), "template rag: shows passages; give an index with --index, or files with --passages"),
        (("--template", "cot", "--passages", tmp_path / "empty.txt"), "--passages: template cot shows none; add +rag"),
        (("--template", "rag", "--passages", tmp_path / "empty.txt"), f"{tmp_path / 'empty.txt'}: holds no text"),
        (
            ("--template", "rag", "--passages", tmp_path / "rows.jsonl"),
            f'{tmp_path / "rows.jsonl"}: 1 bad rows: line 1: "t',
        ),
        (("--template", "rag-other"), "template rag-other: is a control of quantlab evaluate"),
        (("--template", "zero-shot", "--trigger", "Hm"), "--trigger: template zero-shot begins no reasoning with it"),
        (("--template", "cot", "--answer-type", "date"), "answer type 'date': choose one of: number, choice, yes-no"),
        (("--template", "few-shot"), "worked examples are missing; give a file of them with --examples"),
        (("--template", "cot", "--examples", "x.jsonl"), "--examples: template cot shows none; add +few-shot"),
        (("--role", "clerk"), "--role: means nothing without a --template"),
        (("--template", "self-consistency", "--temp", 0), "5 samples at temperature 0 are all the same"),
        (("--template", "cot", "-p", "word " * 300), "the question takes "),
        (("--template", "zero-shot", "-p", "word " * 300), "the prompt has "),
    ):
        assert refusal(*common, *options).startswith(fault)
