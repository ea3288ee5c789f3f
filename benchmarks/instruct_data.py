"""The data of models/fable-9m-instruct and of the benchmark of prompting, made again from fixed seeds.

python benchmarks/instruct_data.py models/fable-9m OUT

OUT/instruct     train, valid: what the model that ships is trained on
OUT/scratchpad   train, valid: arithmetic with every step written down, alone
OUT/direct       train, valid: the same number of tokens of arithmetic answered at once, alone
OUT/tasks        what is measured: questions of each skill, and the base of facts, one a file, for `quantlab index`

No chain, name, word or request that is measured is trained on.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import instruct_chat as chat
import instruct_labels as labels
from instruct_arithmetic import Chain, draw_chain, measured_chains
from instruct_facts import Fact, base_facts
from instruct_grounded import measured_facts, passage_of
from instruct_labels import Labelled
from instruct_rows import MIXTURE, BegunAnswers, Row, direct_row, extraction_row, scratchpad_row

from quantlab.generation.answers import NOT_IN_SOURCES

SEED = 900
TEMPLATE = Path(__file__).parents[1] / "models" / "recipes" / "fable-9m-instruct.jinja"
MEASURED_LABELS = 100  # of each of the three tasks, or all there are
HELD_OUT = 0.02  # share of rows that watch a training
SCRATCHPAD_ROWS, EXTRACTION_EVERY, DIRECT_ROWS = 5000, 20, 12000  # of arithmetic alone


def write(model: Path, out: Path) -> None:
    """All folders of OUT."""
    begun = BegunAnswers(model, TEMPLATE)
    _write_training(out / "instruct", _mixed(begun))
    _write_training(out / "direct", _arithmetic(DIRECT_ROWS, lambda chain, _: direct_row(chain, begun)))
    _write_training(out / "scratchpad", _arithmetic(SCRATCHPAD_ROWS, lambda chain, n: _reasoned(chain, n, begun)))
    _write_tasks(out / "tasks")


def _mixed(begun: BegunAnswers) -> list[Row]:
    draw = random.Random(SEED)
    rows = [make(draw, begun) for make, count in MIXTURE.values() for _ in range(count)]
    draw.shuffle(rows)
    return rows


def _arithmetic(count: int, row: Callable[[Chain, int], Row]) -> list[Row]:
    """The same chains for both, as far as they go."""
    draw = random.Random(SEED + 1)
    return [row(draw_chain(draw), number) for number in range(count)]


def _reasoned(chain: Chain, number: int, begun: BegunAnswers) -> Row:
    """Steps, or now and then the second stage, which the template needs."""
    return extraction_row(chain, begun) if number % EXTRACTION_EVERY == 0 else scratchpad_row(chain, begun)


def _write_training(folder: Path, rows: list[Row]) -> None:
    """What is held out is not trained on: a short row may be drawn twice."""
    cut = round(HELD_OUT * len(rows))
    held_out = rows[:cut]
    known = {json.dumps(row) for row in held_out}
    _write_rows(folder / "valid.jsonl", held_out)
    _write_rows(folder / "train.jsonl", (row for row in rows[cut:] if json.dumps(row) not in known))


def _write_tasks(folder: Path) -> None:
    """As `quantlab evaluate` reads them."""
    _write_rows(folder / "arithmetic.jsonl", ({"question": c.question, "answer": c.answer} for c in measured_chains()))
    facts = measured_facts()
    _write_rows(folder / "facts.jsonl", (_fact_row(fact, others, has_fact=True) for fact, others in facts))
    _write_rows(folder / "absent.jsonl", (_fact_row(fact, others, has_fact=False) for fact, others in facts))
    trained, measured = labels.pools()
    for task in measured:
        items = measured[task][:MEASURED_LABELS]
        _write_rows(folder / f"{task}.jsonl", (_label_row(item) for item in items))
        _write_rows(folder / f"{task}-examples.jsonl", map(_label_row, _one_of_each(trained[task])))
    requests = chat.measured_and_trained()[0]
    _write_rows(folder / "chat.jsonl", ({"question": e.said, "answer": e.answer, "type": "free"} for e in requests))
    base = folder / "base"
    base.mkdir(parents=True, exist_ok=True)
    for fact in base_facts():
        passage = passage_of(fact)
        (base / passage.source).write_text(passage.text + "\n", encoding="utf-8")


def _fact_row(fact: Fact, others: Sequence[Fact], *, has_fact: bool) -> Row:
    """Passages in an order that the question draws; without the fact the right answer is that it is not there."""
    shown = [*others, fact] if has_fact else list(others)
    random.Random(f"{SEED} {fact.question}").shuffle(shown)
    return {
        "question": fact.question,
        "answer": fact.value if has_fact else NOT_IN_SOURCES,
        "type": "text",
        "passages": [vars(passage_of(one)) for one in shown],
        "context": fact.sentence,
        "source": passage_of(fact).source,
    }


def _label_row(item: Labelled) -> Row:
    return {"question": item.question, "answer": item.label, "type": "text"}


def _one_of_each(pool: Sequence[Labelled]) -> list[Labelled]:
    """Worked examples: one of each label."""
    draw = random.Random(SEED + 2)
    return [draw.choice([item for item in pool if item.label == label]) for label in sorted({i.label for i in pool})]


def _write_rows(file: Path, rows: Iterable[Row]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder whose tokenizer it is for")
    parser.add_argument("out", type=Path, help="folder to write")
    options = parser.parse_args()
    write(options.model, options.out)


if __name__ == "__main__":
    main()
