"""The model that lm-eval sees, against transformers; lm-eval itself is stood in for by the two names that are used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantlab.checkpoint import load_tokenizer
from quantlab.errors import InputError
from quantlab.generation.generate import generate
from quantlab.generation.sampling import SamplingParams

OURS = "quantlab.evaluation.lm_eval_model"


class CacheHook:
    """lm-eval's store of answers."""

    def __init__(self) -> None:
        self.seen: list[tuple[object, ...]] = []

    def add_partial(self, *answer: object) -> None:
        self.seen.append(answer)


class LM:
    """lm-eval's base class, as far as it is used."""

    def __init__(self) -> None:
        self.cache_hook = CacheHook()


@dataclass
class Instance:
    """One request of lm-eval."""

    args: tuple[object, ...]


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Our module, and what it registered."""
    registered: dict[str, type] = {}
    model, registry = ModuleType("lm_eval.api.model"), ModuleType("lm_eval.api.registry")
    model.LM = LM

    def register_model(name: str):
        return lambda kind: registered.setdefault(name, kind)

    registry.register_model = register_model
    for name, module in {"lm_eval": ModuleType("lm_eval"), "lm_eval.api": ModuleType("lm_eval.api"),
                         "lm_eval.api.model": model, "lm_eval.api.registry": registry}.items():  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, OURS, raising=False)
    yield SimpleNamespace(module=importlib.import_module(OURS), registered=registered)
    sys.modules.pop(OURS, None)


def requests(*arguments: tuple[object, ...]) -> list[Instance]:
    return [Instance(pair) for pair in arguments]


def log_probabilities(folder: Path, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """ln p of every token but the first, by transformers in float64, and whether it is the most likely one."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.tensor([ids])
    with torch.inference_mode():
        log = model(tokens[:, :-1]).logits[0].double().log_softmax(1)
    return log[torch.arange(len(log)), tokens[0, 1:]], log.argmax(1) == tokens[0, 1:]


def test_it_is_registered_and_takes_lm_evals_arguments(ours: SimpleNamespace, llama_model: Path) -> None:
    kind = ours.registered["quantlab"]
    assert kind is ours.module.QuantlabLM
    model = kind(str(llama_model), batch_size="auto", max_batch_size=8, device="cpu", max_length=50)
    assert model.max_length == 50
    assert kind(str(llama_model)).max_length == 128


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_likelihoods_are_transformers(ours: SimpleNamespace, llama_model: Path, engine: str) -> None:
    """Of continuations, with and without a context, and one that greedy decoding gives."""
    tokenizer = AutoTokenizer.from_pretrained(llama_model)
    model = ours.module.QuantlabLM(str(llama_model), engine=engine)
    context = "The lamp in the boathouse"
    follows = generate(llama_model, context, max_tokens=3, params=SamplingParams(temperature=0)).text
    pairs = [(context, " was lit"), (context, follows), ("", "The lamp")]
    found = model.loglikelihood(requests(*pairs))
    for (before, text), (likelihood, is_greedy) in zip(pairs, found, strict=True):
        whole = tokenizer.encode(before + text)
        begin = len(tokenizer.encode(before)) if before else 1
        log, best = log_probabilities(llama_model, whole)
        assert likelihood == pytest.approx(log[begin - 1 :].sum().item(), rel=1e-5)
        assert is_greedy == best[begin - 1 :].all().item()
    assert [answer[:2] for answer in model.cache_hook.seen] == [("loglikelihood", pair) for pair in pairs]
    assert (found[0][1], found[1][1]) == (False, True)


def test_a_long_context_loses_its_beginning(ours: SimpleNamespace, llama_model: Path, prose: Path) -> None:
    """As many tokens as the model holds lie before the last one."""
    model = ours.module.QuantlabLM(str(llama_model), max_length=40)
    text = prose.read_text(encoding="utf-8")[:600]
    before, ids = (load_tokenizer(llama_model).encode(part) for part in (text, text + " and so"))
    assert ids[: len(before)] == before
    ((found, _),) = model.loglikelihood(requests((text, " and so")))
    log, _ = log_probabilities(llama_model, ids[-41:])
    assert found == pytest.approx(log[len(before) - len(ids) :].sum().item(), rel=1e-5)


def test_rolling_windows_by_hand(ours: SimpleNamespace) -> None:
    """Ten tokens in windows of four behind the start token 99: each is predicted once, each window is full."""
    windows = list(ours.module.rolling_windows(range(10), 99, 4))
    assert windows == [([99, 0, 1, 2, 3], 1), ([3, 4, 5, 6, 7], 1), ([5, 6, 7, 8, 9], 3)]
    assert list(ours.module.rolling_windows([7, 8], 99, 4)) == [([99, 7, 8], 1)]
    assert list(ours.module.rolling_windows([], 99, 4)) == []


def test_the_likelihood_of_a_whole_text(ours: SimpleNamespace, llama_model: Path, prose: Path) -> None:
    """Of more tokens than the model holds, window by window, by transformers."""
    model = ours.module.QuantlabLM(str(llama_model))
    text = prose.read_text(encoding="utf-8")[:700]
    tokenizer = load_tokenizer(llama_model)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > 2 * 128
    expected = 0.0
    for window, begin in ours.module.rolling_windows(ids, tokenizer.bos, 128):
        expected += log_probabilities(llama_model, window)[0][begin - 1 :].sum().item()
    (found,) = model.loglikelihood_rolling(requests((text,)))
    assert found == pytest.approx(expected, rel=1e-5)


def test_generation_is_the_generators(ours: SimpleNamespace, llama_model: Path, prose: Path) -> None:
    """Greedy unless asked otherwise, up to a stop string or a number of tokens; long contexts keep their end."""
    model = ours.module.QuantlabLM(str(llama_model))

    def continued(context: str, **settings: object) -> str:
        return model.generate_until(requests((context, settings)))[0]

    greedy = SamplingParams(temperature=0)
    whole = generate(llama_model, "The lamp", max_tokens=20, params=greedy).text
    assert continued("The lamp", max_gen_toks=20, do_sample=False, temperature=0.9) == whole
    assert continued("The lamp", max_gen_toks=20, until=[whole[5:8], ""]) == whole[: whole.index(whole[5:8])]
    assert continued("The lamp", max_gen_toks=20, until=whole[5:8]) == whole[: whole.index(whole[5:8])]
    drawn = SamplingParams(temperature=0.7, top_k=5, top_p=1, min_p=0, seed=3)
    sampled = generate(llama_model, "The lamp", max_tokens=20, params=drawn).text
    assert continued("The lamp", max_gen_toks=20, do_sample=True, temperature=0.7, top_k=5, seed=3) == sampled
    assert continued("The lamp", max_gen_toks=20, temperature=0.7, top_k=5, seed=3) == sampled
    assert continued(prose.read_text(encoding="utf-8")[:2000], max_gen_toks=20)


def test_without_lm_eval_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, OURS, raising=False)
    with pytest.raises(InputError, match=r"lm-eval is not installed; install it with: pip install 'quantlab\[eval\]'"):
        importlib.import_module(OURS)
