"""What the files of each model family call things, and how their weights lie: one row per family.

Everything outside this file and `nn/swap.py` sees linear weights as [out, in] under full Hugging Face names. A GGUF
file has names of its own, and three things lie differently in it: the rows of Llama's query and key weights, which its
rotary embedding takes in pairs of neighbours instead of halves; NeoX's joint query, key and value rows, which it does
not interleave by head; Gemma's norm weights, to which it has added 1. Permuting rows leaves packed rows as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np

from quantlab.errors import InputError

RowOrder = Literal["rotary query", "rotary key", "heads of query, key, value"]
Head = Literal["optional", "required", "never"]
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class GgufLayout:
    """How a family lies in GGUF. `stems` are (Hugging Face, GGUF) names without their last part, layers as {}.

    `head` tells what llama.cpp's loader does: it takes an absent head for the embedding ("optional"), demands one even
    where it is tied ("required"), or knows none ("never"). `fp32` are the matrices that it adds up and therefore wants
    in fp32, as it does every vector.
    """

    architecture: str
    stems: tuple[tuple[str, str], ...]
    row_orders: tuple[tuple[str, RowOrder], ...] = ()
    norm_offset: float = 0.0
    head: Head = "optional"
    fp32: tuple[str, ...] = ()


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
    gguf: GgufLayout
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

    def gguf_name(self, name: str) -> str | None:
        """The name in GGUF of tensor `name`; None if it has none there."""
        return _translate(name, dict(self.gguf.stems))

    def name_of_gguf(self, gguf_name: str) -> str | None:
        """The full Hugging Face name of a GGUF tensor; None if the family has no such tensor."""
        return _translate(gguf_name, {theirs: ours for ours, theirs in self.gguf.stems})

    def gguf_rows(self, name: str, rows: int, config: Mapping[str, Any]) -> np.ndarray | None:
        """For a tensor whose rows lie in another order in GGUF: which of ours each of its rows is, int64 [rows].

        Raises:
            InputError: the rows are no whole number of heads.
        """
        for pattern, order in self.gguf.row_orders:
            if fnmatchcase(name, pattern):
                return _row_order(order, name, rows, config)
        return None

    def gguf_offset(self, name: str) -> float:
        """What GGUF's tensor has added to ours."""
        return self.gguf.norm_offset if name.endswith("norm.weight") else 0.0

    def gguf_wants_fp32(self, name: str, dimensions: int) -> bool:
        """Whether llama.cpp computes with this tensor in fp32 only."""
        return dimensions < 2 or name in self.gguf.fp32


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _translate(name: str, stems: dict[str, str]) -> str | None:
    stem, _, last = name.rpartition(".")
    layer = _LAYER.search(stem + ".")
    if layer is not None:
        stem = (stem + ".").replace(layer[0], ".{}.", 1)[:-1]
    translated = stems.get(stem)
    return None if translated is None else f"{translated.format(layer[1] if layer else '')}.{last}"


def _row_order(order: RowOrder, name: str, rows: int, config: Mapping[str, Any]) -> np.ndarray:
    heads = config.get("num_attention_heads")
    if order == "rotary key":
        heads = config.get("num_key_value_heads") or heads
    parts = 3 if order == "heads of query, key, value" else 2
    if type(heads) is not int or heads < 1 or rows % (parts * heads):
        raise InputError(f"{name}: {rows} rows are no whole number of {heads} heads; config.json and weights disagree")
    ours = np.arange(rows, dtype=np.int64).reshape(heads, parts, -1)
    return (ours.swapaxes(1, 2) if parts == 2 else ours.swapaxes(0, 1)).reshape(-1)


_GPT2_LINEAR = (
    "transformer.h.*.attn.c_attn.weight",
    "transformer.h.*.attn.c_proj.weight",
    "transformer.h.*.mlp.c_fc.weight",
    "transformer.h.*.mlp.c_proj.weight",
)


