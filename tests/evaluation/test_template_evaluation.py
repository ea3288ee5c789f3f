"""Templates compared on a task by a tiny model: accuracies, pairs, costs, what is saved, what is refused."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from quantlab.checkpoint import load_tokenizer
from quantlab.errors import InputError
from quantlab.evaluation import templates
from quantlab.evaluation.evaluate import accuracy_of
from quantlab.evaluation.paired_tests import holm, mcnemar
from quantlab.evaluation.scorers import open_scorer
from quantlab.evaluation.templates import named_templates
from quantlab.generation.asking import Manner, ask
from quantlab.generation.prompt_format import prompt_format
from quantlab.generation.templates import TEMPLATES, Asked
from quantlab.generation.writer import Writer

evaluate_templates = partial(templates.evaluate_templates, threads=1)  # tests run side by side

MANNER = Manner(reasoning_tokens=8, answer_tokens=6)
QUESTIONS = ("Who has the lamp?", "Where is the key?", "What did the old man say?", "How far is the boathouse?")


@pytest.fixture(scope="module")
def model(make_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "llama", max_position_embeddings=256)


@pytest.fixture(scope="module")
def said(model: Path) -> dict[str, list[str]]:
    """What the model answers each question by each template."""
    writer = Writer(open_scorer(model, "auto", None, 1).engine, prompt_format(model, load_tokenizer(model)))
    return {
        name: [ask(writer, TEMPLATES[name], Asked(question, "text"), MANNER).answer for question in QUESTIONS]
        for name in ("zero-shot", "cot", "irrelevant-trigger")
    }


def task_file(folder: Path, *rows: object) -> Path:
    path = folder / "task.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture
def task(tmp_path: Path, said: dict[str, list[str]]) -> Path:
    """Its answers are what zero-shot says to the first three questions, and then nobody's."""
    answers = [*said["zero-shot"][:3], "never said"]
    return task_file(
        tmp_path, *({"question": q, "answer": a, "type": "text"} for q, a in zip(QUESTIONS, answers, strict=True))
    )


def test_accuracy_cost_and_pairs(model: Path, task: Path, said: dict[str, list[str]], tmp_path: Path) -> None:
    """Each template's answers are those of asking alone; tests are made on the questions that one alone got right."""
    names = ["zero-shot", "cot", "irrelevant-trigger"]
    assert all(said["zero-shot"][:3])
    references = [*said["zero-shot"][:3], "never said"]
    right = {name: [a == b for a, b in zip(said[name], references, strict=True)] for name in names}
    assert right["zero-shot"] == [True, True, True, False]
    assert sum(right["cot"]) < 3
    seen: list[tuple[int, int, str]] = []
    result = evaluate_templates(
        model, task, names, manner=MANNER, save=tmp_path / "saved.jsonl", progress=lambda *step: seen.append(step)
    )
    assert list(result.per_template) == names
    for name in names:
        expected, found = accuracy_of(right[name]), result.per_template[name]
        assert (found.accuracy, found.stderr, found.interval, found.n) == tuple(vars(expected).values())
        assert found.unanswered == sum(not answer for answer in said[name]) / 4
    assert (result.accuracy, result.n, result.engine, result.chat_template) == (0.75, 4, "native", False)
    assert [(pair.a, pair.b) for pair in result.pairs] == [
        (names[0], names[1]),
        (names[0], names[2]),
        (names[1], names[2]),
    ]
    for pair in result.pairs:
        assert pair.only_a == sum(x and not y for x, y in zip(right[pair.a], right[pair.b], strict=True))
        assert pair.only_b == sum(y and not x for x, y in zip(right[pair.a], right[pair.b], strict=True))
        assert pair.p == mcnemar(pair.only_a, pair.only_b)
    assert [pair.p_holm for pair in result.pairs] == holm([pair.p for pair in result.pairs])
    assert seen[:4] == [(0, 12, f"{number} of 4 questions prepared") for number in range(1, 5)]
    assert seen[4] == (1, 12, "zero-shot 100.0 %")
    assert seen[7] == (4, 12, "zero-shot 75.0 %")
    assert seen[-1][:2] == (12, 12)

    saved = [json.loads(line) for line in (tmp_path / "saved.jsonl").read_text().split("\n")[:-1]]
    assert [(row["line"], row["template"]) for row in saved] == [(line, name) for line in range(1, 5) for name in names]
    assert [row["answer"] for row in saved if row["template"] == "cot"] == said["cot"]
    assert saved[0]["reference"] == references[0]
    assert [row["right"] for row in saved[::3]] == right["zero-shot"]
    assert saved[0]["samples"][0]["steps"][0]["prompt"] == "Q: Who has the lamp?\nA: The answer is"
    assert len(saved[1]["samples"][0]["steps"]) == 2
    cost = result.per_template["cot"]
    assert cost.generated_tokens == sum(row["generated_tokens"] for row in saved[1::3]) / 4
    assert cost.prompt_tokens == sum(row["prompt_tokens"] for row in saved[1::3]) / 4
    with pytest.raises(InputError, match=r"saved\.jsonl: exists already; choose another name or pass --overwrite"):
        evaluate_templates(model, task, names, save=tmp_path / "saved.jsonl")


