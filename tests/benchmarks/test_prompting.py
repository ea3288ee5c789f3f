"""The data of the instruct model, and the statistics of the benchmark that asks it."""

from __future__ import annotations

import importlib
import random
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


def test_an_interval_is_wilsons(module) -> None:
    """8 of 10: (0.8 + 1.9208 / 10 -+ 1.96 sqrt(0.016 + 0.9604 / 100)) / 1.38416 (Wilson 1927)."""
    low, high = module("prompting_statistics").Share(8, 10).interval
    assert low == pytest.approx(0.4902, abs=1e-4)
    assert high == pytest.approx(0.9433, abs=1e-4)


def test_mcnemar_by_hand(module) -> None:
    """Five questions that only one side gets right, one that only the other does: 2 (1 + 6) / 64."""
    one = [True] * 5 + [False] + [True, False]
    other = [False] * 5 + [True] + [True, False]
    assert module("prompting_statistics").mcnemar(one, other) == (5, 1, pytest.approx(14 / 64))
    assert module("prompting_statistics").mcnemar(one, one) == (0, 0, 1.0)
