"""What retrieval finds, and how fast: 2,080 invented facts, a document each, asked for by every method.

The facts are those of instruct_facts.py: 260 names that no text holds, eight relations, values drawn by a seed. So a
question has one right document of 2,080, and seven others tell of the same name.

    python benchmarks/retrieval.py
    python benchmarks/retrieval.py --questions 1000 --embedding-model FOLDER --threads 1 --json FILE
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from instruct_facts import Fact, base_facts
from instruct_grounded import passage_of
from quantlab.cli.console import print_table, progress, use_threads

from quantlab.evaluation.evaluate import Accuracy, accuracy_of
from quantlab.retrieval.index import METHODS, Index, open_index
from quantlab.retrieval.indexing import IndexReport, index_documents

SEED = 911
PASSAGES = 4  # of recall@4
WARM_UP = 5  # questions before the first that is timed: the first one loads the embedding model


@dataclass(frozen=True)
class Found:
    """What a method found. `first` and `among` are recall@1 and recall@4, `milliseconds` the median of a search."""

    first: Accuracy
    among: Accuracy
    milliseconds: float


def write_base(facts: Sequence[Fact], folder: Path) -> None:
    """A file for each fact."""
    folder.mkdir(parents=True, exist_ok=True)
    for fact in facts:
        passage = passage_of(fact)
        (folder / passage.source).write_text(passage.text + "\n", encoding="utf-8")


def measured(opened: Index, facts: Sequence[Fact], method: str) -> Found:
    """Ask for every fact."""
    for fact in facts[:WARM_UP]:
        opened.search(fact.question, PASSAGES, method=method)
    ranks, seconds = [], []
    with progress(method, "questions") as report:
        for number, fact in enumerate(facts, 1):
            started = time.perf_counter()
            passages = opened.search(fact.question, PASSAGES, method=method)
            seconds.append(time.perf_counter() - started)
            sources = [passage.source for passage in passages]
            wanted = passage_of(fact).source
            ranks.append(sources.index(wanted) if wanted in sources else None)
            report(number, len(facts), "")
    first = accuracy_of([rank == 0 for rank in ranks])
    return Found(first, accuracy_of([rank is not None for rank in ranks]), 1000 * median(seconds))


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embedding-model", help="folder or hub id; by default the library's")
    parser.add_argument("--questions", type=int, help="to ask, drawn by a seed; by default one for each fact")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()
    use_threads(options.threads)
    facts = base_facts()
    asked = facts if options.questions is None else random.Random(SEED).sample(facts, options.questions)
    with tempfile.TemporaryDirectory() as folder:
        write_base(facts, Path(folder, "base"))
        with progress("indexing", "B") as report:
            made = index_documents(
                Path(folder, "base"), Path(folder, "index"), embedding_model=options.embedding_model, progress=report
            )
        again = index_documents(Path(folder, "base"), Path(folder, "index"))
        opened = open_index(Path(folder, "index"))
        found = {method: measured(opened, asked, method) for method in METHODS}
    show(made, again, found)
    if options.json:
        figures = {"made": asdict(made), "again": asdict(again), "found": {k: asdict(v) for k, v in found.items()}}
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def show(made: IndexReport, again: IndexReport, found: dict[str, Found]) -> None:
    """Print all figures."""
    print(f"{made.documents} documents in {made.seconds:.1f} s; again, unchanged: {again.seconds:.2f} s")
    rows = [
        (method, _share(each.first), _share(each.among), f"{each.milliseconds:.1f}") for method, each in found.items()
    ]
    print_table(("method", "recall@1, % (95 %)", f"recall@{PASSAGES}, % (95 %)", "ms a search"), rows)


def _share(found: Accuracy) -> str:
    low, high = found.interval
    return f"{100 * found.accuracy:.1f} ({100 * low:.1f} to {100 * high:.1f})"


if __name__ == "__main__":
    main()
