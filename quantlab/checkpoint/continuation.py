"""A tokenizer for text that continues a text: without the space that SentencePiece puts before every text."""

from __future__ import annotations

import json
from typing import Any

from quantlab.checkpoint.tokenizer import Tokenizer, parse_tokenizer


def continuing(tokenizer: Tokenizer) -> Tokenizer:
    """The same vocabulary and rules, but text is taken as it is; `tokenizer` itself where it does that already.

    The model generates tokens right behind those of its prompt: what it is to learn must be made the same way.
    """
    description: dict[str, Any] = json.loads(tokenizer.backend.to_str())
    plain = {name: _without_space(description.get(name)) for name in ("normalizer", "pre_tokenizer")}
    if all(plain[name] == description.get(name) for name in plain):
        return tokenizer
    backend = parse_tokenizer(json.dumps({**description, **plain}), "the tokenizer cannot be made to continue a text")
    return Tokenizer(backend, tokenizer.bos, tokenizer.eos)


def _without_space(step: Any) -> Any:  # Any: a part of tokenizer.json
    """A step of the tokenizer that adds nothing in front; None where it did nothing else."""
    if not isinstance(step, dict):
        return step
    for steps in ("normalizers", "pretokenizers"):  # of a sequence
        if steps in step:
            rest = [plain for inner in step[steps] if (plain := _without_space(inner)) is not None]
            return {**step, steps: rest}
    if step["type"] == "Prepend":
        return None
    changed = {"prepend_scheme": "never", "add_prefix_space": False}
    return {**step, **{name: value for name, value in changed.items() if name in step}}
