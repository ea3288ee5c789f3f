"""Accuracy on a task: likelihoods are transformers', answers are the generator's, intervals are Wilson's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantlab.checkpoint import load_tokenizer
from quantlab.errors import InputError
from quantlab.evaluation.evaluate import accuracy_of, choice_likelihood, continuation, evaluate
from quantlab.evaluation.scorers import open_scorer
from quantlab.generation.generate import generate
from quantlab.generation.sampling import SamplingParams

PROMPT = "Question: Who has the key to the boathouse?\nAnswer:"
CHOICES = ("Nobody has it.", "a pike", "the old man with the lantern", "Nell")


def task_file(folder: Path, *rows: dict[str, object]) -> Path:
    path = folder / "task.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def plain_likelihoods(folder: Path) -> list[float]:
    """ln p of each choice behind the prompt, by transformers in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for choice in CHOICES:
        ids = torch.tensor([tokenizer.encode(f"{PROMPT} {choice}")])
        begin = len(tokenizer.encode(PROMPT))
        with torch.inference_mode():
            log = model(ids).logits[0, :-1].double().log_softmax(1)
        found.append(log[torch.arange(len(log)), ids[0, 1:]][begin - 1 :].sum().item())
    return found


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_choices_are_scored_by_likelihood(llama_model: Path, tmp_path: Path, engine: str) -> None:
    """Of each choice that of transformers; the best one wins, and the best per byte on the other count."""
    expected = plain_likelihoods(llama_model)
    scorer, tokenizer = open_scorer(llama_model, engine, 128), load_tokenizer(llama_model)
    found = [choice_likelihood(PROMPT, choice, scorer, tokenizer) for choice in CHOICES]
    assert found == pytest.approx(expected, rel=1e-5)

    best = max(range(4), key=lambda number: expected[number])
    per_byte = max(range(4), key=lambda number: expected[number] / len(CHOICES[number]))
    assert best != per_byte  # or the two counts could not be told apart
    question = "Who has the key to the boathouse?"
    rows = [{"question": question, "choices": CHOICES, "answer": number} for number in (best, best, per_byte, per_byte)]
    result = evaluate(llama_model, task_file(tmp_path, *rows[:3]), engine=engine)
    assert (result.accuracy, result.accuracy_normalized, result.n) == (pytest.approx(2 / 3), pytest.approx(1 / 3), 3)
    assert result.choices == result.per_template["plain"] == accuracy_of([True, True, False])
    assert result.choices_normalized == accuracy_of([True, False, False])
    assert result.exact is None
    assert (result.engine, result.activations) == (engine, "f32")


def test_exact_answers_are_greedy_generations(llama_model: Path, tmp_path: Path) -> None:
    """The model's own words are the right answer, others are not; progress counts the questions."""
    said = generate(llama_model, "The lamp", max_tokens=32, params=SamplingParams(temperature=0), stop=["\n"]).text
    assert said.strip()
    rows = [{"prompt": "The lamp", "answer": answer} for answer in (said, "something else", said)]
    seen: list[tuple[int, int, str]] = []
    result = evaluate(llama_model, task_file(tmp_path, *rows), activations="int8", progress=lambda *s: seen.append(s))
    assert result.accuracy == pytest.approx(2 / 3)
    assert result.exact == accuracy_of([True, False, True])
    assert (result.choices, result.accuracy_normalized) == (None, None)
    assert seen == [(1, 3, "accuracy 100.0 %"), (2, 3, "accuracy 50.0 %"), (3, 3, "accuracy 66.7 %")]
    assert evaluate(llama_model, task_file(tmp_path, *rows), limit=2).accuracy == 0.5


def test_both_kinds_in_one_file(llama_model: Path, tmp_path: Path) -> None:
    rows = [{"question": "a", "choices": ["b", "c"], "answer": 0}, {"question": "a", "answer": "never that"}]
    result = evaluate(llama_model, task_file(tmp_path, *rows))
    assert result.n == 2
    assert result.exact == accuracy_of([False])
    assert result.choices is not None
    assert result.accuracy == result.choices.accuracy / 2


# Statistics.


def test_wilsons_interval() -> None:
    """Worked examples; at the ends it stays within 0 and 1."""
    found = accuracy_of([True] * 8 + [False] * 2)
    assert found.accuracy == pytest.approx(0.8)
    assert found.stderr == pytest.approx(0.126491, abs=1e-6)
    assert found.interval == pytest.approx((0.490162, 0.943318), abs=1e-6)
    assert accuracy_of([False] * 10).interval == pytest.approx((0, 0.277533), abs=1e-6)
    assert accuracy_of([True] * 10).interval == pytest.approx((0.722467, 1), abs=1e-6)


def test_wilsons_interval_is_where_the_test_of_a_share_turns() -> None:
    """Its ends are the shares p with |found - p| = 1.96 sqrt(p (1 - p) / n), which is what defines it."""
    found = accuracy_of([True] * 37 + [False] * 113)
    for end in found.interval:
        assert abs(37 / 150 - end) == pytest.approx(1.959963984540054 * (end * (1 - end) / 150) ** 0.5, rel=1e-9)


# Where a continuation begins.


def test_a_continuation_is_what_the_context_does_not_give(tokenizer_folder: Path) -> None:
    """Its tokens join to the text; a space at the context's end goes with what follows it."""
    tokenizer = load_tokenizer(tokenizer_folder)
    for context, text in (("The lamp", "The lamp was lit"), ("The lamp ", "The lamp was lit")):
        ids, start = continuation(context, text, tokenizer)
        assert ids == tokenizer.encode(text)
        assert tokenizer.decode(ids[:start]).strip() == "The lamp"
        assert tokenizer.decode(ids[start:]).strip() == "was lit"


# What is refused.


def test_questions_that_do_not_fit_are_named(llama_model: Path, tmp_path: Path) -> None:
    """The tiny model holds 128 tokens: too long a prompt, and too long a choice."""
    rows = [
        {"question": "short", "answer": "x"},
        {"question": "long " * 200, "answer": "x"},
        {"question": "short", "choices": ["x", "word " * 200], "answer": 0},
    ]
    path = task_file(tmp_path, *rows)
    with pytest.raises(InputError, match=f"{path}: questions longer than the context of 128 tokens on lines 2, 3$"):
        evaluate(llama_model, path)
    with pytest.raises(InputError, match="max tokens 0: at least 1 is needed"):
        evaluate(llama_model, path, max_tokens=0)
