"""Prompt templates and retrieval, measured: the gates of docs/prompting.md, on tasks that instruct_data.py writes.

python benchmarks/instruct_data.py models/fable-9m DATA
python benchmarks/prompting.py models/fable-9m-instruct --tasks DATA/tasks --base models/fable-9m \
    --scratchpad SCRATCHPAD --direct DIRECT-1 DIRECT-2 DIRECT-3 [--index INDEX] [--json FILE]

The model has been trained on all skills; SCRATCHPAD and DIRECT-1 to -3 have been trained on arithmetic alone, with
every step written down and without, at equal tokens, the latter at three learning rates. INDEX is what `quantlab index
DATA/tasks/base INDEX` makes; without it the passages are the fact that is asked for and three others.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prompting_statistics import mcnemar, share
from quantlab.cli.console import print_table, progress

from quantlab.checkpoint import load_tokenizer
from quantlab.generation.answers import NOT_IN_SOURCES, plain_words, reference_answer
from quantlab.generation.asking import Manner, ask
from quantlab.generation.engines import open_engine
from quantlab.generation.examples import Example
from quantlab.generation.prompt_format import prompt_format
from quantlab.generation.sources import GivenSource
from quantlab.generation.templates import Asked, find_template
from quantlab.generation.writer import Writer

Row = dict[str, Any]  # of a task, as JSON has it
Outcomes = list[bool]  # one a question

DIRECT, SCRATCHPAD, IRRELEVANT = "zero-shot", "zero-shot-cot", "irrelevant-trigger"
RETRIEVED = 4
SEED = 907
CONTEXT = 512


@dataclass(frozen=True)
class Line:
    """One figure: what was asked of which model, and its outcomes."""

    part: str
    name: str
    outcomes: Outcomes

    def cells(self) -> tuple[str, ...]:
        """For a table."""
        return self.part, self.name, str(len(self.outcomes)), str(share(self.outcomes))


class Model:
    """A loaded model that answers questions by templates, greedily."""

    def __init__(self, path: Path, threads: int) -> None:
        self.name = path.name
        engine = open_engine(str(path), "native", context=CONTEXT, threads=threads)
        self._writer = Writer(engine, prompt_format(path, load_tokenizer(path)))

    def answers(self, template: str, asked: Sequence[Asked], what: str) -> list[str]:
        """The extracted ones."""
        found, form = [], find_template(template)
        with progress(f"{self.name}, {what}", "questions") as report:
            for number, question in enumerate(asked, 1):
                found.append(ask(self._writer, form, question, Manner()).answer)
                self._writer.forget()
                report(number, len(asked), "")
        return found


def arithmetic(model: Model, rows: list[Row], template: str) -> Outcomes:
    """Which numbers are right."""
    found = model.answers(template, [Asked(row["question"], "number") for row in rows], template)
    return [
        answer == reference_answer(row["answer"], "number", "strict") for answer, row in zip(found, rows, strict=True)
    ]


def texts(model: Model, rows: list[Row], asked: list[Asked], template: str, what: str) -> Outcomes:
    """Which short texts are right."""
    found = model.answers(template, asked, what)
    return [plain_words(answer) == plain_words(row["answer"]) for answer, row in zip(found, rows, strict=True)]


def classification(model: Model, rows: list[Row]) -> dict[str, Outcomes]:
    """Labels behind worked examples, by task."""
    asked = [
        Asked(row["question"], "text", examples=tuple(Example(e["question"], e["answer"]) for e in row["examples"]))
        for row in rows
    ]
    outcomes = texts(model, rows, asked, "few-shot", "classification")
    return {
        task: [right for right, row in zip(outcomes, rows, strict=True) if row["task"] == task]
        for task in sorted({row["task"] for row in rows})
    }


def chat(model: Model, rows: list[Row]) -> Outcomes:
    """Requests that have one right answer."""
    return texts(model, rows, [Asked(row["question"]) for row in rows], DIRECT, "chat")


Passages = list[list[GivenSource]]  # by question


def given_passages(rows: list[Row]) -> Passages:
    """The fact that is asked for and those beside it, in an order drawn by the seed."""
    draw = random.Random(SEED)
    shown = [[GivenSource(p["source"], p["text"]) for p in row["passages"]] for row in rows]
    return [draw.sample(passages, len(passages)) for passages in shown]


def found_passages(rows: list[Row], index: Path) -> Passages:
    """What a search of the index returns."""
    from quantlab.retrieval.index import open_index

    opened = open_index(index)
    return [[GivenSource(p.source, p.text) for p in opened.search(row["question"], RETRIEVED)] for row in rows]


def retrieval(model: Model, rows: list[Row], passages: Passages) -> list[Line]:
    """Answers without sources, with the right ones, with others, and in another order."""
    draw = random.Random(SEED + 1)
    gold = [row["passages"][0]["source"] for row in rows]
    hits = [any(Path(p.source).name == source for p in shown) for shown, source in zip(passages, gold, strict=True)]
    shuffled = [draw.sample(shown, len(shown)) for shown in passages]
    others = [*passages[1:], passages[0]]
    without = [
        [p for p in shown if Path(p.source).name != source] for shown, source in zip(passages, gold, strict=True)
    ]

    def asked(shown: Passages) -> list[Asked]:
        return [Asked(row["question"], "text", passages=p) for row, p in zip(rows, shown, strict=True)]

    def line(name: str, shown: Passages, template: str = "rag") -> Line:
        return Line("retrieval", name, texts(model, rows, asked(shown), template, name))

    answered = line("with its passages", passages)
    refusals = model.answers("rag", asked(without), "without the fact")
    return [
        Line("retrieval", f"recall@{RETRIEVED}", hits),
        line("closed book", [[] for _ in rows], "closed-book"),
        answered,
        Line("retrieval", "with its passages, where the fact is among them",
             [right for right, hit in zip(answered.outcomes, hits, strict=True) if hit]),
        line("with its passages in another order", shuffled),
        line("with another question's passages", others),
        Line("retrieval", "without the fact: says that it is not in the sources",
             [answer == NOT_IN_SOURCES for answer in refusals]),
    ]  # fmt: skip


def skills(model: Model, tasks: Path, index: Path | None, limit: int) -> list[Line]:
    """All that the model that ships is trained for."""
    rows = read_rows(tasks / "arithmetic.jsonl", limit)
    lines = [Line("arithmetic", name, arithmetic(model, rows, name)) for name in (DIRECT, SCRATCHPAD)]
    facts = read_rows(tasks / "facts.jsonl", limit)
    lines += retrieval(model, facts, given_passages(facts) if index is None else found_passages(facts, index))
    for task, outcomes in classification(model, read_rows(tasks / "labels.jsonl", None)).items():
        lines.append(Line("classification", task, outcomes))
    lines.append(Line("chat", "requests", chat(model, read_rows(tasks / "chat.jsonl", None))))
    return lines


def trigger(model: Model, rows: list[Row]) -> list[Line]:
    """The trigger phrase on a model that was trained on no reasoning, beside an irrelevant one."""
    return [
        Line(f"trigger, {model.name}", name, arithmetic(model, rows, name)) for name in (DIRECT, SCRATCHPAD, IRRELEVANT)
    ]


def read_rows(file: Path, limit: int | None) -> list[Row]:
    """The first ones."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:limit]]


