"""Counts of tokens and speeds, as OpenAI and llama-server tell them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quantlab.generation.generator import Completion


def usage_of(completions: Sequence[Completion], prompts: int = 1) -> dict[str, Any]:
    """OpenAI's counts over the samples of `prompts` prompts; a prompt counts once."""
    firsts = completions[:: len(completions) // prompts]
    prompt = sum(each.timings.prompt_tokens for each in firsts)
    generated = sum(each.timings.generated_tokens for each in completions)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(each.timings.cached_tokens for each in firsts)},
    }


def timings_of(completions: Sequence[Completion], prompts: int = 1) -> dict[str, Any]:
    """llama-server's, over all completions, with `cached_tokens` and `prefill_tokens_per_second` beside them.

    Samples of one prompt that were drawn together share its prefill, and their time is the longest one's.
    """
    per_prompt = len(completions) // prompts
    prompt_n = cached = predicted_n = drafted = accepted = 0
    prompt_seconds = predicted_seconds = 0.0
    for start in range(0, len(completions), per_prompt):
        samples = [each.timings for each in completions[start : start + per_prompt]]
        first = samples[0]
        computed = first.prompt_tokens - first.cached_tokens
        prompt_n, cached = prompt_n + computed, cached + first.cached_tokens
        prompt_seconds += computed / first.prefill_tokens_per_second if first.prefill_tokens_per_second else 0.0
        predicted_n += sum(each.generated_tokens for each in samples)
        predicted_seconds += max(
            each.generated_tokens / each.decode_tokens_per_second if each.decode_tokens_per_second else 0.0
            for each in samples
        )
        drafted += sum(each.drafted_tokens for each in samples)
        accepted += sum(each.accepted_tokens for each in samples)
    told = {
        "cache_n": cached,
        "prompt_n": prompt_n,
        **_speeds("prompt", prompt_n, prompt_seconds),
        "predicted_n": predicted_n,
        **_speeds("predicted", predicted_n, predicted_seconds),
        "cached_tokens": cached,
        "prefill_tokens_per_second": _rate(prompt_n, prompt_seconds),
    }
    return {**told, "draft_n": drafted, "draft_n_accepted": accepted} if drafted else told


def _speeds(name: str, count: int, seconds: float) -> dict[str, float]:
    return {
        f"{name}_ms": round(1000 * seconds, 3),
        f"{name}_per_token_ms": round(1000 * seconds / count, 3) if count else 0.0,
        f"{name}_per_second": _rate(count, seconds),
    }


def _rate(count: int, seconds: float) -> float:
    return round(count / seconds, 3) if seconds else 0.0
