"""What the tests of fine-tuning and quantization-aware training share: rows, and runs that are killed."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from quantlab.checkpoint import load_tokenizer
from quantlab.loading import load_model
from quantlab.training.prepared import DataSettings, prepare_data

SPEAKING = [
    {"prompt": f"The {noun} of number {n} says: ", "completion": f"I am {noun} {n}, and so are {n + 1} more."}
    for n, noun in enumerate(["river", "lamp", "stone", "bell", "road", "tree", "wheel", "door"])
]
COUNTING = [{"prompt": f"Say {n}: ", "completion": f"it is {n} and {n + 1}."} for n in range(30)]


def write_split(folder: Path, rows: Sequence[dict[str, str]], train: int) -> Path:
    """A folder whose train file has the first rows, and its valid file the others."""
    for split, part in (("train", rows[:train]), ("valid", rows[train:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def kill_again_and_again(command: Sequence[str], times: int, fewest: int, most: int) -> None:
    """Start a command that prints a line "step ..." for each, kill it after so many of them, and resume it, and again;
    also in the middle of a save.
    """
    draw, more = random.Random(7), []
    for _ in range(times):
        process = subprocess.Popen([*command, *more], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        steps = draw.randint(fewest, most)
        for line in process.stdout:
            if (steps := steps - line.startswith("step")) <= 0:
                time.sleep(draw.random() / 20)
                process.send_signal(signal.SIGKILL)
                break
        process.wait()
        process.stdout.close()
        more = ["--resume"]


def held_out_loss(folder: Path, data: Path, activations: str) -> float:
    """The written model's own, by transformers' loss of each row."""
    rows = prepare_data(data, load_tokenizer(folder), None, DataSettings(context=64)).valid
    model, total, count = load_model(folder, activations=activations), 0.0, 0
    for row in rows:
        ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum").item()
        count += len(row.trained)
    return total / count