def test_one_pair_needs_no_correction(model: Path, task: Path) -> None:
    result = evaluate_templates(model, task, ["zero-shot", "closed-book"], manner=MANNER, limit=2)
    assert [(pair.only_a, pair.only_b, pair.p, pair.p_holm) for pair in result.pairs] == [(0, 0, 1.0, None)]
    assert evaluate_templates(model, task, ["zero-shot"], manner=MANNER, limit=1).pairs == ()


def test_votes_in_an_evaluation(model: Path, task: Path, tmp_path: Path) -> None:
    """Samples and temperature are those of templates that vote; the others stay greedy. A seed repeats them."""
    names = ["zero-shot", "self-consistency"]
    options = {"manner": MANNER, "samples": 3, "temperature": 1.2, "limit": 2, "overwrite": True}
    found = []
    for _ in range(2):
        evaluate_templates(model, task, names, save=tmp_path / "saved.jsonl", **options)
        found.append((tmp_path / "saved.jsonl").read_text())
    assert found[0] == found[1]
    saved = [json.loads(line) for line in found[0].split("\n")[:-1]]
    assert [len(row["samples"]) for row in saved] == [1, 3, 1, 3]
    assert saved[0]["votes"] is None
    assert sum(saved[1]["votes"].values()) == sum(bool(sample["answer"]) for sample in saved[1]["samples"])


def test_gsm8k_rows_as_they_are(model: Path, tmp_path: Path) -> None:
    """The task and the worked examples; by the paper's rules too."""
    rows = [
        {"question": f"{n} + {n}?", "answer": f"{n} + {n} = <<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}"} for n in range(4)
    ]
    path = task_file(tmp_path, *rows)
    for rules in ("strict", "kojima"):
        result = evaluate_templates(
            model, path, ["few-shot-cot", "few-shot"], examples=path, shots=2, manner=Manner(8, 6, rules=rules),
            save=tmp_path / f"{rules}.jsonl",
        )  # fmt: skip
        assert result.rules == rules
    saved = json.loads((tmp_path / "strict.jsonl").read_text().split("\n")[0])
    assert saved["reference"] == "0"
    assert saved["samples"][0]["steps"][0]["prompt"] == (
        "Q: 1 + 1?\nA: 1 + 1 = 2 The answer is 2.\n\nQ: 2 + 2?\nA: 2 + 2 = 4 The answer is 4.\n\nQ: 0 + 0?\nA:"
    )


# Names, and what is refused.


def test_each_trigger_is_a_template_of_its_own() -> None:
    found = named_templates(["zero-shot", "cot", "irrelevant-trigger"], ["First,", "Hm."])
    assert list(found) == ["zero-shot", "cot: First,", "cot: Hm.", "irrelevant-trigger"]
    assert [template.trigger for template in found.values()][1:] == ["First,", "Hm.", "Abrakadabra!"]
    assert list(named_templates(["rag+cot"], ["First,"])) == ["rag+cot"]
    for names, fault in (
        (["cot", "cot"], "template cot: is named twice"),
        (["plain", "cot"], "template plain: is judged by rules of its own"),
        (["few-shot-cot"], "--trigger: none of the templates begins a reasoning with it; add zero-shot-cot"),
    ):
        with pytest.raises(InputError, match=fault):
            named_templates(names, ["First,"])


def test_faults_are_told_before_the_first_question(model: Path, tmp_path: Path) -> None:
    rows = [{"question": "a?", "answer": 1}, {"question": "long " * 300, "answer": 1}, {"question": "c?", "answer": 1}]
    path = task_file(tmp_path, *rows)
    with pytest.raises(InputError) as caught:
        evaluate_templates(model, path, ["zero-shot", "cot", "rag"], limit=2)
    assert str(caught.value).startswith(
        f'{path}: line 1, template rag: has no "passages"; line 2, template zero-shot: the'
    )
    assert "; the context holds 256; line 2, template cot: the question takes" in str(caught.value)
    assert str(caught.value).endswith(" (show fewer examples or passages, or leave such rows out)")
    with pytest.raises(InputError, match="template few-shot: worked examples are missing; give a file of them with"):
        evaluate_templates(model, path, ["few-shot"], limit=1)
    with pytest.raises(InputError, match="answer rules 'lax': choose one of: strict, kojima"):
        evaluate_templates(model, path, ["zero-shot"], manner=Manner(rules="lax"))
