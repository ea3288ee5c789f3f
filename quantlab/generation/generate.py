"""A model's name and a prompt in, text out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from quantlab.adapters.combine import Source as AdapterSource
from quantlab.checkpoint import load_tokenizer
from quantlab.errors import InputError
from quantlab.generation.drafters import DRAFT_TOKENS, check_speculation, load_draft_model
from quantlab.generation.engines import open_engine
from quantlab.generation.generator import Completion, complete
from quantlab.generation.grammar_constraint import constraints_of
from quantlab.generation.grammars import Grammar
from quantlab.generation.prompt_cache import PromptCache
from quantlab.generation.reasoned_answer import BUDGET, CUE, complete_reasoned
from quantlab.generation.sampling import SamplingParams


def generate(
    model: str | Path,
    prompt: str | Sequence[int],
    *,
    max_tokens: int = 128,
    params: SamplingParams | None = None,
    stop: Sequence[str] = (),
    on_text: Callable[[str], None] | None = None,
    engine: str = "auto",
    threads: int | None = None,
    adapters: Sequence[AdapterSource] | None = None,
    prompt_cache: PromptCache | None = None,
    grammar: Grammar | None = None,
    then_grammar: Grammar | None = None,
    cue: str = CUE,
    reasoning_budget: int = BUDGET,
    speculation: str = "auto",
    draft_model: str | Path | None = None,
    draft_tokens: int = DRAFT_TOKENS,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
) -> Completion:
    """Load `model` and continue `prompt`; see `complete`.

    Args:
        engine: "auto", "native" or "torch"; see `engines.open_engine`.
        threads: to compute with; by default one a core.
        adapters: low-rank updates to compute beside the weights; see `load_engine`.
        prompt_cache: a folder in which caches of prompts are looked up and kept; the native engine's.
        grammar: what the text has to be; see `grammars`.
        then_grammar: what an answer has to be that comes behind a free text; see `complete_reasoned`.
        cue: between that text and the answer.
        reasoning_budget: tokens of that text.
        draft_model: a smaller model with the same tokenizer.

    Raises:
        InputError: a model or an adapter cannot be loaded, the draft model has another tokenizer, or the prompt or a
            parameter is wrong.
    """
    check_speculation(speculation, draft_tokens, has_draft_model=draft_model is not None)
    if grammar is not None and then_grammar is not None:
        raise InputError(f"{grammar.source} and {then_grammar.source}: the text or the answer is constrained, not both")
    tokenizer = load_tokenizer(model)
    drafting = None if draft_model is None else load_draft_model(draft_model, model, tokenizer, threads)
    loaded = open_engine(model, engine, threads=threads, adapters=adapters, prompt_cache=prompt_cache)
    settings: dict[str, Any] = {
        "max_tokens": max_tokens,
        "params": params,
        "stop": stop,
        "on_text": on_text,
        "speculation": speculation,
        "draft_model": drafting,
        "draft_tokens": draft_tokens,
        "logprobs": logprobs,
        "prompt_logprobs": prompt_logprobs,
    }
    if then_grammar is None:
        constraint = None if grammar is None else constraints_of(grammar, tokenizer, loaded.vocabulary)()
        return complete(loaded, tokenizer, prompt, constraint=constraint, **settings)
    constraint = constraints_of(then_grammar, tokenizer, loaded.vocabulary)()
    return complete_reasoned(
        loaded, tokenizer, prompt, constraint, cue=cue, reasoning_budget=reasoning_budget, **settings
    )
