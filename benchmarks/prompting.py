"""Prompt templates and retrieval, measured on tasks that instruct_data.py writes: the gates of docs/prompting.md.

    python benchmarks/instruct_data.py models/fable-9m DATA
    quantlab index DATA/tasks/base INDEX
    python benchmarks/prompting.py models/fable-9m-instruct WORK --tasks DATA/tasks
        [--index INDEX] [--base models/fable-9m] [--scratchpad SCRATCHPAD --direct DIRECT-1 DIRECT-2 DIRECT-3]

The model has been trained on all skills, SCRATCHPAD and DIRECT-1 to -3 on arithmetic alone, with every step written
down and without, at equal tokens, the latter at three learning rates. Without INDEX the passages are the fact that is
asked for and three others, in the rows' order. WORK keeps what was said: an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from quantlab.cli.console import print_table, progress

from quantlab.checkpoint import open_checkpoint
from quantlab.checkpoint.checksums import model_digest
from quantlab.errors import InputError
from quantlab.evaluation.asked_rows import Search
from quantlab.evaluation.evaluate import accuracy_of
from quantlab.evaluation.paired_tests import mcnemar
from quantlab.evaluation.templates import evaluate_templates

Outcomes = list[bool]  # one a question

DIRECT, SCRATCHPAD, IRRELEVANT = "zero-shot", "zero-shot-cot", "irrelevant-trigger"
RAG, SHUFFLED, OTHER, CLOSED, ORACLE = "rag", "rag-shuffled", "rag-other", "closed-book", "oracle"
LABELS = ("kinds", "feelings", "opinions")
SHOTS = 4  # at most as many as the model was trained on
FOUND = 4  # passages of a question
CHANCE = 100 / 16  # of a fact, which has one of sixteen values
NEAR = 5  # points from chance


@dataclass(frozen=True)
class Line:
    """What one model made of one task by one template."""

    model: str
    task: str
    template: str
    outcomes: Outcomes

    @property
    def percent(self) -> float:
        """Of right answers."""
        return 100 * accuracy_of(self.outcomes).accuracy

    @property
    def figure(self) -> str:
        """Percent, with the 95 % interval."""
        low, high = accuracy_of(self.outcomes).interval
        return f"{self.percent:.1f} ({100 * low:.1f} to {100 * high:.1f})"


@dataclass(frozen=True)
class Gate:
    """A bound and whether it holds."""

    name: str
    bound: str
    figure: str
    holds: bool


class Measuring:
    """Asks models the questions of tasks, or takes what an earlier run with the same limit left in `work`."""

    def __init__(self, tasks: Path, work: Path, limit: int, threads: int, index: Path | None) -> None:
        self._tasks, self._work, self._limit, self._threads = tasks, work, limit, threads
        self.search = None if index is None else _search(index)
        work.mkdir(parents=True, exist_ok=True)

    def lines(self, model: Path, task: str, *templates: str) -> list[Line]:
        """One for each template, on the same questions."""
        said = self._file(model, task)
        if not said.exists():
            examples = self._tasks / f"{task}-examples.jsonl"
            with progress(f"{model.name}, {task}", "questions") as report:
                evaluate_templates(
                    model,
                    self._tasks / f"{task}.jsonl",
                    templates,
                    examples=examples if examples.exists() else None,
                    shots=SHOTS,
                    search=self.search if self._searches(task) else None,
                    limit=self._limit,
                    threads=self._threads,
                    save=said,
                    progress=report,
                )
        rows = [json.loads(line) for line in said.read_text(encoding="utf-8").splitlines()]
        if missing := set(templates) - {row["template"] for row in rows}:
            raise InputError(f"{said}: is another run's, without {', '.join(sorted(missing))}; remove it")
        return [
            Line(str(model), task, name, [row["right"] for row in rows if row["template"] == name])
            for name in templates
        ]

    def recall(self) -> Outcomes:
        """Whether the fact is among the passages of its question."""
        rows = [json.loads(line) for line in (self._tasks / "facts.jsonl").read_text(encoding="utf-8").splitlines()]
        found = []
        for row in rows[: self._limit]:
            texts = [p["text"] for p in row["passages"]]
            if self.search is not None:
                texts = [passage.text for passage in self.search(row["question"])]
            found.append(any(row["context"] in text for text in texts))
        return found

    def _file(self, model: Path, task: str) -> Path:
        """Named after all that decides what is said, so that another model or limit is asked anew."""
        digest = model_digest(open_checkpoint(model)).rpartition(":")[2][:12]
        searched = "-index" if self._searches(task) else ""
        return self._work / f"{model.name}-{digest}-{task}-{self._limit}{searched}.jsonl"

    def _searches(self, task: str) -> bool:
        return self.search is not None and task == "facts"


def _search(index: Path) -> Search:
    from quantlab.retrieval.index import open_index

    opened = open_index(index)
    return lambda question: opened.search(question, FOUND)


def skills(measuring: Measuring, model: Path) -> list[Line]:
    """All that the model that ships is trained for."""
    lines = measuring.lines(model, "arithmetic", DIRECT, SCRATCHPAD)
    lines += measuring.lines(model, "facts", RAG, SHUFFLED, OTHER, CLOSED, ORACLE)
    recalled = measuring.recall()
    answered = [right for right, hit in zip(lines[2].outcomes, recalled, strict=True) if hit]
    lines.append(Line("search", "facts", f"recall@{FOUND}", recalled))
    if answered:
        lines.append(Line(str(model), "facts", "rag, where the fact was found", answered))
    lines += measuring.lines(model, "absent", RAG)
    for task in LABELS:
        lines += measuring.lines(model, task, "few-shot")
    return lines + measuring.lines(model, "chat", DIRECT)


def alone(measuring: Measuring, scratchpad: Path | None, direct: list[Path]) -> list[Line]:
    """Models that were trained on arithmetic alone, each in the form that it was trained on."""
    lines = measuring.lines(scratchpad, "arithmetic", SCRATCHPAD) if scratchpad else []
    return lines + [line for path in direct for line in measuring.lines(path, "arithmetic", DIRECT)]


def gates(lines: list[Line], model: Path, base: Path | None, scratchpad: Path | None, direct: list[Path]) -> list[Gate]:
    """Those whose lines there are."""
    by_key = {(line.model, line.task, line.template): line for line in lines}

    def at_least(name: str, line: Line, bound: float) -> Gate:
        return Gate(name, f">= {bound:g} %", line.figure, line.percent >= bound)

    def at_most(name: str, line: Line, bound: float) -> Gate:
        return Gate(name, f"<= {bound:.4g} %", line.figure, line.percent <= bound)

    facts = {name: by_key[str(model), "facts", name] for name in (RAG, SHUFFLED, OTHER, CLOSED)}
    direct_line, steps = (by_key[str(model), "arithmetic", name] for name in (DIRECT, SCRATCHPAD))
    found = [
        at_least("scratchpad", steps, 80),
        at_most("bare answer", direct_line, 30),
        _differ("scratchpad against bare answer", steps, direct_line, True),
        at_least("with retrieval", facts[RAG], 80),
        at_most("closed book", facts[CLOSED], CHANCE + NEAR),
        at_most("another question's passages", facts[OTHER], CHANCE + NEAR),
        _differ("order of passages", facts[RAG], facts[SHUFFLED], False),
    ]
    if scratchpad and direct:
        best = max((by_key[str(path), "arithmetic", DIRECT] for path in direct), key=lambda line: line.percent)
        written = by_key[str(scratchpad), "arithmetic", SCRATCHPAD]
        found.append(at_least("trained on steps alone", written, 80))
        found.append(at_most(f"best of {len(direct)} trained on bare answers alone ({best.model})", best, 30))
        found.append(_differ("the one against the other", written, best, True))
    if base:
        bare, triggered = (by_key[str(base), "arithmetic", name] for name in (DIRECT, SCRATCHPAD))
        found.append(_differ("trigger phrase on the base", bare, triggered, False))
    return found


def _differ(name: str, one: Line, other: Line, wanted: bool) -> Gate:
    """McNemar's test at 5 %: `one` is right more often, or neither is."""
    only_one = sum(a and not b for a, b in zip(one.outcomes, other.outcomes, strict=True))
    only_other = sum(b and not a for a, b in zip(one.outcomes, other.outcomes, strict=True))
    p = mcnemar(only_one, only_other)
    holds = (p < 0.05 and only_one > only_other) if wanted else p >= 0.05
    return Gate(name, "p < 0.05" if wanted else "p >= 0.05", f"{only_one} against {only_other}, p {p:.2g}", holds)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="trained on all skills")
    parser.add_argument("work", type=Path, help="folder for what is said")
    parser.add_argument("--tasks", type=Path, required=True, help="folder of tasks")
    parser.add_argument("--base", type=Path, help="model that was trained on none of them")
    parser.add_argument("--scratchpad", type=Path, help="trained on steps alone")
    parser.add_argument("--direct", type=Path, nargs="*", default=[], help="trained on bare answers alone")
    parser.add_argument("--index", type=Path, help="of the facts")
    parser.add_argument("--limit", type=int, default=400, help="questions of a task")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where all lines and gates go")
    options = parser.parse_args()
    measuring = Measuring(options.tasks, options.work, options.limit, options.threads, options.index)
    lines = skills(measuring, options.model) + alone(measuring, options.scratchpad, options.direct)
    if options.base:
        lines += measuring.lines(options.base, "arithmetic", DIRECT, SCRATCHPAD, IRRELEVANT)
    held = gates(lines, options.model, options.base, options.scratchpad, options.direct)
    report(lines, held, options.json)


def report(lines: list[Line], held: list[Gate], file: Path | None) -> None:
    """Tables, and one JSON object in `file`."""
    rows = [(line.model, line.task, line.template, str(len(line.outcomes)), line.figure) for line in lines]
    print_table(("model", "task", "template", "questions", "right, % (95 %)"), rows)
    print_table(
        ("gate", "bound", "figure", ""),
        [(gate.name, gate.bound, gate.figure, "holds" if gate.holds else "fails") for gate in held],
    )
    if file:
        content = {
            "lines": [{**asdict(line), "figure": line.figure} for line in lines],
            "gates": list(map(asdict, held)),
        }
        file.write_text(json.dumps(content) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
