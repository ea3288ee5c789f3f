"""lm-eval's `local-completions` against a server, and lm-eval in one process on the same engine: the same numbers?

    pip install 'lm_eval[api]' 'quantlab[serve]'
    python benchmarks/serving_scores.py MODEL WORK_FOLDER [--questions 100] [--threads 2] [--concurrent 1] [--json FILE]

The task is made of a text: which of four beginnings goes on as the text does. Every question has four log-likelihoods;
the server gets token ids and gives `echo` and `logprobs` back. Both sides compute in the same arithmetic: --activations
and --kv are given to both.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from pathlib import Path
from typing import Any

from served_model import served

TEXT = Path(__file__).parents[1] / "tests" / "data" / "prose.txt"
NAME = "which_goes_on"
CHOICES = 4
TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: " "
metric_list:
  - metric: acc
  - metric: acc_norm
"""


def main() -> None:
    """Parse, make the task, evaluate twice, compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--concurrent", type=int, default=1)
    parser.add_argument("--activations", default="int8")
    parser.add_argument("--kv", default="f16")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_CACHE", str(arguments.work / "datasets"))
    write_task(arguments.work, arguments.questions)
    inside = evaluated_inside(arguments)
    outside = evaluated_outside(arguments)
    found = compared(inside, outside)
    print(json.dumps(found, indent=2))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found) + "\n", encoding="utf-8")


def write_task(work: Path, count: int) -> None:
    """The questions and lm-eval's description of them."""
    work.mkdir(parents=True, exist_ok=True)
    words = TEXT.read_text(encoding="utf-8").replace("<|endoftext|>", " ").split()
    drawn = random.Random(0)
    starts = drawn.sample(range(40, len(words) - 12), count * CHOICES)
    rows = []
    for number in range(count):
        mine = starts[number * CHOICES : (number + 1) * CHOICES]
        choices = [" ".join(words[start : start + 8]) for start in mine]
        answer = drawn.randrange(CHOICES)
        choices[0], choices[answer] = choices[answer], choices[0]
        rows.append({"prompt": " ".join(words[mine[0] - 30 : mine[0]]), "choices": choices, "answer": answer})
    data = work / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (work / f"{NAME}.yaml").write_text(TASK.format(name=NAME, data=data.resolve()), encoding="utf-8")


def evaluated_inside(arguments: argparse.Namespace) -> dict[str, Any]:
    """In this process, on our engine."""
    import lm_eval.models  # noqa: F401 lists lm-eval's own models, which it does only as long as nothing else is listed

    from quantlab.evaluation.lm_eval_model import QuantlabLM

    settings = {"threads": arguments.threads, "activations": arguments.activations, "kv": arguments.kv}
    return evaluated(QuantlabLM(str(arguments.model), **settings), None, arguments.work)


def evaluated_outside(arguments: argparse.Namespace) -> dict[str, Any]:
    """Through a server, by lm-eval's own client."""
    options = ("--activations", arguments.activations, "--kv", arguments.kv, "--threads", str(arguments.threads))
    with served(arguments.model, *options) as server:
        given = {
            "model": arguments.model.resolve().name,
            "base_url": f"http://127.0.0.1:{server.port}/v1/completions",
            "tokenizer": str(arguments.model),
            "add_bos_token": True,  # token ids are taken as they are, and a text begins with the start token
            "num_concurrent": arguments.concurrent,
            "max_length": server_context(server.port),
        }
        told = ",".join(f"{name}={value}" for name, value in given.items())
        return evaluated("local-completions", told, arguments.work)


def server_context(port: int) -> int:
    """Tokens of a request."""
    import urllib.request

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as reply:
        return int(json.load(reply)["data"][0]["context_length"])


def evaluated(model: Any, given: str | None, work: Path) -> dict[str, Any]:
    """Metrics, and the log-likelihoods of every question's choices."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(work), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=model, model_args=given, tasks=[NAME], task_manager=manager, log_samples=True, bootstrap_iters=0
    )
    samples = sorted(found["samples"][NAME], key=lambda sample: sample["doc_id"])
    scores = [[(float(value), bool(greedy)) for value, greedy in sample["filtered_resps"]] for sample in samples]
    return {"metrics": found["results"][NAME], "scores": scores}


def compared(inside: dict[str, Any], outside: dict[str, Any]) -> dict[str, Any]:
    """What differs, and by how much."""
    pairs = [
        (one, other)
        for mine, theirs in zip(inside["scores"], outside["scores"], strict=True)
        for one, other in zip(mine, theirs, strict=True)
    ]
    metrics = ("acc,none", "acc_norm,none")
    return {
        "questions": len(inside["scores"]),
        "log_likelihoods": len(pairs),
        "largest_difference": max(abs(one[0] - other[0]) for one, other in pairs),
        "greedy_flags_that_differ": sum(one[1] != other[1] for one, other in pairs),
        "in_process": {name: inside["metrics"][name] for name in metrics},
        "served": {name: outside["metrics"][name] for name in metrics},
    }


if __name__ == "__main__":
    main()
