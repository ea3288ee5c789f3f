"""What a fake-quantized training step costs beside a float one, of the same model on the same tokens.

    python benchmarks/qat_cost.py [--formats q4_1,q4_0,q8_0,ternary] [--activations auto] [--rounds 9] [--hidden 768
        --layers 6 --heads 12 --kv-heads 4 --intermediate 2048 --vocabulary 32000] [--batch-size 4] [--context 256]
        [--dtype float32] [--device cpu] [--threads N] [--json FILE]

A step is what `quantlab qat` computes: the summed next-token loss with its head in parts, backward, and AdamW. Random
weights, random tokens; embedding and head in Q8_0. Sides take turns in every round, the float step first and last, so
that each fake-quantized one is set against the mean of the two around its round. One round warms up. Ratios are medians
over rounds, with the least and the most. `forward` is the loss without gradients.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from adapter_speed import spread
from calibration_speed import processor
from quantlab.cli.console import print_table, quiet_transformers, use_threads

from quantlab.checkpoint.families import family_of
from quantlab.errors import InputError
from quantlab.formats import format_named
from quantlab.nn.swap import fake_quantize_modules
from quantlab.quantization.recipes import default_recipe
from quantlab.training.distillation import Student

GATE = 1.3  # x a float step
FLOAT = "float"
LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Times:
    """Seconds of one side in one round."""

    step: float
    forward: float


class Side:
    """A model with its optimizer."""

    def __init__(self, model: Any, ids: torch.Tensor) -> None:
        self._student, self._ids = Student(model), ids
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)

    def measured(self) -> Times:
        """One step and one forward pass."""
        return Times(self._timed(self._step), self._timed(self._forward))

    def _step(self) -> None:
        self._optimizer.zero_grad()
        (self._student(self._ids, self._ids) / self._ids.numel()).backward()
        self._optimizer.step()

    def _forward(self) -> None:
        with torch.no_grad():
            self._student(self._ids, self._ids)

    def _timed(self, work: Callable[[], None]) -> float:
        self._wait()
        started = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self._ids.device.type != "cpu":
            torch.accelerator.synchronize()


def main() -> None:
    """Parse, measure, print."""
    quiet_transformers()
    arguments = parsed()
    use_threads(arguments.threads)
    sides = made_sides(arguments)
    found: dict[str, list[float]] = {f"{name}, {part}": [] for name in sides if name != FLOAT for part in PARTS}
    floats: list[Times] = []
    for number in range(arguments.rounds + 1):
        before = sides[FLOAT].measured()
        others = {name: side.measured() for name, side in sides.items() if name != FLOAT}
        after = sides[FLOAT].measured()
        if not number:
            continue
        floats += [before, after]
        for name, times in others.items():
            for part in PARTS:
                own, around = getattr(times, part), (getattr(before, part) + getattr(after, part)) / 2
                found[f"{name}, {part}"].append(own / around)
    report(found, floats, arguments)


PARTS = ("step", "forward")


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--formats", type=lambda text: text.split(","), default=["q4_1", "q4_0", "q8_0", "ternary"])
    parser.add_argument("--activations", choices=("auto", "int8", "float"), default="auto")
    parser.add_argument("--rounds", type=int, default=9)
    for option, number in (("hidden", 768), ("layers", 6), ("heads", 12), ("kv-heads", 4), ("intermediate", 2048),
                           ("vocabulary", 32000), ("batch-size", 4), ("context", 256)):  # fmt: skip
        parser.add_argument(f"--{option}", type=int, default=number)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of activations")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def made_sides(arguments: argparse.Namespace) -> dict[str, Side]:
    """The float model and its fake-quantized twins."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=arguments.vocabulary, hidden_size=arguments.hidden, intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers, num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads, max_position_embeddings=arguments.context, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    model = LlamaForCausalLM(config).to(arguments.device).train()
    ids = torch.randint(arguments.vocabulary, (arguments.batch_size, arguments.context)).to(arguments.device)
    sides = {}
    for name in arguments.formats:
        twin = deepcopy(model)
        formats = formats_of(twin, name)
        fake_quantize_modules(twin, formats, activations=arguments.activations, dtype=dtype)
        for full, parameter in twin.named_parameters():
            if full not in formats:
                parameter.data = parameter.data.to(dtype)
        sides[name] = Side(twin, ids)
    return {FLOAT: Side(model.to(dtype), ids), **sides}


def formats_of(model: Any, name: str) -> dict[str, Any]:
    """Formats by tensor name, as `qat --format` chooses them.

    Raises:
        InputError: a row is no whole number of blocks.
    """
    recipe = default_recipe(family_of(model.config.to_dict(), "benchmark"), format_named(name))
    formats = {}
    for full, parameter in model.named_parameters():
        wanted = recipe.format_by_name(full)
        if wanted is None:
            continue
        if not wanted.fits(tuple(parameter.shape)):
            raise InputError(f"{full}: rows of {parameter.shape[1]} weights are no multiple of {wanted.block_size}")
        formats[full] = wanted
    return formats


def report(found: dict[str, list[float]], floats: Sequence[Times], arguments: argparse.Namespace) -> None:
    """Ratios, and the gate on whole steps."""
    rows, said = [], []
    for name, ratios in found.items():
        middle = statistics.median(ratios)
        is_gate = name.endswith("step")
        verdict = f"<= {GATE} {'holds' if middle <= GATE else 'MISSED'}" if is_gate else ""
        rows.append((name, spread(ratios, 3), verdict))
        said.append({"name": name, "ratios": ratios, "median": middle})
    print_table((f"x float, {arguments.activations} activations", "median (least to most)", "gate"), rows)
    steps = [times.step for times in floats]
    machine = f"{processor()}, {arguments.threads} threads, {arguments.device}"
    shape = (f"{arguments.layers} layers of {arguments.hidden}, {arguments.batch_size} x {arguments.context} tokens, "
             f"{arguments.dtype}")  # fmt: skip
    print(f"\nfloat step: {spread(steps, 3)} s; {shape}; {arguments.rounds} rounds; {machine}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"ratios": said, "float_steps": steps, "machine": machine}) + "\n")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
