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

    `prefix` is what files saved from the bare model leave out; `aliases` are (file's, full) names. `transposed` linear
    weights lie as [in, out] in float files (GPT-2's Conv1D). `derived` tensors are buffers that the model computes for
    itself.
    """

    model_type: str
    prefix: str
    embedding: str
    head: str
    linear: tuple[str, ...]
    transposed: tuple[str, ...] = ()
    derived: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    tied_by_default: bool = False

    def full_name(self, name: str) -> str:
        """The name that the causal language model gives to file tensor `name`."""
        name = dict(self.aliases).get(name, name)
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


def _llama_like(model_type: str, tied_by_default: bool = False) -> Family:
    """Families that took over Llama's names; what they add (biases, norms) is neither linear nor in the vocabulary."""
    return Family(
        model_type,
        prefix="model.",
        embedding="model.embed_tokens.weight",
        head="lm_head.weight",
        linear=("model.layers.*.self_attn.*_proj.weight", "model.layers.*.mlp.*_proj.weight"),
        derived=("model.layers.*.self_attn.rotary_emb.inv_freq",),
        tied_by_default=tied_by_default,
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
            "gpt_neox",
            prefix="gpt_neox.",
            embedding="gpt_neox.embed_in.weight",
            head="lm_head.weight",
            linear=(
                "gpt_neox.layers.*.attention.query_key_value.weight",
                "gpt_neox.layers.*.attention.dense.weight",
                "gpt_neox.layers.*.mlp.dense_*.weight",
            ),
            derived=(
                "gpt_neox.layers.*.attention.bias",
                "gpt_neox.layers.*.attention.masked_bias",
                "gpt_neox.layers.*.attention.rotary_emb.inv_freq",
            ),
            aliases=(("embed_out.weight", "lm_head.weight"),),
        ),
        _llama_like("llama"),
        _llama_like("mistral"),
        _llama_like("qwen2"),
        _llama_like("qwen3"),
        _llama_like("phi3"),
        _llama_like("gemma2", tied_by_default=True),
        _llama_like("gemma3_text", tied_by_default=True),
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
