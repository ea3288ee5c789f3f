"""llama.cpp runs our GGUF files and predicts what we predict; skipped where llama-cpp-python is not installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from quantlab import load_model, load_tokenizer, quantize_checkpoint
from quantlab.checkpoint.export import export_checkpoint
from quantlab.checkpoint.families import FAMILIES

llama_cpp = pytest.importorskip("llama_cpp")

FABLE = Path(__file__).parents[2] / "models" / "fable-9m"
F32 = 0  # ggml's number, here of the KV cache's elements
CLEAR = 0.05  # logits: closer ones may swap places by rounding alone
LN_PERPLEXITY = 0.003  # nats per token; llama.cpp rounds activations to int8 where weights are packed
TOKENS = 256


def llama_logits(path: Path, tokens: list[int]) -> np.ndarray:
    """fp32 [tokens, vocabulary] by llama.cpp, teacher-forced."""
    model = llama_cpp.Llama(
        model_path=str(path), n_ctx=max(len(tokens), 32), n_batch=len(tokens), logits_all=True, type_k=F32, type_v=F32,
        n_threads=1, n_threads_batch=1, verbose=False, flash_attn=False,
    )  # fmt: skip
    model.eval(tokens)
    return np.array(model.scores[: len(tokens)])


def our_logits(path: Path, tokens: list[int]) -> np.ndarray:
    """fp32 [tokens, vocabulary] by transformers on our reader."""
    with torch.inference_mode():
        return load_model(path)(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].numpy()


def nll(logits: np.ndarray, tokens: list[int]) -> float:
    """Mean over all tokens but the first, nats."""
    scores = torch.log_softmax(torch.from_numpy(logits[:-1]).double(), dim=-1)
    return -float(scores.gather(1, torch.tensor(tokens[1:])[:, None]).mean())


def assert_same_argmax(ours: np.ndarray, theirs: np.ndarray) -> None:
    best = np.sort(ours, axis=-1)[:, -2:]
    clear = best[:, 1] - best[:, 0] > CLEAR
    assert clear.mean() > 0.5
    assert (ours.argmax(-1) == theirs.argmax(-1))[clear].all()


@pytest.fixture(scope="module")
def fable_tokens(prose: Path) -> list[int]:
    text = prose.read_text(encoding="utf-8")[:4000]
    return load_tokenizer(FABLE).encode(text)[:TOKENS]


def test_fp32_export_of_the_shipped_model_predicts_the_same(fable_tokens, tmp_path):
    model = load_model(FABLE)  # its fp16 weights as fp32
    model.save_pretrained(tmp_path / "f32")
    export_checkpoint(tmp_path / "f32", tmp_path / "f32.gguf", "gguf")
    ours, theirs = our_logits(tmp_path / "f32", fable_tokens), llama_logits(tmp_path / "f32.gguf", fable_tokens)
    assert_same_argmax(ours, theirs)
    assert abs(nll(ours, fable_tokens) - nll(theirs, fable_tokens)) < 1e-4


@pytest.mark.parametrize("format", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
def test_packed_exports_have_our_perplexity(fable_tokens, format, tmp_path):
    quantize_checkpoint(FABLE, tmp_path / "packed", format=format)
    export_checkpoint(tmp_path / "packed", tmp_path / "packed.gguf", "gguf")
    ours, theirs = our_logits(tmp_path / "packed", fable_tokens), llama_logits(tmp_path / "packed.gguf", fable_tokens)
    assert abs(nll(ours, fable_tokens) - nll(theirs, fable_tokens)) <= LN_PERPLEXITY


def test_a_ternary_export_loads_and_has_our_perplexity(fable_tokens, tmp_path):
    """Rounded without training the model is lost, and its loss far from that of the float model; ours is the same."""
    quantize_checkpoint(FABLE, tmp_path / "packed", format="ternary")
    export_checkpoint(tmp_path / "packed", tmp_path / "packed.gguf", "gguf")
    ours, theirs = our_logits(tmp_path / "packed", fable_tokens), llama_logits(tmp_path / "packed.gguf", fable_tokens)
    assert abs(nll(ours, fable_tokens) - nll(theirs, fable_tokens)) <= LN_PERPLEXITY
    assert np.abs(ours - theirs).max() < 0.05 * np.abs(ours).max()


def test_llama_cpp_tokenizes_the_shipped_model_as_we_do(prose, tmp_path):
    export_checkpoint(FABLE, tmp_path / "fable.gguf", "gguf")
    model = llama_cpp.Llama(model_path=str(tmp_path / "fable.gguf"), vocab_only=True, verbose=False)
    for text in (prose.read_text(encoding="utf-8"), " two  spaces\n\nand lines\n", "\u00e9\u4e2d\U0001f600 12345", ""):
        expected = model.tokenize(text.encode(), add_bos=True, special=False)
        assert load_tokenizer(tmp_path / "fable.gguf").encode(text) == expected
        assert load_tokenizer(FABLE).encode(text) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_exports_of_every_family_predict_the_same(family, make_model, tmp_path):
    tied = FAMILIES[family].tied_by_default
    longer = {"n_positions": 512} if family == "gpt2" else {"max_position_embeddings": 512}
    folder = make_model(tmp_path / "model", family, tied=tied, **longer)
    export_checkpoint(folder, tmp_path / "model.gguf", "gguf")
    tokens = np.random.default_rng(0).integers(3, 512, TOKENS).tolist()
    ours, theirs = our_logits(folder, tokens), llama_logits(tmp_path / "model.gguf", tokens)
    if family == "mistral":  # llama.cpp's graph knows no sliding window here: before it, all is the same
        ours, theirs = ours[:8], theirs[:8]
    assert_same_argmax(ours, theirs)
    assert np.abs(ours - theirs).max() < 0.01 * np.abs(ours).max()
