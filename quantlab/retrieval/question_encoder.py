"""Questions as vectors by numpy: a BERT encoder (Devlin et al. 2019, arXiv 1810.04805) for one text at a time.

It stands for sentence-transformers where a search embeds one question: importing that takes seconds and 300 MB, and
loads torch beside an engine that needs none. It knows BERT with absolute positions, fp32 weights and pooling over
tokens, as all-MiniLM-L6-v2 has them; what it does not know it leaves to sentence-transformers. Whoever uses it compares
its vector of a known text with the one that sentence-transformers gave.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quantlab.checkpoint.json_file import parse_json, read_json
from quantlab.checkpoint.safetensors_file import SafetensorsFile
from quantlab.checkpoint.tokenizer import parse_tokenizer, read_text
from quantlab.errors import InputError, missing_extra

POOLING_MODES = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
MODULES = (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])


@dataclass(frozen=True)
class _Shape:
    layers: int
    heads: int
    epsilon: float
    pooling: str


class QuestionEncoder:
    """A BERT encoder, its weights in fp32; see `question_encoder`."""

    def __init__(self, folder: Path, name: str, shape: _Shape, longest: int) -> None:
        from threadpoolctl import ThreadpoolController

        self.name = name
        self._shape = shape
        self._threads = ThreadpoolController()
        self._file = SafetensorsFile(folder / "model.safetensors")
        self._tokenizer = parse_tokenizer(read_text(folder / "tokenizer.json"), str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(longest)
        self._weights = {
            entry: self._tensor(entry) for entry in self._file.entries if entry.startswith(("encoder.", "embeddings.L"))
        }

    def documents(self, texts: Sequence[str]) -> np.ndarray:
        """As `query`, one by one, fp32 [texts, dimension]: these models embed both alike."""
        return np.stack([self.query(text) for text in texts])

    def query(self, text: str) -> np.ndarray:
        """The vector of unit length, fp32 [dimension]."""
        with self._threads.limit(limits=1, user_api="blas"):  # for so little, threads that wait by spinning only cost
            return self._encoded(text)

    def _encoded(self, text: str) -> np.ndarray:
        hidden = self._embedded(self._tokenizer.encode(text).ids)  # (tokens, dimension)
        for layer in range(self._shape.layers):
            hidden = self._layer(hidden, f"encoder.layer.{layer}.")
        pooled = hidden[0] if self._shape.pooling == "cls" else hidden.mean(axis=0)
        vector: np.ndarray = pooled / max(float(np.linalg.norm(pooled)), 1e-12)
        return vector

    def _embedded(self, ids: Sequence[int]) -> np.ndarray:
        words = np.stack([self._row("embeddings.word_embeddings.weight", token) for token in ids])
        positions = np.stack([self._row("embeddings.position_embeddings.weight", place) for place in range(len(ids))])
        return self._normalized(
            words + positions + self._row("embeddings.token_type_embeddings.weight", 0), "embeddings.LayerNorm"
        )

    def _layer(self, hidden: np.ndarray, name: str) -> np.ndarray:
        query, key, value = (
            self._linear(hidden, f"{name}attention.self.{part}").reshape(len(hidden), self._shape.heads, -1)
            for part in ("query", "key", "value")
        )  # (tokens, heads, width)
        scores = np.einsum("qhw,khw->hqk", query, key) / np.sqrt(np.float32(query.shape[-1]))
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        mixed = np.einsum("hqk,khw->qhw", shares, value).reshape(hidden.shape)
        attended = self._linear(mixed, f"{name}attention.output.dense")
        hidden = self._normalized(hidden + attended, f"{name}attention.output.LayerNorm")
        inner = _gelu(self._linear(hidden, f"{name}intermediate.dense"))
        return self._normalized(hidden + self._linear(inner, f"{name}output.dense"), f"{name}output.LayerNorm")

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        product: np.ndarray = x @ self._weights[f"{name}.weight"].T + self._weights[f"{name}.bias"]
        return product

    def _normalized(self, x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(axis=-1, keepdims=True)
        deviation = np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + np.float32(self._shape.epsilon))
        normalized: np.ndarray = centred / deviation * self._weights[f"{name}.weight"] + self._weights[f"{name}.bias"]
        return normalized

    def _tensor(self, name: str) -> np.ndarray:
        return self._file.read(name).view(np.float32).reshape(self._file.entries[name].shape)

    def _row(self, name: str, row: int) -> np.ndarray:
        """Of a table that is not read as a whole: a question needs a few of its 30,000 rows."""
        out = np.empty(self._file.entries[name].shape[1], dtype=np.float32)
        self._file.read_part(name, row * out.nbytes, out.view(np.uint8))
        return out


def question_encoder(folder: Path, name: str) -> QuestionEncoder | None:
    """The encoder of a sentence-transformers folder; None for a model of another kind, or a broken one."""
    if importlib.util.find_spec("threadpoolctl") is None:
        raise missing_extra("threadpoolctl", "retrieval")
    try:
        shape = _shape(folder)
        if shape is None:
            return None
        longest = read_json(folder / "sentence_bert_config.json").get("max_seq_length")
        if not isinstance(longest, int):
            return None
        encoder = QuestionEncoder(folder, name, shape, longest)
        encoder.query("a")  # which uses every weight
    except (InputError, KeyError, OSError, ValueError, TypeError):  # sentence-transformers will say what is wrong
        return None
    return encoder


def _shape(folder: Path) -> _Shape | None:
    modules: Any = parse_json((folder / "modules.json").read_bytes())  # Any: unchecked JSON
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    config = read_json(folder / "config.json")
    about = folder / "config_sentence_transformers.json"
    pooling = read_json(folder / modules[1]["path"] / "config.json") if kinds in MODULES else {}
    modes = [mode for mode, chosen in pooling.items() if mode.startswith("pooling_mode") and chosen]
    known = (
        kinds in MODULES
        and not modules[0]["path"]
        and not (about.is_file() and any((read_json(about).get("prompts") or {}).values()))
        and len(modes) == 1
        and modes[0] in POOLING_MODES
        and config.get("model_type") == "bert"
        and config.get("hidden_act") == "gelu"
        and config.get("position_embedding_type", "absolute") == "absolute"
        and _is_fp32(folder / "model.safetensors")
    )
    if not known:
        return None
    return _Shape(
        config["num_hidden_layers"],
        config["num_attention_heads"],
        config["layer_norm_eps"],
        POOLING_MODES[modes[0]],
    )


def _is_fp32(file: Path) -> bool:
    opened = SafetensorsFile(file)
    try:
        return {entry.dtype for name, entry in opened.entries.items() if name.endswith("weight")} == {"F32"}
    finally:
        opened.close()


def _gelu(x: np.ndarray) -> np.ndarray:
    """x times the normal distribution's share below x; numpy has no erf.

    Abramowitz and Stegun 1964, 7.1.26: within 1.5e-7.
    """
    z = np.abs(x) / np.sqrt(np.float32(2))
    t = 1 / (1 + np.float32(0.3275911) * z)
    terms = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
    series = np.zeros_like(t)
    for term in terms:
        series = (series + np.float32(term)) * t
    erf = np.sign(x) * (1 - series * np.exp(-z * z))
    product: np.ndarray = x * (1 + erf) / 2
    return product
