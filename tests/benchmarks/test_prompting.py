"""The data of the instruct model, and the statistics of the benchmark that asks it."""

from __future__ import annotations

import importlib
import json
import random
import re
import shutil
import sys
from pathlib import Path

import pytest

from quantlab.checkpoint import load_tokenizer
from quantlab.checkpoint.chat_text import read_template
from quantlab.generation.prompt_format import PromptFormat
from quantlab.generation.templates import Asked, find_template, form_of

REPOSITORY = Path(__file__).parents[2]
BASE = REPOSITORY / "models" / "fable-9m"
TEMPLATE = REPOSITORY / "models" / "recipes" / "fable-9m-instruct.jinja"


@pytest.fixture
def module(monkeypatch):
    """A module of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    return importlib.import_module


@pytest.fixture
def begun(module):
    return module("instruct_rows").BegunAnswers(BASE, TEMPLATE)


@pytest.fixture(scope="module")
def served() -> PromptFormat:
    """How a model with the recipe's chat template takes prompts."""
    return PromptFormat(load_tokenizer(BASE), read_template(TEMPLATE), "a model")


def test_a_chain_is_told_step_by_step(module) -> None:
    arithmetic = module("instruct_arithmetic")
    chain = arithmetic.draw_chain(random.Random(0), 2)
    first, second, third = map(int, chain.question.removeprefix("What is the last digit of ").rstrip("?").split("+"))
    middle = (first + second) % 10
    assert chain.steps == (f"{first}+{second}={first + second}", f"{middle}+{third}={middle + third}")
    assert chain.answer == (first + second + third) % 10
    assert chain.scratchpad == f"{chain.steps[0]}; {chain.steps[1]}. The answer is {chain.answer}."


def test_no_chain_is_measured_that_can_be_drawn_for_training(module, monkeypatch) -> None:
    """Of two digits there are 81 chains; with 80 of them measured, one is left to draw."""
    arithmetic = module("instruct_arithmetic")
    every = {arithmetic._drawn(random.Random(seed), 1) for seed in range(2000)}
    assert len(every) == 81
    kept, *measured = sorted(every, key=lambda chain: chain.question)
    monkeypatch.setattr(arithmetic, "measured_chains", lambda: tuple(measured))
    assert {arithmetic.draw_chain(random.Random(seed), 1) for seed in range(20)} == {kept}


def test_the_base_has_two_thousand_facts_about_names_that_are_not_trained_on(module) -> None:
    facts = module("instruct_facts")
    trained, measured = facts.names()
    assert not set(trained) & set(measured)
    base = facts.base_facts()
    assert len({(fact.name, fact.relation) for fact in base}) == len(base) >= 2000
    assert {fact.name for fact in base} == set(measured)
    drawn = module("instruct_grounded").draw_conversation(random.Random(0), trained)
    assert not any(name in passage.text for name in measured for passage in drawn[0].passages)


def test_an_answer_names_the_source_that_tells_it_or_says_that_none_does(module) -> None:
    facts, grounded = module("instruct_facts"), module("instruct_grounded")
    draw, seen = random.Random(0), set()
    for _ in range(100):
        for asked in grounded.draw_conversation(draw, facts.names()[0]):
            told = [number for number, passage in enumerate(asked.passages, 1) if _tells(facts, passage.text, asked)]
            if told:
                value = asked.answer.removeprefix("The answer is ").split(" [")[0]
                assert asked.answer == f"The answer is {value} [{told[0]}]."
                assert value in asked.passages[told[0] - 1].text
            else:
                assert asked.answer == "The answer is not in the sources."
            seen.add(bool(told))
    assert seen == {True, False}


def _tells(facts, sentence: str, asked) -> bool:
    """Whether a sentence is that of the fact whose question is asked."""
    known = [
        facts.Fact(name, number, value)
        for name in {word.strip(".?") for word in asked.question.split()}
        for number, relation in enumerate(facts.RELATIONS)
        for value in relation.values
    ]
    return any(fact.sentence == sentence and fact.question == asked.question for fact in known)


