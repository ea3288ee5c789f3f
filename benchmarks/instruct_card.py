"""The card of models/fable-9m-instruct, with figures as they were measured.

    python benchmarks/prompting.py models/fable-9m-instruct WORK --tasks DATA/tasks --json RESULTS
    python benchmarks/instruct_card.py models/fable-9m-instruct RESULTS [--quantized Q41-RESULTS] --machine "..."

Reads the folder's training_log.json and writes its README.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

# Task and template of a line of results, and what the card calls it.
SKILLS = {
    ("arithmetic", "zero-shot-cot"): "last digit of a sum of six digits, step by step",
    ("arithmetic", "zero-shot"): "the same, answered at once",
    ("facts", "rag"): "a fact among four sources",
    ("absent", "rag"): "sources without the fact: says so",
    ("facts", "closed-book"): "a fact without sources (chance: 6 %)",
    ("kinds", "few-shot"): "kind of a thing, one of six, words never trained on",
    ("feelings", "few-shot"): "feeling in a sentence, one of four",
    ("opinions", "few-shot"): "opinion in a sentence, good or bad",
    ("chat", "zero-shot"): "small requests: opposites, counting, days, repeating",
}

CARD = Path(__file__).with_suffix(".md")


def card(log: dict[str, Any], results: dict[str, Any], quantized: dict[str, Any] | None, machine: str) -> str:
    """The whole text: instruct_card.md with its blanks filled."""
    trained, settings = log["result"], log["settings"]
    return CARD.read_text(encoding="utf-8").format(
        table=table(results, quantized),
        rate=settings["learning_rate"],
        scheduler=settings["scheduler"],
        dtype=settings["dtype"],
        tokens=trained["training_tokens"],
        steps=trained["steps"],
        before=trained["eval_loss_before"],
        after=trained["eval_loss"],
        machine=machine,
    )


def table(results: dict[str, Any], quantized: dict[str, Any] | None) -> str:
    """A row a skill."""
    columns = ["fp16"] + (["Q4_1"] if quantized else [])
    rows = [["skill", "questions", *columns], ["---"] * (2 + len(columns))]
    figures = [_figures(one) for one in (results, quantized) if one]
    for key, name in SKILLS.items():
        line = figures[0][key]
        rows.append([name, str(len(line["outcomes"])), *(one[key]["figure"] for one in figures)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _figures(results: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """The first line of each task and template: the model's own, which comes before those of models beside it."""
    return {(line["task"], line["template"]): line for line in reversed(results["lines"])}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder to describe")
    parser.add_argument("results", type=Path, help="what prompting.py wrote with --json")
    parser.add_argument("--quantized", type=Path, help="the same of the model in Q4_1")
    parser.add_argument("--machine", required=True, help="what it was trained on, and how long that took")
    options = parser.parse_args()
    log, results = (json.loads(path.read_text()) for path in (options.model / "training_log.json", options.results))
    quantized = json.loads(options.quantized.read_text()) if options.quantized else None
    text = card(log, results, quantized, options.machine)
    (options.model / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
