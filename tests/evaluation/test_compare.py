"""Two models on one text: exact zeros for a model with itself, torch's float64 divergence for a quantized one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantlab
from quantlab.errors import InputError
from quantlab.evaluation.compare import compare
from quantlab.evaluation.perplexity import perplexity
from quantlab.training.corpus import read_documents
from quantlab.training.vocabulary import train_sentencepiece

CONTEXT = 64


@pytest.fixture(scope="module")
def text(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short document."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(read_documents(prose)[0][:1200], encoding="utf-8")
    return path


@pytest.fixture
def q4_0(float_model: Path, tmp_path: Path) -> Path:
    """A model's Q4_0."""
    quantlab.quantize_checkpoint(float_model, tmp_path / "q4_0", format="q4_0")
    return tmp_path / "q4_0"


def plain_divergence(model_a, model_b, tokenizer, text: Path) -> tuple[list[torch.Tensor], torch.Tensor]:
    """KL(a || b) of each window's tokens, and whether the first ranks agree: by torch, in float64."""
    ids = tokenizer.encode(text.read_text(encoding="utf-8"))
    divergences, agreements = [], []
    for begin in range(1, len(ids), CONTEXT - 1):
        window = torch.tensor([[ids[0], *ids[begin : begin + CONTEXT - 1]]])
        with torch.inference_mode():
            log_a, log_b = (model(window).logits[0, :-1].double().log_softmax(1) for model in (model_a, model_b))
        divergences.append((log_a.exp() * (log_a - log_b)).sum(1))
        agreements.append(log_a.argmax(1) == log_b.argmax(1))
    return divergences, torch.cat(agreements)


def test_a_model_does_not_diverge_from_itself(float_model: Path, text: Path) -> None:
    """Exactly, in every figure."""
    result = compare(float_model, float_model, text, context=CONTEXT)
    figures = ("kld_mean", "kld_stderr", "kld_median", "kld_p99", "kld_max")
    assert {name: getattr(result, name) for name in figures} == dict.fromkeys(figures, 0.0)
    assert (result.same_top, result.same_top_stderr) == (1.0, 0.0)
    assert result.perplexity_a == result.perplexity_b


def test_divergence_is_torchs_in_float64(float_model: Path, q4_0: Path, float_twin, text: Path) -> None:
    """Of the model and its Q4_0, whose weights gguf decodes, to 1e-6 nats; the first is the reference."""
    original = AutoModelForCausalLM.from_pretrained(float_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(float_model)
    divergences, agreements = plain_divergence(original, float_twin(q4_0), tokenizer, text)
    tokens = torch.cat(divergences)
    mean = tokens.mean().item()
    residuals = torch.stack([window.sum() - mean * len(window) for window in divergences])
    units = len(divergences)
    stderr = (units / (units - 1) * residuals.square().sum()).sqrt().item() / len(tokens)

    result = compare(float_model, q4_0, text, context=CONTEXT)
    assert result.tokens == len(tokens)
    assert mean > 0.001  # the format does change these models
    assert result.kld_mean == pytest.approx(mean, abs=1e-6)
    assert result.kld_stderr == pytest.approx(stderr, abs=1e-6)
    assert result.kld_median == pytest.approx(tokens.quantile(0.5).item(), abs=2e-6)
    assert result.kld_p99 == pytest.approx(tokens.quantile(0.99).item(), abs=1e-5)
    assert result.kld_max == pytest.approx(tokens.max().item(), abs=1e-5)
    share = agreements.double().mean().item()
    assert 0 < share < 1
    assert result.same_top == pytest.approx(share, abs=1e-12)

    backwards, _ = plain_divergence(float_twin(q4_0), original, tokenizer, text)
    assert compare(q4_0, float_model, text, context=CONTEXT).kld_mean == pytest.approx(
        torch.cat(backwards).mean().item(), abs=1e-6
    )


@pytest.mark.parametrize("stride", [None, 20])
def test_perplexities_are_those_of_each_model_alone(
    float_model: Path, q4_0: Path, text: Path, stride: int | None
) -> None:
    """The same windows in the same batches: equal to the last bit."""
    result = compare(float_model, q4_0, text, context=CONTEXT, stride=stride)
    options = {"context": CONTEXT, "stride": stride, "engine": "torch"}
    alone = [perplexity(folder, text, **options) for folder in (float_model, q4_0)]
    assert (result.perplexity_a, result.perplexity_b) == (alone[0].perplexity, alone[1].perplexity)
    assert result.tokens == alone[0].tokens == alone[1].tokens


def test_fewer_bits_diverge_more(llama_model: Path, text: Path, tmp_path: Path) -> None:
    """Q8_0 before Q5_1 before Q4_1."""
    divergences = []
    for format in ("q8_0", "q5_1", "q4_1"):
        quantlab.quantize_checkpoint(llama_model, tmp_path / format, format=format)
        divergences.append(compare(llama_model, tmp_path / format, text, context=CONTEXT).kld_mean)
    assert divergences == sorted(divergences)
    assert divergences[0] > 0


def test_progress_counts_every_token(llama_model: Path, text: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    result = compare(llama_model, llama_model, text, context=16, progress=lambda *state: seen.append(state))
    assert [state[0] for state in seen] == sorted({state[0] for state in seen})
    assert seen[-1] == (result.tokens, result.tokens, "KL divergence 0.00000")


# What is refused.


def test_models_of_different_tokenizers_do_not_compare(
    make_model, llama_model: Path, prose: Path, text: Path, tmp_path: Path
) -> None:
    """Their tokens are not the same events."""
    other = make_model(tmp_path / "other", "llama")
    for file in other.glob("tokenizer*"):
        file.unlink()
    train_sentencepiece(read_documents(prose), 400, tmp_path / "tokenizer", threads=1)
    shutil.copytree(tmp_path / "tokenizer", other, dirs_exist_ok=True)
    message = f"{llama_model} and {other} turn this text into different tokens; only models of one tokenizer compare"
    with pytest.raises(InputError, match=message):
        compare(llama_model, other, text, context=CONTEXT)


def test_vocabularies_of_different_sizes_do_not_compare(
    make_model, llama_model: Path, text: Path, tmp_path: Path
) -> None:
    """Even where the tokenizer is the same and one model has unused tokens."""
    other = make_model(tmp_path / "other", "llama", vocab_size=520)
    with pytest.raises(InputError, match=f"{llama_model} and {other} have vocabularies of different sizes"):
        compare(llama_model, other, text, context=CONTEXT)


def test_the_context_must_fit_both_models(make_model, llama_model: Path, text: Path, tmp_path: Path) -> None:
    """Also if only one of them is too small."""
    other = make_model(tmp_path / "other", "llama", max_position_embeddings=32)
    for first, second in ((llama_model, other), (other, llama_model)):
        with pytest.raises(InputError, match="context 64: the model holds 32 tokens; use --context"):
            compare(first, second, text, context=64)
