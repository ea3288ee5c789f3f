"""`quantlab generate --samples`: several texts, one after another."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from quantlab.cli.console import print_json


def show_samples(model: str, prompt: str, samples: int, settings: Mapping[str, Any], json: bool) -> None:
    """Draw them and print them when all are done; with `json` as one object.

    Args:
        settings: the other arguments of `generate_many`.
    """
    from quantlab.generation.samples import generate_many

    result = generate_many(model, prompt, samples, **settings)
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
