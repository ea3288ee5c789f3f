"""Two models on one text: exact zeros for a model with itself, torch's float64 divergence for a quantized one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantlab
from quantlab.checkpoint import load_tokenizer
from quantlab.checkpoint.export import export_checkpoint
from quantlab.documents import read_documents
from quantlab.errors import InputError
from quantlab.evaluation import scorers
from quantlab.evaluation.compare import compare
from quantlab.evaluation.perplexity import perplexity
from quantlab.generation import engines
from quantlab.generation.native_engine import NativeEngine
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
    options = {"context": CONTEXT, "stride": stride}
    alone = [perplexity(folder, text, **options) for folder in (float_model, q4_0)]
    assert (result.perplexity_a, result.perplexity_b) == (alone[0].perplexity, alone[1].perplexity)
    assert (result.nll_a, result.nll_b) == (alone[0].nll, alone[1].nll)
    assert (result.perplexity_a_stderr, result.perplexity_b_stderr) == tuple(p.perplexity_stderr for p in alone)
    assert result.tokens == alone[0].tokens == alone[1].tokens
    assert result.windows == alone[0].windows


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


# Everything else that is reported, derived again from torch's logits in float64.


def plain_tokens(model_a, model_b, tokenizer, text: Path) -> dict[str, torch.Tensor]:
    """Of every token: log-probabilities under both models, divergence, window and document."""
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in ("log_a", "log_b", "kld", "window", "document")}
    for document, part in enumerate(read_documents(text)):
        ids = tokenizer.encode(part)
        for begin in range(1, len(ids), CONTEXT - 1):
            window = torch.tensor([[ids[0], *ids[begin : begin + CONTEXT - 1]]])
            with torch.inference_mode():
                log_a, log_b = (model(window).logits[0, :-1].double().log_softmax(1) for model in (model_a, model_b))
            places = torch.arange(len(log_a))
            rows["log_a"].append(log_a[places, window[0, 1:]])
            rows["log_b"].append(log_b[places, window[0, 1:]])
            rows["kld"].append((log_a.exp() * (log_a - log_b)).sum(1))
            number = 0 if not rows["window"] else int(rows["window"][-1][0]) + 1
            rows["window"].append(torch.full((len(log_a),), number))
            rows["document"].append(torch.full((len(log_a),), document))
    return {name: torch.cat(values) for name, values in rows.items()}


def clustered(values: torch.Tensor, windows: torch.Tensor) -> tuple[float, float]:
    """Mean, and standard error with windows as units."""
    mean = values.mean().item()
    sums = torch.stack([(values[windows == w] - mean).sum() for w in windows.unique()])
    return mean, (len(sums) / (len(sums) - 1) * sums.square().sum()).sqrt().item() / len(values)


@pytest.fixture(scope="module")
def two_documents(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two short documents."""
    path = tmp_path_factory.mktemp("text") / "two.txt"
    first, second = (document[:900] for document in read_documents(prose)[:2])
    path.write_text(f"{first}\n<|endoftext|>\n{second}\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_every_figure(llama_model: Path, float_twin, two_documents: Path, tmp_path: Path, engine: str) -> None:
    """Ratio, percentiles, probabilities, documents and worst tokens."""
    quantlab.quantize_checkpoint(llama_model, tmp_path / "q4_0", format="q4_0")
    original = AutoModelForCausalLM.from_pretrained(llama_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(llama_model)
    plain = plain_tokens(original, float_twin(tmp_path / "q4_0"), tokenizer, two_documents)
    found = compare(llama_model, tmp_path / "q4_0", two_documents, context=CONTEXT, engine=engine, worst=5)

    assert (found.engine, found.engine_a, found.engine_b) == (engine, engine, engine)
    assert (found.activations_a, found.kv_b, found.windows) == ("f32", "f32", int(plain["window"].max()) + 1)
    ratio, ratio_stderr = clustered(plain["log_a"] - plain["log_b"], plain["window"])
    assert found.ln_ratio == pytest.approx(ratio, abs=1e-6)
    assert found.ln_ratio_stderr == pytest.approx(ratio_stderr, rel=1e-4)
    assert found.perplexity_ratio == pytest.approx(found.perplexity_b / found.perplexity_a, rel=1e-12)
    assert found.perplexity_ratio_stderr == pytest.approx(found.perplexity_ratio * ratio_stderr, rel=1e-4)
    for name, share in (("p90", 0.9), ("p95", 0.95), ("p99", 0.99), ("p999", 0.999)):
        assert getattr(found, f"kld_{name}") == pytest.approx(plain["kld"].quantile(share).item(), abs=1e-5)
    change = plain["log_b"].exp() - plain["log_a"].exp()
    square, square_stderr = clustered(change.square(), plain["window"])
    assert found.rms_dp == pytest.approx(square**0.5, rel=1e-5)
    assert found.rms_dp_stderr == pytest.approx(square_stderr / (2 * square**0.5), rel=1e-4)
    assert (found.mean_dp, found.mean_dp_stderr) == pytest.approx(
        clustered(change, plain["window"]), rel=1e-3, abs=1e-9
    )

    for number, document in enumerate(found.documents):
        chosen = plain["document"] == number
        kld, stderr = clustered(plain["kld"][chosen], plain["window"][chosen])
        assert document.tokens == int(chosen.sum())
        assert (document.kld_mean, document.kld_stderr) == pytest.approx((kld, stderr), abs=1e-6)
        assert document.perplexity_a == pytest.approx((-plain["log_a"][chosen].mean()).exp().item(), rel=1e-5)
        assert document.perplexity_b == pytest.approx((-plain["log_b"][chosen].mean()).exp().item(), rel=1e-5)
    assert len(found.documents) == 2
    assert found.documents[1].begins == "The Badger Who Kept the Gate In a hedge "[:40]

    assert [token.kld for token in found.worst] == pytest.approx(plain["kld"].topk(5).values.tolist(), abs=1e-5)
    place = int(plain["kld"].argmax())
    worst = found.worst[0]
    assert worst.document == int(plain["document"][place])
    assert worst.position == place - (0 if worst.document == 0 else found.documents[0].tokens)
    assert worst.p_a == pytest.approx(plain["log_a"][place].exp().item(), rel=1e-4)
    assert worst.p_b == pytest.approx(plain["log_b"][place].exp().item(), rel=1e-4)


def test_worst_tokens_stand_in_their_text(llama_model: Path, two_documents: Path, tmp_path: Path) -> None:
    """What is before, the token and what is after are the document's own characters."""
    quantlab.quantize_checkpoint(llama_model, tmp_path / "q4_0", format="q4_0")
    found = compare(llama_model, tmp_path / "q4_0", two_documents, context=CONTEXT, worst=40)
    assert len(found.worst) == 40
    documents = read_documents(two_documents)
    for token in found.worst:
        assert token.before + token.token + token.after in " " + documents[token.document]
        assert token.token != ""
        assert token.top_a != ""
    assert compare(llama_model, llama_model, two_documents, context=CONTEXT, worst=0).worst == ()


def test_parts_of_a_window_change_nothing(
    llama_model: Path, two_documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits come some at a time where the vocabulary is large: the same to the last bit."""
    quantlab.quantize_checkpoint(llama_model, tmp_path / "q4_1", format="q4_1")
    whole = compare(llama_model, tmp_path / "q4_1", two_documents, context=CONTEXT)
    sizes: list[int] = []
    logits_of = NativeEngine.append_all

    def watched(engine: NativeEngine, ids: tuple[int, ...]) -> np.ndarray:
        sizes.append(len(ids))
        return logits_of(engine, ids)

    monkeypatch.setattr(NativeEngine, "append_all", watched)
    monkeypatch.setattr(scorers, "MAX_LOGITS", 512 * 7)
    monkeypatch.setattr(scorers, "MIN_ROWS", 1)
    assert compare(llama_model, tmp_path / "q4_1", two_documents, context=CONTEXT) == whole
    assert max(sizes) == 7


def test_caches_and_activations_of_one_model(make_model, two_documents: Path, tmp_path: Path) -> None:
    """Each rounding moves the model a little from itself, in the order of its coarseness; a default names its cache."""
    heads_of_32 = make_model(tmp_path / "model", "llama", num_attention_heads=2, num_key_value_heads=1)
    quantlab.quantize_checkpoint(heads_of_32, tmp_path / "q8_0", format="q8_0")
    model = tmp_path / "q8_0"

    def divergence(**options: str) -> float:
        return compare(model, model, two_documents, context=CONTEXT, **options).kld_mean

    half, eighth = divergence(kv_b="f16"), divergence(kv_b="q8_0")
    assert 0 < half < eighth < 1e-3
    assert divergence(kv_a="q8_0", kv_b="q8_0") == 0
    assert 0 < divergence(activations_b="int8", kv_b="f32") < 1e-2
    found = compare(model, model, two_documents, context=CONTEXT, activations="int8")
    assert (found.activations_a, found.activations_b, found.kv_a, found.kv_b) == ("int8", "int8", "f16", "f16")
    assert found.kld_mean == 0
    found = compare(model, model, two_documents, context=CONTEXT, activations_b="int8")
    assert (found.activations_a, found.activations_b, found.kv_a, found.kv_b) == ("f32", "int8", "f32", "f16")


def test_a_gguf_file_compares_with_its_folder(llama_model: Path, two_documents: Path, tmp_path: Path) -> None:
    """The same weights: no divergence at all; also cut as llama.cpp cuts."""
    export_checkpoint(llama_model, tmp_path / "model.gguf", "gguf")
    for windows in ("documents", "llama"):
        found = compare(llama_model, tmp_path / "model.gguf", two_documents, context=CONTEXT, windows=windows)
        assert found.kld_max == 0
    assert found.tokens == found.windows * (CONTEXT // 2 - 1)
    assert len(found.documents) == 1


def test_what_the_native_engine_does_not_run_runs_on_torch(
    llama_model: Path, text: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Both models, and a warning says why."""
    expected = compare(llama_model, llama_model, text, context=CONTEXT, engine="torch")

    def refuse(*_: object) -> None:
        raise InputError("a part that it has not")

    monkeypatch.setattr(engines, "describe", refuse)
    assert compare(llama_model, llama_model, text, context=CONTEXT) == expected
    told = "torch engine, because the native one does not run this model: a part that it has not"
    assert [record.getMessage() for record in caplog.records if record.name == engines.__name__] == [told] * 2
    assert expected.engine == "torch"


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
    ours, theirs = (load_tokenizer(folder).backend for folder in (llama_model, other))
    number = next(i for i in range(400) if ours.id_to_token(i) != theirs.id_to_token(i))
    pieces = (
        f"token {number} is {ours.id_to_token(number)!r} in the first and {theirs.id_to_token(number)!r} in the second"
    )
    with pytest.raises(InputError) as caught:
        compare(llama_model, other, text, context=CONTEXT)
    ending = f"turn text into different tokens ({pieces}); only models of one tokenizer compare"
    assert str(caught.value) == f"{llama_model} and {other} {ending}"


def test_models_that_cut_text_otherwise_do_not_compare(llama_model: Path, text: Path, tmp_path: Path) -> None:
    """The same vocabulary, but one reads letters in lower case; or one puts no start token before a text."""
    other = Path(shutil.copytree(llama_model, tmp_path / "lower"))
    settings = json.loads((other / "tokenizer.json").read_text())
    settings["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, settings["normalizer"]]}
    (other / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"different tokens \(document 0, token 0 is '.*' and '.*'\)"):
        compare(llama_model, other, text, context=CONTEXT)
    settings = json.loads((llama_model / "tokenizer.json").read_text()) | {"post_processor": None}
    (other / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"different tokens \(a window begins with '<s>' and '.*'\)"):
        compare(llama_model, other, text, context=CONTEXT)


def test_vocabularies_of_different_sizes_do_not_compare(
    make_model, llama_model: Path, text: Path, tmp_path: Path
) -> None:
    """Even where the tokenizer is the same and one model has unused tokens."""
    other = make_model(tmp_path / "other", "llama", vocab_size=520)
    message = f"{llama_model} and {other} have vocabularies of different sizes \\(512 and 520 tokens\\)"
    with pytest.raises(InputError, match=message):
        compare(llama_model, other, text, context=CONTEXT)


def test_the_context_must_fit_both_models(make_model, llama_model: Path, text: Path, tmp_path: Path) -> None:
    """Also if only one of them is too small."""
    other = make_model(tmp_path / "other", "llama", max_position_embeddings=32)
    for first, second in ((llama_model, other), (other, llama_model)):
        with pytest.raises(InputError, match="context 64: the model holds 32 tokens; use --context"):
            compare(first, second, text, context=64)


@pytest.mark.parametrize("options", [{"activations_b": "int8"}, {"kv_a": "f16"}])
def test_torch_rounds_nothing(llama_model: Path, text: Path, options: dict[str, str]) -> None:
    with pytest.raises(InputError, match=f"{llama_model}: runs on torch, which computes in f32; .* native engine"):
        compare(llama_model, llama_model, text, context=CONTEXT, engine="torch", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_b": "q4_0"}, "kv 'q4_0': choose one of: f32, f16, q8_0"),
        ({"activations": "int4"}, "activations 'int4': choose one of: int8, f32"),
        ({"worst": -1}, "worst -1: must be 0 or more"),
        ({"windows": "all"}, "windows 'all': choose one of: documents, llama"),
    ],
)
def test_options_that_are_none(llama_model: Path, text: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        compare(llama_model, llama_model, text, context=CONTEXT, **options)


def test_logits_that_are_no_numbers_are_refused_with_their_place(llama_model: Path, text: Path, tmp_path: Path) -> None:
    """A NaN in the embedding of a token shows from that token on; it is looked for in B, where it is."""
    broken = Path(shutil.copytree(llama_model, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    ids = load_tokenizer(llama_model).encode(text.read_text(encoding="utf-8"), add_special_tokens=False)
    place = next(i for i in range(20, 60) if ids.index(ids[i]) == i)  # a token that did not come before
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    untied = tensors | {"lm_head.weight": load_file(llama_model / "model.safetensors")["model.embed_tokens.weight"]}
    untied["model.embed_tokens.weight"][ids[place]] = float("nan")
    save_file(untied, broken / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((broken / "config.json").read_text()) | {"tie_word_embeddings": False}
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"{broken}: its logits for document 0, token {place + 1} are NaN or infinite"):
        compare(llama_model, broken, text, context=CONTEXT)
    with pytest.raises(InputError, match=f"{broken}: its logits for document 0, token {place + 1} are NaN or infinite"):
        perplexity(broken, text, context=CONTEXT)