def comparisons(lines: list[Line]) -> list[tuple[str, ...]]:
    """Paired tests between lines about the same questions."""
    found = {(line.part, line.name): line.outcomes for line in lines}
    rows = []
    for (part, name), outcomes in found.items():
        for (other_part, other_name), others in found.items():
            paired = (part, name) < (other_part, other_name) and _about_the_same(part, other_part)
            if paired and len(outcomes) == len(others):
                only_one, only_other, p_value = mcnemar(outcomes, others)
                rows.append(
                    (f"{part}: {name}", f"{other_part}: {other_name}", str(only_one), str(only_other), f"{p_value:.2g}")
                )
    return rows


def _about_the_same(part: str, other: str) -> bool:
    arithmetic_parts = ("arithmetic", "trigger", "alone")
    kinds = [next((0 for known in arithmetic_parts if name.startswith(known)), name) for name in (part, other)]
    return kinds[0] == kinds[1] and kinds[0] not in ("classification", "chat")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="trained on all skills")
    parser.add_argument("--tasks", type=Path, required=True, help="folder of tasks")
    parser.add_argument("--base", type=Path, help="model that was trained on none of them")
    parser.add_argument("--scratchpad", type=Path, help="trained on steps alone")
    parser.add_argument("--direct", type=Path, nargs="*", default=[], help="trained on bare answers alone")
    parser.add_argument("--index", type=Path, help="of the facts")
    parser.add_argument("--limit", type=int, default=400, help="questions of a task")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where every outcome goes")
    options = parser.parse_args()
    lines = measured(options)
    print_table(("part", "what", "questions", "right, % (95 %)"), [line.cells() for line in lines])
    print_table(("one", "other", "only one", "only other", "p"), comparisons(lines))
    if options.json:
        options.json.write_text(json.dumps([asdict(line) for line in lines]) + "\n", encoding="utf-8")


def measured(options: argparse.Namespace) -> list[Line]:
    """All lines that the options ask for."""
    rows = read_rows(options.tasks / "arithmetic.jsonl", options.limit)
    lines = skills(Model(options.model, options.threads), options.tasks, options.index, options.limit)
    if options.base:
        lines += trigger(Model(options.base, options.threads), rows)
    alone = [(options.scratchpad, SCRATCHPAD)] if options.scratchpad else []
    for path, template in [*alone, *((path, DIRECT) for path in options.direct)]:
        lines.append(Line("alone", path.name, arithmetic(Model(path, options.threads), rows, template)))
    return lines


if __name__ == "__main__":
    main()