def test_what_is_classified_or_requested_is_not_trained_on(module) -> None:
    labels, chat = module("instruct_labels"), module("instruct_chat")
    trained, measured = labels.pools()
    for task in trained:
        assert measured[task]
        assert not {item.question for item in trained[task]} & {item.question for item in measured[task]}
    requests, learned = chat.measured_and_trained()
    assert requests
    assert not {exchange.said for exchange in requests} & {exchange.said for exchange in learned}


def test_rows_begin_with_the_ids_that_templates_send(module, begun, served: PromptFormat) -> None:
    rows, arithmetic = module("instruct_rows"), module("instruct_arithmetic")
    chain = arithmetic.draw_chain(random.Random(0))
    for template, row in (
        ("zero-shot", rows.direct_row(chain, begun)),
        ("zero-shot-cot", rows.scratchpad_row(chain, begun)),
    ):
        form = form_of(find_template(template), Asked(chain.question, "number"))
        assert served.tokenizer.encode(row["prompt"]) == served.ids(served.text(form.prompt))
    second = f"{served.text(form.prompt)} {chain.scratchpad} {form.then}"
    assert served.tokenizer.encode(rows.extraction_row(chain, begun)["prompt"]) == served.ids(second)


def test_a_gate_on_two_forms_is_mcnemars(module) -> None:
    """Nine questions that only one gets right, one that only the other does: 2 (1 + 10) / 1024 = 0.021."""
    prompting = module("prompting")
    one = prompting.Line("m", "t", "one", [True] * 9 + [False] + [True] * 10)
    other = prompting.Line("m", "t", "other", [False] * 9 + [True] + [True] * 10)
    assert one.figure == "95.0 (76.4 to 99.1)"
    assert prompting._differ("g", one, other, True).holds
    assert not prompting._differ("g", other, one, True).holds, "the other way round"
    assert not prompting._differ("g", one, other, False).holds
    assert prompting._differ("g", one, one, False).holds
    assert prompting._differ("g", one, other, True).figure == "9 against 1, p 0.021"


def test_every_line_and_gate_of_a_run(module, make_model, tmp_path: Path, monkeypatch) -> None:
    """A model that knows nothing, asked two questions of each task; a second run takes them from the folder."""
    prompting, data = module("prompting"), module("instruct_data")
    data._write_tasks(tmp_path / "tasks")
    model = make_model(tmp_path / "model", "llama", max_position_embeddings=1024)
    for name in ("steps", "bare", "base"):
        shutil.copytree(model, tmp_path / name)
    arguments = [
        str(model),
        str(tmp_path / "work"),
        "--tasks",
        str(tmp_path / "tasks"),
        "--base",
        str(tmp_path / "base"),
    ]
    arguments += ["--scratchpad", str(tmp_path / "steps"), "--direct", str(tmp_path / "bare"), "--limit", "2"]
    monkeypatch.setattr(sys, "argv", ["prompting.py", *arguments, "--json", str(tmp_path / "all.json")])
    prompting.main()
    found = json.loads((tmp_path / "all.json").read_text(encoding="utf-8"))
    assert {(line["task"], line["template"]) for line in found["lines"]} >= {
        ("arithmetic", "zero-shot-cot"), ("facts", "rag-shuffled"), ("facts", "recall@4"), ("absent", "rag"),
        ("kinds", "few-shot"), ("chat", "zero-shot"), ("arithmetic", "irrelevant-trigger"),
    }  # fmt: skip
    assert {gate["holds"] for gate in found["gates"] if gate["name"] in ("scratchpad", "with retrieval")} == {False}
    trained = {"training_tokens": 1000, "steps": 10, "eval_loss_before": 2.0, "eval_loss": 1.0}
    log = {"result": trained, "settings": {"learning_rate": 1e-3, "scheduler": "cosine", "dtype": "bfloat16"}}
    text = module("instruct_card").card(log, found, found, "one core")
    for name in module("instruct_card").SKILLS.values():
        assert re.search(rf"\| {re.escape(name)} \| 2 \| [\d.]+ \(.*\) \| [\d.]+ \(", text), name
    assert "| one core |" in text
    monkeypatch.setattr(prompting, "evaluate_templates", None)
    prompting.main()
    assert json.loads((tmp_path / "all.json").read_text(encoding="utf-8")) == found
