"""What speculation makes of decoding: copied text against prose, with the same tokens.

    python benchmarks/speculation.py WORK_FOLDER [--rounds 9] [--threads 2] [--generate 200] [--large tiny|200m|1b|none]
        [--processor-time] [--prose-seeds 0 1 2] [--json FILE]

fable-9m and a Llama shape with random weights, made once in WORK_FOLDER, both in Q4_1, decode each text with
`--speculation off` and `auto` in turns, the first one alternating, after a round that is not counted. Each round checks
that the tokens are the same. The ratio is the median of the rounds' ratios of decoding speeds, with the least and the
most.

- quoted: the output repeats a passage of the prompt, by a constraint that allows nothing else and offers no drafts:
  what an answer quoted from a context is for prompt lookup, from a model that needs no skill to give it.
- repeating: greedy, a prompt that repeats itself (fable-9m goes on doing so).
- prose: sampled at temperature 0.8 (fable-9m), or from the random model, with several seeds.
- draft model: float fable-9m, drafted by its own Q4_1; told, no gate.

`--processor-time` counts the seconds of the process instead, for one thread on a machine that does other work.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from calibration_speed import processor
from quantize_speed import CONFIG, make_model
from quantlab.cli.console import print_table

from quantlab import load_engine, load_tokenizer, native, quantize_checkpoint
from quantlab.generation.drafters import speculation_for
from quantlab.generation.native_engine import NativeEngine
from quantlab.generation.sampling import SamplingParams

FABLE = Path(__file__).parents[1] / "models" / "fable-9m"
QUOTED, PROSE = 1.5, 0.97  # gates: x plain decoding, at least
SMALLER = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16, "num_attention_heads": 16}
LARGE = {"tiny": {**SMALLER, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4},
         "200m": SMALLER, "1b": {}}  # fmt: skip
PASSAGE = (
    "The ferry leaves the east harbour at half past six in the morning and comes back at nine. A ticket costs four "
    "coins for grown people and two for children; dogs and small boats ride for nothing. In winter, when the river "
    "freezes, the keeper of the lighthouse rings a bell three times and the ferry stays where it is."
)
QUESTION = " Question: what does the notice say? Answer:"
REPEATING = "The cat sat on the mat and looked at the dog. " * 4
OPENING = "Once upon a time there was a little girl who lived near the river. One morning she found"


class Copying:
    """Allows one token after another of a text."""

    def __init__(self, text: Sequence[int], vocabulary: int) -> None:
        self._text, self._place, self._mask = text, 0, np.zeros(vocabulary, bool)

    @property
    def finished(self) -> bool:
        return self._place == len(self._text)

    def allowed(self) -> np.ndarray:
        self._mask[:] = False
        self._mask[self._text[self._place]] = True
        return self._mask

    def take(self, token: int) -> None:
        self._place += 1


@dataclass(frozen=True)
class Case:
    """A text to be written; `gate` is the least ratio, 0 for none."""

    name: str
    engine: NativeEngine
    prompt: list[int]
    params: SamplingParams
    gate: float
    quoted: tuple[int, ...] = ()
    draft: NativeEngine | None = None


@dataclass(frozen=True)
class Run:
    """Tokens a second, and what was drafted."""

    speed: float
    drafted: int
    accepted: int


def main() -> None:
    """Parse, make what is missing, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=native.default_threads())
    parser.add_argument("--generate", type=int, default=200)
    parser.add_argument("--large", choices=(*LARGE, "none"), default="200m")
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--prose-seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    clock = time.process_time if arguments.processor_time else time.perf_counter
    found = [(case, measured(case, arguments, clock)) for case in cases(arguments)]
    rows, told = [], []
    for case, pairs in found:
        ratios = [fast.speed / plain.speed for plain, fast in pairs]
        rows.append(row(case, pairs, ratios))
        runs = [{"off": asdict(plain), "auto": asdict(fast)} for plain, fast in pairs]
        told.append({"name": case.name, "gate": case.gate, "ratios": ratios, "runs": runs})
    columns = ("text", "off, tokens/s", "auto, tokens/s", "ratio (least to most)", "accepted of drafted", "gate")
    print_table(columns, rows)
    seconds = "processor time" if arguments.processor_time else "time"
    machine = f"kernel {native.cpu_kernel()}; {processor()}, {os.cpu_count()} cores, {arguments.threads} threads"
    print(f"\n{arguments.rounds} rounds of {arguments.generate} tokens at most, {seconds}; {machine}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"cases": told, "machine": machine, "seconds": seconds}, indent=2) + "\n")


def cases(arguments: argparse.Namespace) -> list[Case]:
    """Of both models."""
    small, tokenizer = engine_of(arguments, FABLE, "fable"), load_tokenizer(FABLE)
    quote = tuple(tokenizer.encode(PASSAGE, add_special_tokens=False))
    greedy = SamplingParams(temperature=0)
    asked = tokenizer.encode(PASSAGE + QUESTION)
    found = [
        Case("fable-9m, quoted", small, asked, greedy, QUOTED, quote),
        Case("fable-9m, repeating", small, tokenizer.encode(REPEATING), greedy, QUOTED),
        *(
            Case(f"fable-9m, prose, seed {seed}", small, tokenizer.encode(OPENING), SamplingParams(seed=seed), PROSE)
            for seed in arguments.prose_seeds
        ),
    ]
    original = load_engine(FABLE, threads=arguments.threads, context=1024)
    drawn = SamplingParams(seed=0)
    found.append(Case("float fable-9m, Q4_1 drafts", original, tokenizer.encode(OPENING), drawn, 0, draft=small))
    if arguments.large != "none":
        source = arguments.work / f"random-{arguments.large}"
        if not source.exists():
            make_model(source, {**CONFIG, **LARGE[arguments.large]})
        large = engine_of(arguments, source, source.name)
        found.append(Case(f"random {arguments.large}, quoted", large, asked, greedy, QUOTED, quote))
        ids = np.random.default_rng(0).integers(3, large.vocabulary, 100).tolist()
        hot = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
        found.append(Case(f"random {arguments.large}, prose", large, ids, hot, PROSE))
    return found


def engine_of(arguments: argparse.Namespace, source: Path, name: str) -> NativeEngine:
    """In Q4_1, which is made where it is missing."""
    packed = arguments.work / f"{name}-q4_1"
    if not packed.exists():
        packed.parent.mkdir(parents=True, exist_ok=True)
        quantize_checkpoint(source, packed, format="q4_1")
    return load_engine(packed, threads=arguments.threads, context=1024)


def measured(case: Case, arguments: argparse.Namespace, clock: Callable[[], float]) -> list[tuple[Run, Run]]:
    """Plain and speculating runs of each round.

    Raises:
        SystemExit: the tokens differ.
    """
    pairs = []
    for index in range(arguments.rounds + 1):
        modes = ("off", "auto") if index % 2 else ("auto", "off")
        runs, texts = {}, []
        for mode in modes:
            runs[mode], tokens = one_run(case, mode, arguments.generate, clock)
            texts.append(tokens)
        if texts[0] != texts[1]:
            raise SystemExit(f"error: {case.name}: speculation changed the text")
        if index:
            pairs.append((runs["off"], runs["auto"]))
    return pairs


def one_run(case: Case, mode: str, count: int, clock: Callable[[], float]) -> tuple[Run, list[int]]:
    """Decoding alone, behind a prefilled prompt, as `complete` does it."""
    engine = case.engine
    constraint = Copying(case.quoted, engine.vocabulary) if case.quoted else None
    draft = case.draft if mode == "auto" else None
    speculation = speculation_for(mode, engine, case.params, len(case.prompt), draft_model=draft)
    engine.prefill(case.prompt)
    started = clock()
    tokens = list(engine.decode(case.params, count, constraint, speculation))
    speed = len(tokens) / (clock() - started)
    counts = (0, 0) if speculation is None else (speculation.drafted, speculation.accepted)
    return Run(speed, *counts), tokens


def row(case: Case, pairs: Sequence[tuple[Run, Run]], ratios: Sequence[float]) -> tuple[str, ...]:
    """Of the table."""
    middle = statistics.median(ratios)
    last = pairs[-1][1]
    return (
        case.name,
        f"{statistics.median(plain.speed for plain, _ in pairs):.1f}",
        f"{statistics.median(fast.speed for _, fast in pairs):.1f}",
        f"{middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        f"{last.accepted} of {last.drafted}",
        f">= {case.gate} {'holds' if middle >= case.gate else 'MISSED'}" if case.gate else "",
    )


if __name__ == "__main__":
    main()
