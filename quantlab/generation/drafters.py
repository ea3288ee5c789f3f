"""Which drafters a text is written with, from what a user asks for."""

from __future__ import annotations

import logging
from pathlib import Path

from quantlab.checkpoint import Tokenizer, load_tokenizer
from quantlab.checkpoint.same_vocabulary import check_same_vocabulary
from quantlab.errors import InputError
from quantlab.generation.constraints import Constraint, ForcedTokens, Foreseeing
from quantlab.generation.draft_model import DraftModel
from quantlab.generation.drafts import Drafter
from quantlab.generation.engine import Engine
from quantlab.generation.native_engine import NativeEngine, load_native
from quantlab.generation.prompt_lookup import PromptLookup
from quantlab.generation.sampling import SamplingParams
from quantlab.generation.speculation import Speculation

logger = logging.getLogger(__name__)
MODES = ("auto", "lookup", "off")
DRAFT_TOKENS = 15  # at most: 16 tokens a pass


def check_speculation(mode: str, draft_tokens: int, *, has_draft_model: bool) -> None:
    """Refuse what makes no sense.

    Raises:
        InputError: an unknown mode, no draft tokens, or a draft model that the mode does not use.
    """
    if mode not in MODES:
        raise InputError(f"speculation {mode!r}: choose one of: {', '.join(MODES)}")
    if draft_tokens < 1:
        raise InputError(f"{draft_tokens} draft tokens: at least 1 is needed")
    if has_draft_model and mode != "auto":
        raise InputError(f"speculation {mode!r} uses no draft model; leave one of them out")


def load_draft_model(
    draft: str | Path, model: str | Path, tokenizer: Tokenizer, threads: int | None = None
) -> NativeEngine:
    """The engine of a draft model for `model`, whose tokenizer is given.

    Raises:
        InputError: it cannot be loaded, or has another tokenizer.
    """
    rule = "a draft model needs the tokenizer of the model"
    check_same_vocabulary(tokenizer, load_tokenizer(draft), (str(model), str(draft)), rule)
    return load_native(draft, threads=threads)


def speculation_for(
    mode: str,
    engine: Engine,
    params: SamplingParams,
    prompt: int,
    *,
    constraint: Constraint | None = None,
    draft_model: Engine | None = None,
    draft_tokens: int = DRAFT_TOKENS,
) -> Speculation | None:
    """What a text of `prompt` tokens is continued with.

    Args:
        mode: "auto" drafts where that is measured to pay, by prompt lookup, what the constraint forces, and the draft
            model; "lookup" wherever prompt lookup finds anything; "off" never.

    Raises:
        InputError: see `check_speculation`.
    """
    check_speculation(mode, draft_tokens, has_draft_model=draft_model is not None)
    if draft_model is not None and not engine.exact_batches:
        logger.warning("the %s engine does not speculate: the draft model is not used", engine.name)
    if mode == "off" or not engine.exact_batches:
        return None
    drafters: list[Drafter] = [PromptLookup()]
    if mode == "auto" and isinstance(constraint, Foreseeing):
        drafters.insert(0, ForcedTokens(constraint))
    if draft_model is not None:
        drafters.append(DraftModel(draft_model, params, engine.vocabulary, prompt))
    return Speculation(drafters, most=draft_tokens, always=mode == "lookup")
