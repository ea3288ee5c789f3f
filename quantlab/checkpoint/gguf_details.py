"""What each model type says beside its sizes (rotary embedding, sliding windows, soft caps, biases), both ways.

`Draft` collects GGUF metadata from a config.json, `Found` makes a config.json from metadata and tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from quantlab.checkpoint.checked_values import CheckedValues, shortest
from quantlab.checkpoint.gguf_architectures import ModelRow
from quantlab.checkpoint.gguf_sizes import Shapes, Sizes, config_of_sizes, gguf_of_sizes
from quantlab.checkpoint.rope import (
    KEEP_FOLDER,
    gguf_of_rope,
    parameters_of_rope,
    rope_of_config,
    rope_of_gguf,
    ropes_by_layer_type,
)
from quantlab.errors import InputError

SLIDING, FULL = "sliding_attention", "full_attention"
WINDOW, PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
# Gemma's 27B models scale queries by the hidden size per head, the others by the head's width; llama.cpp tells them by
# their number of layers.
GEMMA_27B_BLOCKS = {"gemma2": 46, "gemma3_text": 62}
GEMMA_PATTERN = {"gemma2": 2, "gemma3_text": 6}  # every how-manieth layer has full attention, where nothing is said
FILE_TYPES = {0: "float32", 1: "float16", 32: "bfloat16"}  # general.file_type of files that are not quantized


# ---- config.json -> GGUF


@dataclass
class Draft:
    """Metadata in the making, keys without the architecture."""

    row: ModelRow
    values: CheckedValues
    sizes: Sizes
    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    local_theta: float = 0.0

    def fill(self) -> None:
        """Collect everything.

        Raises:
            InputError: a value is wrong, or llama.cpp would compute something else.
        """
        self._check_graph()
        self.metadata |= gguf_of_sizes(self.sizes, self.row)
        self._add_rope()
        if self.row.model_type in _ADDITIONS:
            _ADDITIONS[self.row.model_type](self)

    def _check_graph(self) -> None:
        activation = self.values.text(self.row.activation)
        if activation not in self.row.activations:
            raise self.values.refusal(self.row.activation, f"one of {', '.join(self.row.activations)}", KEEP_FOLDER)
        for key, value in self.row.must.items():
            if self.values.flag(key) != value:
                raise self.values.refusal(key, str(value).lower(), KEEP_FOLDER)

    def _add_rope(self) -> None:
        use, sizes = self.row.rope, self.sizes
        if use is None:
            return
        if self.row.model_type == "gemma3_text":
            rope, local = ropes_by_layer_type(self.values, use, sizes.head_dim, sizes.context)
            self.local_theta = local.theta
        else:
            rope = rope_of_config(self.values, use, sizes.head_dim, sizes.context)
        if self.row.architecture == "llama" or use.partial:
            self.metadata["rope.dimension_count"] = rope.dims
        metadata, self.tensors = gguf_of_rope(rope, use)
        self.metadata |= metadata
        if len(self.tensors) == 2:
            self.notes.append(
                "longrope: llama.cpp takes the long factors for any text once its context is above "
                f"{rope.original_context} tokens; transformers goes by the text's length"
            )

    def window(self) -> int:
        """The sliding window; 0 for none."""
        return 0 if self.values.get("sliding_window") is None else self.values.integer("sliding_window")

    def sliding_layers(self, usual: list[bool]) -> list[bool]:
        """Which layers have a sliding window: as `layer_types` says, or else as usual."""
        types = self.values.get("layer_types")
        if types is None:
            return usual
        if not isinstance(types, list) or len(types) != self.sizes.blocks or not {*map(str, types)} <= {SLIDING, FULL}:
            raise self.values.fault("layer_types", f"is no list of {self.sizes.blocks} times {SLIDING} or {FULL}")
        return [kind == SLIDING for kind in types]

    def note_window(self, window: int) -> None:
        """llama.cpp has no sliding window in this graph; the key is for our own way back."""
        if window < self.sizes.context:
            self.notes.append(f"sliding_window: llama.cpp ignores it here, so texts above {window} tokens differ there")


def _add_neox(draft: Draft) -> None:
    draft.metadata["use_parallel_residual"] = draft.values.flag("use_parallel_residual")


def _add_mistral(draft: Draft) -> None:
    window = draft.window()
    if window:
        draft.metadata[WINDOW] = window
        draft.note_window(window)


def _add_qwen(draft: Draft) -> None:
    window = draft.window() if draft.values.flag("use_sliding_window") else 0
    first = draft.values.integer("max_window_layers", least=0) if window else 0
    sliding = draft.sliding_layers([window > 0 and layer >= first for layer in range(draft.sizes.blocks)])
    if not any(sliding):
        return
    if not window:
        raise draft.values.fault("layer_types", f"has {SLIDING}, and there is no sliding window")
    draft.metadata |= {WINDOW: window, PATTERN: sliding}
    draft.note_window(window)


def _add_phi3(draft: Draft) -> None:
    window, original = draft.window(), draft.values.integer("original_max_position_embeddings")
    draft.metadata |= {WINDOW: window, "rope.scaling.original_context_length": original}
    if window:
        draft.note_window(window)


def _add_gemma(draft: Draft) -> None:
    values, sizes, model_type = draft.values, draft.sizes, draft.row.model_type
    scale = _query_scale(model_type, sizes)
    if values.number("query_pre_attn_scalar") != scale:
        raise values.refusal("query_pre_attn_scalar", f"{scale}, which llama.cpp takes for these sizes", KEEP_FOLDER)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if model_type == "gemma2" or (key.startswith("final") and values.get(key) is not None):
            draft.metadata[key] = values.number(key)
    usual = every = GEMMA_PATTERN[model_type]
    if model_type == "gemma3_text" and values.get("layer_types") is None:
        usual = values.integer("sliding_window_pattern")
    sliding = draft.sliding_layers(_every(usual, sizes.blocks))
    if any(sliding) and not draft.window():
        raise values.refusal("sliding_window", "a number of tokens")
    if model_type == "gemma2" and not any(sliding):
        raise values.fault("layer_types", f"has no {SLIDING}", KEEP_FOLDER)  # llama.cpp's loader stops at an assertion
    if any(sliding):
        draft.metadata[WINDOW] = draft.window()
        if sliding != _every(every, sizes.blocks):
            draft.metadata[PATTERN] = sliding
        if draft.local_theta:
            draft.metadata["rope.freq_base_swa"] = draft.local_theta


_ADDITIONS: dict[str, Callable[[Draft], None]] = {
    "gpt_neox": _add_neox,
    "mistral": _add_mistral,
    "qwen2": _add_qwen,
    "qwen3": _add_qwen,
    "phi3": _add_phi3,
    "gemma2": _add_gemma,
    "gemma3_text": _add_gemma,
}


def _query_scale(model_type: str, sizes: Sizes) -> int:
    is_27b = sizes.blocks == GEMMA_27B_BLOCKS[model_type]
    return sizes.width // sizes.heads if is_27b else sizes.head_dim


def _every(pattern: int, blocks: int) -> list[bool]:
    """Sliding layers, where each `pattern`-th is full; 0: none is."""
    return [pattern == 0 or (layer + 1) % pattern != 0 for layer in range(blocks)]


# ---- GGUF -> config.json


@dataclass(frozen=True)
class Found:
    """A file's architecture metadata and tensors, sizes already checked."""

    row: ModelRow
    values: CheckedValues
    sizes: Sizes
    shapes: Shapes
    read: Callable[[str], np.ndarray]

    @property
    def rows(self) -> int:
        """Of the embedding."""
        return self.shapes["token_embd.weight"][0]

    def config(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """A config like the one that the file was written from."""
        row, sizes = self.row, self.sizes
        config = {"model_type": row.model_type, "architectures": [row.model_class]} | config_of_sizes(sizes, row)
        config |= {row.activation: row.defaults[row.activation]} | self.biases() | self._rotary() | self._more()
        config |= {
            "vocab_size": self.rows,
            "tie_word_embeddings": "output.weight" not in self.shapes,
            "dtype": FILE_TYPES.get(_plain_int(metadata.get("general.file_type")), "float32"),
        }
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
            token = _plain_int(metadata.get(f"tokenizer.ggml.{theirs}_token_id"))
            config[f"{ours}_token_id"] = token if 0 <= token < self.rows else None
        return config

    def biases(self) -> dict[str, bool]:
        """Llama's two flags, from the tensors."""
        if self.row.architecture != "llama":
            return {}
        flags = {}
        for flag, names in (
            ("attention_bias", ("attn_q", "attn_k", "attn_v", "attn_output")),
            ("mlp_bias", ("ffn_gate", "ffn_up", "ffn_down")),
        ):
            has = {f"blk.0.{name}.bias" in self.shapes for name in names}
            if len(has) > 1 or (has == {True} and self.row.model_type == "mistral"):
                raise InputError(f"{self.values.source}: transformers has no {self.row.model_type} with such biases")
            flags[flag] = has.pop()
        return flags if self.row.model_type == "llama" else {}

    def _rotary(self) -> dict[str, Any]:
        use, sizes = self.row.rope, self.sizes
        if use is None:
            return {}
        rope = rope_of_gguf(self.values, use, sizes.head_dim, sizes.context, self.shapes, self.read)
        if self.values.integer("rope.dimension_count_swa", rope.dims) != rope.dims:
            raise self.values.refusal("rope.dimension_count_swa", f"{rope.dims}, as in other layers")
        parameters = parameters_of_rope(rope, use, sizes.head_dim, sizes.context)
        if self.row.model_type == "gemma3_text":
            theta = shortest(self.values.number("rope.freq_base_swa", 10000.0))
            parameters = {FULL: parameters, SLIDING: {"rope_type": "default", "rope_theta": theta}}
        elif self.row.model_type == "gemma2" and self.values.number("rope.freq_base_swa", rope.theta) != rope.theta:
            raise self.values.refusal("rope.freq_base_swa", f"{rope.theta:g}, as in other layers")
        return {"rope_parameters": parameters}

    def _more(self) -> dict[str, Any]:
        """What some model types have beside."""
        values, model_type = self.values, self.row.model_type
        if model_type == "gpt_neox":
            return {"use_parallel_residual": values.flag("use_parallel_residual")}
        if model_type == "mistral":
            return {"sliding_window": values.integer(WINDOW)}
        if model_type == "phi3":
            original = values.integer("rope.scaling.original_context_length", self.sizes.context)
            window = values.integer(WINDOW, 0, least=0) or None
            return {"sliding_window": window, "original_max_position_embeddings": original}
        if model_type in ("qwen2", "qwen3") and values.has(PATTERN):  # llama.cpp reads neither; both are ours
            types = self._layer_types(0)
            return {"use_sliding_window": True, "sliding_window": values.integer(WINDOW), "layer_types": types}
        return self._gemma() if model_type in GEMMA_PATTERN else {}

    def _gemma(self) -> dict[str, Any]:
        values, model_type = self.values, self.row.model_type
        found: dict[str, Any] = {"query_pre_attn_scalar": _query_scale(model_type, self.sizes)}
        if model_type == "gemma2":
            window = values.integer(WINDOW, 4096)
            found["attn_logit_softcapping"] = shortest(values.number("attn_logit_softcapping", 50.0))
            found["final_logit_softcapping"] = shortest(values.number("final_logit_softcapping", 30.0))
        else:
            window = values.integer(WINDOW, 0, least=0)
            if values.has("final_logit_softcapping"):
                found["final_logit_softcapping"] = shortest(values.number("final_logit_softcapping"))
        types = self._layer_types(GEMMA_PATTERN[model_type]) if window else [FULL] * self.sizes.blocks
        # transformers makes a mask for the window even where no layer has one
        return found | {"sliding_window": window or self.sizes.context, "layer_types": types}

    def _layer_types(self, usual: int) -> list[str]:
        """From the pattern: a list of which layers slide, or every how-manieth does not."""
        found, blocks = self.values.get(PATTERN, usual), self.sizes.blocks
        if isinstance(found, np.ndarray):
            found = found.tolist()
        if type(found) is int and found >= 0:
            found = _every(found, blocks)
        if not isinstance(found, list) or len(found) != blocks or not {*map(type, found)} <= {bool, int}:
            raise self.values.refusal(PATTERN, f"one true or false for each of {blocks} layers")
        return [SLIDING if slides else FULL for slides in found]


def _plain_int(value: object) -> int:
    """-1 for what is none."""
    return value if type(value) is int else -1