_GPT2_STEMS = (
    ("transformer.wte", "token_embd"),
    ("transformer.wpe", "position_embd"),
    ("transformer.h.{}.ln_1", "blk.{}.attn_norm"),
    ("transformer.h.{}.attn.c_attn", "blk.{}.attn_qkv"),
    ("transformer.h.{}.attn.c_proj", "blk.{}.attn_output"),
    ("transformer.h.{}.ln_2", "blk.{}.ffn_norm"),
    ("transformer.h.{}.mlp.c_fc", "blk.{}.ffn_up"),
    ("transformer.h.{}.mlp.c_proj", "blk.{}.ffn_down"),
    ("transformer.ln_f", "output_norm"),
    ("lm_head", "output"),
)
_NEOX_STEMS = (
    ("gpt_neox.embed_in", "token_embd"),
    ("gpt_neox.layers.{}.input_layernorm", "blk.{}.attn_norm"),
    ("gpt_neox.layers.{}.attention.query_key_value", "blk.{}.attn_qkv"),
    ("gpt_neox.layers.{}.attention.dense", "blk.{}.attn_output"),
    ("gpt_neox.layers.{}.post_attention_layernorm", "blk.{}.ffn_norm"),
    ("gpt_neox.layers.{}.mlp.dense_h_to_4h", "blk.{}.ffn_up"),
    ("gpt_neox.layers.{}.mlp.dense_4h_to_h", "blk.{}.ffn_down"),
    ("gpt_neox.final_layer_norm", "output_norm"),
    ("lm_head", "output"),
)
_LLAMA_STEMS = (
    ("model.embed_tokens", "token_embd"),
    ("model.layers.{}.input_layernorm", "blk.{}.attn_norm"),
    ("model.layers.{}.self_attn.q_proj", "blk.{}.attn_q"),
    ("model.layers.{}.self_attn.k_proj", "blk.{}.attn_k"),
    ("model.layers.{}.self_attn.v_proj", "blk.{}.attn_v"),
    ("model.layers.{}.self_attn.o_proj", "blk.{}.attn_output"),
    ("model.layers.{}.post_attention_layernorm", "blk.{}.ffn_norm"),
    ("model.layers.{}.mlp.gate_proj", "blk.{}.ffn_gate"),
    ("model.layers.{}.mlp.up_proj", "blk.{}.ffn_up"),
    ("model.layers.{}.mlp.down_proj", "blk.{}.ffn_down"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
)
_HEAD_NORM_STEMS = (
    ("model.layers.{}.self_attn.q_norm", "blk.{}.attn_q_norm"),
    ("model.layers.{}.self_attn.k_norm", "blk.{}.attn_k_norm"),
)
_PHI3_STEMS = (
    ("model.layers.{}.self_attn.qkv_proj", "blk.{}.attn_qkv"),
    ("model.layers.{}.mlp.gate_up_proj", "blk.{}.ffn_up"),
)
_GEMMA2_STEMS = (
    ("model.layers.{}.post_attention_layernorm", "blk.{}.post_attention_norm"),
    ("model.layers.{}.pre_feedforward_layernorm", "blk.{}.ffn_norm"),
    ("model.layers.{}.post_feedforward_layernorm", "blk.{}.post_ffw_norm"),
)
_ROTARY_ROWS: tuple[tuple[str, RowOrder], ...] = (
    ("model.layers.*.self_attn.q_proj.*", "rotary query"),
    ("model.layers.*.self_attn.k_proj.*", "rotary key"),
)


def _llama_stems(*others: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    """Llama's names, with those that a family adds or calls differently."""
    return tuple((dict(_LLAMA_STEMS) | dict(others)).items())


def _llama_like(model_type: str, gguf: GgufLayout, tied_by_default: bool = False) -> Family:
    """Families that took over Llama's names; what they add (biases, norms) is neither linear nor in the vocabulary."""
    return Family(
        model_type,
        prefix="model.",
        embedding="model.embed_tokens.weight",
        head="lm_head.weight",
        linear=("model.layers.*.self_attn.*_proj.weight", "model.layers.*.mlp.*_proj.weight"),
        gguf=gguf,
        derived=("model.layers.*.self_attn.rotary_emb.inv_freq",),
        tied_by_default=tied_by_default,
    )


_LLAMA_LAYOUT = GgufLayout("llama", _LLAMA_STEMS, row_orders=_ROTARY_ROWS)
_GEMMA3_STEMS = _llama_stems(*_GEMMA2_STEMS, *_HEAD_NORM_STEMS)

FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        Family(
            "gpt2",
            prefix="transformer.",
            embedding="transformer.wte.weight",
            head="lm_head.weight",
            linear=_GPT2_LINEAR,
            gguf=GgufLayout("gpt2", _GPT2_STEMS, fp32=("transformer.wpe.weight",)),
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
            gguf=GgufLayout(
                "gptneox",
                _NEOX_STEMS,
                row_orders=(("gpt_neox.layers.*.query_key_value.*", "heads of query, key, value"),),
                head="required",
            ),
            derived=(
                "gpt_neox.layers.*.attention.bias",
                "gpt_neox.layers.*.attention.masked_bias",
                "gpt_neox.layers.*.attention.rotary_emb.inv_freq",
            ),
            aliases=(("embed_out.weight", "lm_head.weight"),),
        ),
        _llama_like("llama", _LLAMA_LAYOUT),
        _llama_like("mistral", _LLAMA_LAYOUT),
        _llama_like("qwen2", GgufLayout("qwen2", _LLAMA_STEMS)),
        _llama_like("qwen3", GgufLayout("qwen3", _llama_stems(*_HEAD_NORM_STEMS))),
        _llama_like("phi3", GgufLayout("phi3", _llama_stems(*_PHI3_STEMS))),
        _llama_like(
            "gemma2",
            GgufLayout("gemma2", _llama_stems(*_GEMMA2_STEMS), norm_offset=1.0, head="never"),
            tied_by_default=True,
        ),
        _llama_like("gemma3_text", GgufLayout("gemma3", _GEMMA3_STEMS, norm_offset=1.0), tied_by_default=True),
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
