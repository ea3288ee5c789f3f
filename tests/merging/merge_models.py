"""Tiny checkpoints with tokenizers, written straight as files, and merges of them planned."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from quantlab.checkpoint.reader import open_checkpoint
from quantlab.merging.config import read_config
from quantlab.merging.plan import plan_merge
from quantlab.merging.plan_types import MergePlan, TensorPlan
from quantlab.merging.sources import MergeSource

WIDTH, INNER, LAYERS = 8, 12, 4
LETTERS = ("<s>", "</s>", "a", "b", "c", "d", "e", "f")

_LLAMA = {
    "self_attn.q_proj.weight": (WIDTH, WIDTH),
    "self_attn.k_proj.weight": (4, WIDTH),
    "self_attn.v_proj.weight": (4, WIDTH),
    "self_attn.o_proj.weight": (WIDTH, WIDTH),
    "mlp.gate_proj.weight": (INNER, WIDTH),
    "mlp.up_proj.weight": (INNER, WIDTH),
    "mlp.down_proj.weight": (WIDTH, INNER),
    "input_layernorm.weight": (WIDTH,),
    "post_attention_layernorm.weight": (WIDTH,),
}
LLAMA_BIASES = {f"self_attn.{kind}_proj.bias": (4 if kind in "kv" else WIDTH,) for kind in "qkvo"}
_CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "float32",
}


def llama(
    folder: Path,
    *,
    layers: int = LAYERS,
    tied: bool = False,
    tokens: Sequence[str] | None = LETTERS,
    rows: int | None = None,
    added: Sequence[str] = (),
    merges: Sequence[tuple[str, str]] = (),
    biases: bool = False,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    dtype: type = np.float32,
    files: Mapping[str, object] | None = None,
    seed: int = 0,
    **config: object,
) -> Path:
    """A random model; `tokens` are the tokenizer's ordinary ones (None: there is no tokenizer), `added` come behind."""
    count = rows if rows is not None else len(tokens or LETTERS) + len(added)
    kinds = {**_LLAMA, **(LLAMA_BIASES if biases else {}), **(shapes or {})}
    every = {f"model.layers.{layer}.{kind}": shape for layer in range(layers) for kind, shape in kinds.items()}
    every = {"model.embed_tokens.weight": (count, WIDTH), **every, "model.norm.weight": (WIDTH,)}
    every |= {} if tied else {"lm_head.weight": (count, WIDTH)}
    random = np.random.default_rng(seed)
    folder.mkdir()
    tensors = {name: random.standard_normal(shape).astype(dtype) for name, shape in every.items()}
    save_file(tensors, folder / "model.safetensors")
    own = {"num_hidden_layers": layers, "vocab_size": count, "tie_word_embeddings": tied, "attention_bias": biases}
    (folder / "config.json").write_text(json.dumps({**_CONFIG, **own, **config}))
    if tokens is not None:
        (folder / "tokenizer.json").write_text(tokenizer_json(tokens, added, merges))
    for name, content in (files or {}).items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def tokenizer_json(tokens: Sequence[str], added: Sequence[str] = (), merges: Sequence[tuple[str, str]] = ()) -> str:
    """A BPE over characters; the first two tokens and `added` are special ones."""
    from tokenizers import AddedToken, Tokenizer, models

    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, list(merges)))
    special = [token for token in tokens[:2] if token.startswith("<")]
    backend.add_special_tokens([AddedToken(token, special=True) for token in (*special, *added)])
    return backend.to_str()


def opened_for(text: str) -> tuple:
    """A config, and its models opened."""
    config = read_config(text)
    return config, {each: MergeSource(open_checkpoint(each.model)) for each in config.references}


def planned(text: str) -> MergePlan:
    """The plan of a YAML text."""
    return plan_merge(*opened_for(text))


def by_name(plan: MergePlan) -> dict[str, TensorPlan]:
    """The plan's tensors by the output's names."""
    return {tensor.name: tensor for tensor in plan.tensors}
