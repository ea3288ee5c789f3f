"""`quantlab generate --samples`: several texts, printed one after another when all are there."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from itertools import count
from typing import Any

from quantlab.cli.console import print_json, progress


def show_samples(model: str, prompt: str, samples: int, settings: Mapping[str, Any], json: bool) -> None:
    """Draw them, telling on stderr how far that is, and print them when all are done; with `json` as one object.

    Args:
        settings: the other arguments of `generate_many`.
    """
    from quantlab.generation.samples import generate_many

    with progress("drawing", "tokens") as report:
        most = samples * int(settings["max_tokens"])
        drawn = count(1)
        result = generate_many(
            model, prompt, samples, **settings, on_token=lambda *_: report(next(drawn), most, f"{samples} samples")
        )
    if json:
        print_json(result)
        return
    for number, sample in enumerate(result.samples, 1):
        print(f"--- {number} of {samples}, ended by {sample.finish_reason} ---")
        print(sample.text)
    timings = result.timings
    print(
        f"[{result.engine} engine: {timings.prompt_tokens} prompt tokens at {timings.prefill_tokens_per_second:.0f}/s, "
        f"{timings.generated_tokens} generated in all at {timings.decode_tokens_per_second:.1f}/s]",
        file=sys.stderr,
    )
