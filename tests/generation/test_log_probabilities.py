"""Log-probabilities of tokens, beside those that transformers' logits give."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from quantlab import InputError, load_model, quantize_checkpoint
from quantlab.checkpoint import Tokenizer, load_tokenizer
from quantlab.generation.generator import complete
from quantlab.generation.log_probabilities import token_logprob
from quantlab.generation.native_engine import NativeEngine, load_native
from quantlab.generation.sampling import SamplingParams
from quantlab.generation.torch_engine import TorchEngine

PROMPT = "The lamp in the boathouse was lit, and the lamp in the"
PARAMS = SamplingParams(temperature=1.7, repetition_penalty=1.4, logit_bias={9: 3.0}, seed=4)


@pytest.fixture(scope="module")
def engine(llama_model: Path) -> NativeEngine:
    return load_native(llama_model, activations="f32", kv="f32", threads=1)


@pytest.fixture(scope="module")
def tokenizer(llama_model: Path) -> Tokenizer:
    return load_tokenizer(llama_model)


def transformers_logprobs(folder: Path, ids: list[int]) -> np.ndarray:
    """fp64 [tokens, vocabulary]: what is thought of the token at each place but the first."""
    with torch.inference_mode():
        logits = load_model(folder)(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
    return torch.log_softmax(logits, dim=-1)[:-1].numpy()


@pytest.mark.parametrize("speculation", ["off", "lookup"])
def test_they_are_those_of_transformers(
    engine: NativeEngine, tokenizer: Tokenizer, llama_model: Path, speculation: str
) -> None:
    """The model's own, whatever temperature, penalties and biases make of them; drafted or not, and of a prompt that
    is longer than the part that is computed at once.
    """
    prompt = tokenizer.encode(PROMPT) * 5
    assert len(prompt) > 64
    found = complete(
        engine, tokenizer, prompt, max_tokens=12, params=PARAMS, logprobs=3, prompt_logprobs=2, speculation=speculation
    )
    ids = [*prompt, *found.token_ids]
    expected = transformers_logprobs(llama_model, ids)
    assert found.prompt_logprobs[0] is None
    told = [*found.prompt_logprobs[1:], *found.logprobs]
    assert [each.token_id for each in told] == ids[1:]
    for place, each in enumerate(told):
        row = expected[place]
        assert each.logprob == pytest.approx(row[each.token_id], abs=2e-4)
        count = 2 if place < len(prompt) - 1 else 3
        assert [one.logprob for one in each.top] == pytest.approx(np.sort(row)[::-1][:count], abs=2e-4)
        assert [row[one.token_id] for one in each.top] == pytest.approx(np.sort(row)[::-1][:count], abs=2e-4)
        assert each.token == tokenizer.backend.id_to_token(each.token_id)


def test_asking_changes_no_token_and_reuses_no_cache(engine: NativeEngine, tokenizer: Tokenizer) -> None:
    """The prompt's logits are not kept, so all of it is computed anew."""
    plain = complete(engine, tokenizer, PROMPT, max_tokens=12, params=PARAMS)
    told = complete(engine, tokenizer, PROMPT, max_tokens=12, params=PARAMS, logprobs=0, prompt_logprobs=0)
    assert told.token_ids == plain.token_ids
    assert told.timings.cached_tokens == 0
    assert (plain.logprobs, plain.prompt_logprobs) == (None, None)
    assert {each.top for each in told.logprobs} == {()}


def test_the_torch_engine_tells_them_too(engine: NativeEngine, tokenizer: Tokenizer, llama_model: Path) -> None:
    with_torch = complete(
        TorchEngine(load_model(llama_model)), tokenizer, PROMPT, max_tokens=5, params=PARAMS, prompt_logprobs=1
    )
    native = complete(engine, tokenizer, PROMPT, max_tokens=5, params=PARAMS, prompt_logprobs=1)
    for one, other in zip(with_torch.prompt_logprobs[1:], native.prompt_logprobs[1:], strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=2e-4)


def test_among_equals_the_smaller_id_comes_first(tokenizer: Tokenizer) -> None:
    logits = np.zeros(512, np.float32)
    logits[[40, 300]] = 2.0
    told = token_logprob(logits, 300, 4, tokenizer)
    assert [one.token_id for one in told.top] == [40, 300, 0, 1]
    assert told.logprob == pytest.approx(2 - np.log(510 + 2 * np.exp(2)))
    assert len(token_logprob(logits, 300, 1000, tokenizer).top) == 512


@pytest.mark.parametrize("count", [-1, 1001])
def test_other_numbers_are_refused(engine: NativeEngine, tokenizer: Tokenizer, count: int) -> None:
    for name in ("logprobs", "prompt_logprobs"):
        with pytest.raises(InputError, match=f"{name.replace('_', ' ')} {count}: 0 to 1000 alternatives"):
            complete(engine, tokenizer, PROMPT, **{name: count})


def test_the_command_tells_them_in_json(llama_model: Path, tmp_path: Path) -> None:
    """As fields of the one object; without --json they would not be seen."""
    quantize_checkpoint(llama_model, tmp_path / "packed")
    command = [sys.executable, "-m", "quantlab.cli", "generate", str(tmp_path / "packed"), "-p", "The lamp", "-n", "3"]
    asked = [*command, "--logprobs", "2", "--prompt-logprobs", "1", "--speculation", "lookup"]
    done = subprocess.run([*asked, "--json"], capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert [each["token_id"] for each in told["logprobs"]] == told["token_ids"]
    assert set(told["logprobs"][0]) == {"token_id", "token", "logprob", "top"}
    assert told["prompt_logprobs"][0] is None
    assert len(told["prompt_logprobs"]) == told["timings"]["prompt_tokens"]
    assert {"drafted_tokens", "accepted_tokens"} <= set(told["timings"])
    refused = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "quantlab: --logprobs is part of the JSON object; add --json\n"
