"""A free text first, then an answer under a constraint: reasoning, which a schema forbids, and still its output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from quantlab.checkpoint import Tokenizer
from quantlab.checkpoint.continuation import continuing
from quantlab.errors import InputError
from quantlab.generation.constraints import Constraint
from quantlab.generation.engine import Engine
from quantlab.generation.generator import Completion, Timings, complete
from quantlab.generation.text_stream import TextStream

CUE = "\nAnswer: "
BUDGET = 256  # tokens of reasoning


def complete_reasoned(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    constraint: Constraint,
    *,
    cue: str = CUE,
    reasoning_budget: int = BUDGET,
    max_tokens: int = 128,
    stop: Sequence[str] = (),
    on_text: Callable[[str], None] | None = None,
    prompt_logprobs: int | None = None,
    **settings: Any,
) -> Completion:
    """Let the model write until an end token, a stop string or `reasoning_budget` tokens; then put `cue` behind that
    text and generate what the constraint allows.

    Args:
        constraint: of the answer.
        cue: leads over to the answer; a part of neither text.
        max_tokens: of the answer.
        stop: strings that end the reasoning; the answer ends where its constraint has it.
        on_text: is given reasoning, cue and answer as they come.
        settings: of both parts; see `complete`.

    Returns:
        The answer, with the reasoning's text; `token_ids` and `logprobs` are the answer's. Timings are of both.

    Raises:
        InputError: no tokens to reason with, no room to write, or see `complete`.
    """
    if reasoning_budget < 1:
        raise InputError(f"reasoning budget {reasoning_budget}: at least one token is needed")
    prompt_ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    cue_ids = continuing(tokenizer).encode(cue, add_special_tokens=False)
    left = engine.context - len(prompt_ids) - len(cue_ids)
    if left < 2:
        raise InputError(
            f"the prompt has {len(prompt_ids)} tokens and the cue {len(cue_ids)}: a context of {engine.context} leaves "
            "no room to reason and answer"
        )
    room = left - min(max_tokens, left // 2)  # the answer keeps its tokens, or half of what there is
    reasoning = complete(
        engine, tokenizer, prompt_ids, max_tokens=min(reasoning_budget, room), stop=stop, on_text=on_text,
        prompt_logprobs=prompt_logprobs, **settings,
    )  # fmt: skip
    if on_text is not None and cue:
        on_text(cue)
    so_far = [*prompt_ids, *_ids_of(reasoning, tokenizer, prompt_ids), *cue_ids]
    answer = complete(
        engine, tokenizer, so_far, max_tokens=max_tokens, on_text=on_text, constraint=constraint, **settings
    )
    return replace(
        answer,
        reasoning=reasoning.text,
        timings=_joined(reasoning.timings, answer.timings),
        prompt_logprobs=reasoning.prompt_logprobs,
    )


def _ids_of(written: Completion, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> list[int]:
    """The tokens of what was written, without an end token or a stop string, which may end within a token."""
    ids = list(written.token_ids)
    if ids[-1] in tokenizer.eos:
        return ids[:-1]
    if written.finish_reason == "length":
        return ids
    stream, kept, length = TextStream(tokenizer, prompt_ids, (), None), 0, 0
    for count, token in enumerate(ids, 1):
        stream.add(token, is_end=False)
        if len(stream.text) > len(written.text):
            break
        kept, length = count, len(stream.text)
    rest = written.text[length:]
    return ids[:kept] + (continuing(tokenizer).encode(rest, add_special_tokens=False) if rest else [])


def _joined(one: Timings, other: Timings) -> Timings:
    """Of two parts, the second of which goes on where the first ended; the cue's prefill counts as decoding."""
    generated = one.generated_tokens + other.generated_tokens
    seconds = (
        one.generated_tokens / one.decode_tokens_per_second
        + other.generated_tokens / other.decode_tokens_per_second
        + (other.prompt_tokens - other.cached_tokens) / other.prefill_tokens_per_second
    )
    return replace(
        one,
        generated_tokens=generated,
        decode_tokens_per_second=generated / seconds,
        drafted_tokens=one.drafted_tokens + other.drafted_tokens,
        accepted_tokens=one.accepted_tokens + other.accepted_tokens,
    )
