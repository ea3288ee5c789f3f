"""`--show-batch`: samples on the terminal, coloured where they carry loss."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from quantlab.checkpoint import Tokenizer
from quantlab.training.sample import Sample
from quantlab.training.show_batch import BatchTotals, SampleView, Segment, batch_totals, describe_batch

LOSS, NO_LOSS = "bold green", "dim"
SERVING = {True: "same ids as serving", False: "other ids than serving", None: "no prompt"}


@dataclass(frozen=True)
class BatchView:
    """What `--show-batch` shows: some samples, totals of all, and notes."""

    samples: tuple[SampleView, ...]
    totals: BatchTotals
    notes: tuple[str, ...]


def batch_view(samples: Sequence[Sample], tokenizer: Tokenizer, count: int, notes: Sequence[str] = ()) -> BatchView:
    """The first `count` samples, and totals of all."""
    return BatchView(tuple(describe_batch(samples[:count], tokenizer)), batch_totals(samples), tuple(notes))


def print_batch(samples: Sequence[Sample], tokenizer: Tokenizer, count: int) -> None:
    """Show the first `count` samples, and totals of all."""
    view = batch_view(samples, tokenizer, count)
    show_batch(view.samples, view.totals)


def show_batch(views: Sequence[SampleView], totals: BatchTotals) -> None:
    """Print the samples; `totals` are of all the data.

    Without colours (no terminal, or NO_COLOR set) [[double brackets]] enclose what carries loss.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    coloured = console.is_terminal and not os.environ.get("NO_COLOR")
    if coloured:
        console.print(Text.assemble("tokens ", ("with loss", LOSS), ", ", ("without", NO_LOSS)))
    else:
        print("tokens [[with loss]], without")
    for view in views:
        print(f"\n{_heading(view)}")
        if coloured:
            parts = [(_printable(part.text), LOSS if part.trained else NO_LOSS) for part in view.segments]
            console.print(Text.assemble(*parts), soft_wrap=True)
        else:
            print("".join(_bracketed(part) for part in view.segments))
    print(
        f"\n{totals.samples} samples, {totals.tokens} tokens, {totals.trained_tokens} of them with loss; "
        f"the longest has {totals.longest}"
    )


def _heading(view: SampleView) -> str:
    end = "end token trained" if view.ends else "end token NOT trained"
    loss = f"{view.trained_tokens} of {view.tokens} tokens with loss"
    return f"{_printable(view.place)}: {loss}; {end}; {SERVING[view.as_served]}"


def _bracketed(part: Segment) -> str:
    text = _printable(part.text)
    return f"[[{text}]]" if part.trained else text


def _printable(text: str) -> str:
    """Control codes would act on the terminal: they become escapes."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
