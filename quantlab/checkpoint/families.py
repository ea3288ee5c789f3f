"""What the files of each model family call things, and how their weights lie: one row per family.

Everything outside this file and `nn/swap.py` sees linear weights as [out, in] under full Hugging Face names.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from quantlab.errors import InputError


@dataclass(frozen=True)
class Family:
    """One family's names. Patterns are shell globs over full tensor names.

    `prefix` is what files saved from the bare model leave out. `transposed` linear weights lie as [in, out] in float
    files (GPT-2's Conv1D). `derived` tensors are buffers that the model computes for itself.
    """

    model_type: str
    prefix: str
    embedding: str
    head: str
    linear: tuple[str, ...]
    transposed: tuple[str, ...] = ()
    derived: tuple[str, ...] = ()
    tied_by_default: bool = False

    def full_name(self, name: str) -> str:
        """The name that the causal language model gives to file tensor `name`."""
        return name if name == self.head or name.startswith(self.prefix) else self.prefix + name

    def is_transposed(self, name: str) -> bool:
        """Whether tensor `name` lies as [in, out] in float files."""
        return _matches(name, self.transposed)

    def is_derived(self, name: str) -> bool:
        """Whether tensor `name` is a buffer that needs no file."""
        return _matches(name, self.derived)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


_GPT2_LINEAR = (
    "transformer.h.*.attn.c_attn.weight",
    "transformer.h.*.attn.c_proj.weight",
    "transformer.h.*.mlp.c_fc.weight",
    "transformer.h.*.mlp.c_proj.weight",
)

FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        Family(
            "gpt2",
            prefix="transformer.",
            embedding="transformer.wte.weight",
            head="lm_head.weight",
            linear=_GPT2_LINEAR,
            transposed=_GPT2_LINEAR,
            derived=("transformer.h.*.attn.bias", "transformer.h.*.attn.masked_bias"),
            tied_by_default=True,
        ),
        Family(
            "llama",
            prefix="model.",
            embedding="model.embed_tokens.weight",
            head="lm_head.weight",
            linear=("model.layers.*.self_attn.?_proj.weight", "model.layers.*.mlp.*_proj.weight"),
            derived=("model.layers.*.self_attn.rotary_emb.inv_freq",),
        ),
    )
}


def family_of(config: dict[str, object], source: str) -> Family:
    """The family of a config.json.

    Raises:
        InputError: `model_type` is missing or none that quantlab reads.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise InputError(f"{source}: names no model_type; is this a language model's config.json?")
    if model_type not in FAMILIES:
        raise InputError(f"{source}: model_type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]
