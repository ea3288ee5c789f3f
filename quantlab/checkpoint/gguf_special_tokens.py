"""Which tokens of a GGUF vocabulary stand for no text: by type, by id, and by the spellings that llama.cpp knows.

https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp, `llama_vocab::impl::load`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from quantlab.checkpoint.gguf_values import VocabularyValues

# Values of tokenizer.ggml.token_type.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

ID_KEYS = {
    name: f"tokenizer.ggml.{key}_token_id"
    for name, key in {
        "bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "unk": "unknown", "pad": "padding",
        "sep": "seperator", "mask": "mask", "fim_pre": "fim_pre", "fim_suf": "fim_suf", "fim_mid": "fim_mid",
        "fim_pad": "fim_pad", "fim_rep": "fim_rep", "fim_sep": "fim_sep",
    }.items()
}  # fmt: skip
OLD_ID_KEYS = {"prefix": "fim_pre", "suffix": "fim_suf", "middle": "fim_mid"}

# Spellings of the tokens around a gap to be filled, for vocabularies that do not name their ids.
GAP_SPELLINGS = {
    "fim_pre": (
        "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<\uff5cfim\u2581begin\uff5c>", "<PRE>", "\u2581<PRE>",
        "<|code_prefix|>", "<|prefix|>",
    ),
    "fim_suf": (
        "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<\uff5cfim\u2581hole\uff5c>", "<SUF>", "\u2581<SUF>",
        "<|code_suffix|>", "<|suffix|>",
    ),
    "fim_mid": (
        "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<\uff5cfim\u2581end\uff5c>", "<MID>", "\u2581<MID>",
        "<|code_middle|>", "<|middle|>",
    ),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}  # fmt: skip
# Spellings that end a generation wherever they are in a vocabulary.
END_SPELLINGS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~[",
)  # fmt: skip
SHOWN_SPELLINGS = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


@dataclass(frozen=True)
class SpecialTokens:
    """`ids` by name ("bos", "eos", "unk" and so on), those that `ends` a text, and every token's type, corrected."""

    ids: Mapping[str, int]
    ends: frozenset[int]
    types: np.ndarray

    def partitioning(self) -> list[int]:
        """The tokens that are looked for in a text before it is cut into words."""
        return np.flatnonzero(np.isin(self.types, (UNKNOWN, CONTROL, USER_DEFINED))).tolist()


def special_tokens(
    values: VocabularyValues, index: Mapping[str, int], types: np.ndarray, defaults: Mapping[str, int]
) -> SpecialTokens:
    """Read the ids and types that the file states, and add what llama.cpp concludes from spellings.

    `index` maps tokens to ids; `defaults` are the kind's ids, which count where the file states none.

    Raises:
        InputError: an id is none of a token.
    """
    types = types.copy()
    ids = {name: i for name, i in defaults.items() if i < len(types)}
    keys = [*ID_KEYS.items(), *((name, f"tokenizer.ggml.{old}_token_id") for old, name in OLD_ID_KEYS.items())]
    for name, key in keys:
        stated = values.token_id(key, len(types))
        if stated is not None:
            ids[name] = stated
    for name, spellings in GAP_SPELLINGS.items():
        found = [index[spelling] for spelling in spellings if spelling in index]
        if name not in ids and found:
            ids[name] = found[0]
            types[found[0]] = CONTROL
    spelt = {index[spelling] for spelling in END_SPELLINGS if spelling in index}
    types[list(spelt)] = CONTROL
    shown = [index[spelling] for spelling in SHOWN_SPELLINGS if spelling in index]
    types[[i for i in shown if types[i] != CONTROL]] = USER_DEFINED
    named = {ids[name] for name in ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep") if name in ids}
    ends = spelt | named
    _take_back(ends, types, index)
    return SpecialTokens(ids, frozenset(ends), types)


def _take_back(ends: set[int], types: np.ndarray, index: Mapping[str, int]) -> None:
    """Two spellings mean something else in the company of others."""

    def ending(*spellings: str) -> bool:
        return any(index.get(spelling) in ends for spelling in spellings)

    calls = ending("<|call|>", "<|calls|>")
    if calls and ending("<|return|>", "<|flush|>") and ending("<|end|>"):  # it ends a message, not the answer
        ends.remove(index["<|end|>"])
        types[index["<|end|>"]] = USER_DEFINED
    if ending("<|tool_response>", "<|plamo:eos|>") and ending("</s>"):  # it strikes text through
        ends.remove(index["</s>"])
        types[index["</s>"]] = NORMAL
