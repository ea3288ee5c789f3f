"""Perplexity against the plain computation: transformers' logits, torch's cross-entropy, token by token."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantlab
from quantlab.errors import InputError
from quantlab.evaluation.perplexity import perplexity

DOCUMENT_END = "\n<|endoftext|>\n"


@pytest.fixture(scope="module")
def text(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two short documents."""
    documents = prose.read_text(encoding="utf-8").split(DOCUMENT_END)[:2]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(DOCUMENT_END.join(document[:700] for document in documents), encoding="utf-8")
    return path


def plain_losses(model, tokenizer, text: Path, context: int, stride: int | None = None) -> list[torch.Tensor]:
    """-ln p of every token of every window, in float64, one window at a time.

    A window holds the start token, if there is one, and up to `context - 1` tokens more. The first one of a document
    scores all of them, a later one those that come after what is scored already: with a stride, that many.
    """
    losses = []
    for document in text.read_text(encoding="utf-8").split(DOCUMENT_END):
        ids = tokenizer.encode(document.strip("\n"))
        start = [tokenizer.bos_token_id] if ids[0] == tokenizer.bos_token_id else []
        end = min(context, len(ids))  # of the window in ids
        scored = 1
        while True:
            begin = scored if stride is None else max(end - context + 1, 1)
            window = torch.tensor([start + ids[begin:end] if start else ids[begin - 1 : end]])
            with torch.inference_mode():
                logits = model(window, use_cache=False).logits[0, :-1].double()
            every = torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="none")
            losses.append(every[len(every) - (end - scored) :])
            if end == len(ids):
                break
            scored, end = end, min(end + (context - 1 if stride is None else stride), len(ids))
    return losses


def assert_is(result, losses: list[torch.Tensor], engine: str = "native") -> None:
    every = torch.cat(losses)
    nll = every.mean().item()
    assert result.tokens == len(every)
    assert result.nll == pytest.approx(nll, rel=2e-6)  # fp32 logits, computed in batches of another shape
    assert result.perplexity == pytest.approx(math.exp(nll), rel=1e-5)
    residuals = torch.stack([window.sum() - nll * len(window) for window in losses])
    stderr = (len(losses) / (len(losses) - 1) * residuals.square().sum()).sqrt().item() / len(every)
    assert result.stderr == pytest.approx(stderr, rel=1e-3)
    assert result.perplexity_stderr == pytest.approx(math.exp(nll) * stderr, rel=1e-3)
    assert result.engine == engine


@pytest.mark.parametrize(("context", "stride"), [(128, None), (33, None), (33, 8), (20, 19), (2, None)])
def test_it_is_the_plain_computation(float_model: Path, text: Path, context: int, stride: int | None) -> None:
    """For each family, tied and untied, with windows side by side or overlapping."""
    model = AutoModelForCausalLM.from_pretrained(float_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(float_model)
    result = perplexity(float_model, text, context=context, stride=stride)
    losses = plain_losses(model, tokenizer, text, context, stride)
    assert_is(result, losses)
    if stride is None:
        assert_is(perplexity(float_model, text, context=context, engine="torch"), losses, "torch")


@pytest.mark.parametrize("stride", [None, 10])
def test_without_a_start_token_too(make_model, prose: Path, text: Path, tmp_path: Path, stride: int | None) -> None:
    """A GPT-2 with a tokenizer of GPT-2's kind: windows begin with a token of the text."""
    folder = make_model(tmp_path / "model", "gpt2")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    trained = ByteLevelBPETokenizer()
    trained.train([str(prose)], vocab_size=512, special_tokens=["<|endoftext|>"], show_progress=False)
    trained.save_model(str(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode("a")[0] != tokenizer.bos_token_id
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert_is(perplexity(folder, text, context=40, stride=stride), plain_losses(model, tokenizer, text, 40, stride))


@pytest.mark.parametrize("format", ["q4_1", "q8_0"])
def test_of_a_quantized_model_it_is_that_of_its_decoded_weights(
    float_model: Path, float_twin, text: Path, tmp_path: Path, format: str
) -> None:
    """gguf decodes the blocks, transformers' own model computes with them."""
    quantlab.quantize_checkpoint(float_model, tmp_path / "out", format=format, uniform=True)
    tokenizer = AutoTokenizer.from_pretrained(float_model)
    assert_is(
        perplexity(tmp_path / "out", text, context=64),
        plain_losses(float_twin(tmp_path / "out"), tokenizer, text, 64),
    )


def test_progress_counts_every_token(llama_model: Path, text: Path) -> None:
    """Upwards, to the total, with the figure so far, which ends as the result."""
    seen: list[tuple[int, int, str]] = []
    result = perplexity(llama_model, text, context=16, progress=lambda *state: seen.append(state))
    done = [state[0] for state in seen]
    assert len(done) > 1
    assert done == sorted(set(done))
    assert seen[-1] == (result.tokens, result.tokens, f"perplexity {result.perplexity:.3f}")
    assert {state[1] for state in seen} == {result.tokens}


def test_a_context_longer_than_the_models_is_refused(llama_model: Path, text: Path) -> None:
    """The tiny model holds 128 tokens; the default of 512 is too long for it."""
    message = "context {}: the model holds 128 tokens; use --context"
    for context in (129, 512):
        with pytest.raises(InputError, match=message.format(context)):
            perplexity(llama_model, text, context=context)
    with pytest.raises(InputError, match=message.format(512)):
        perplexity(llama_model, text)
    perplexity(llama_model, text, context=128)


def test_a_missing_model_or_text_is_refused(llama_model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        perplexity(tmp_path / "none", text)
    with pytest.raises(InputError, match="cannot be read"):
        perplexity(llama_model, tmp_path / "none.txt")
