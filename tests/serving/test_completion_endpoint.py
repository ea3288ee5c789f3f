"""`/v1/completions`: texts go on as `quantlab generate` writes them, and prompts are scored as the engine does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from quantlab.divergence import negative_log_likelihood
from quantlab.generation.engines import load_engine
from quantlab.generation.generate import generate
from quantlab.generation.sampling import SamplingParams

PROMPT = "The king went out to see the harbour"


def complete(running, **fields):
    return running.client.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 6, **fields})


def test_a_greedy_text_is_what_generate_writes(running, llama_model: Path) -> None:
    """As text or as token ids."""
    expected = generate(llama_model, PROMPT, max_tokens=6, params=SamplingParams(temperature=0), threads=1)
    choice = complete(running, temperature=0, logprobs=1).json["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (expected.text, expected.finish_reason)
    ids = running.service.host.tokenizer.encode(PROMPT)
    again = complete(running, prompt=ids, temperature=0, logprobs=1).json
    assert again["choices"][0] == choice
    assert again["usage"]["prompt_tokens"] == len(ids)


def test_a_seed_gives_the_text_of_generate(running, llama_model: Path) -> None:
    """The defaults are those of the command."""
    expected = generate(llama_model, PROMPT, max_tokens=6, params=SamplingParams(seed=7), threads=1)
    assert complete(running, seed=7).json["choices"][0]["text"] == expected.text
    assert complete(running).json["choices"][0]["text"] == generate(llama_model, PROMPT, max_tokens=6, threads=1).text


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_an_echoed_prompt_is_scored_as_in_process(running, llama_model: Path, max_tokens: int) -> None:
    """ln p of each token, the first one's null, and the best in its place: what lm-eval's local-completions reads."""
    ids = running.service.host.tokenizer.encode(PROMPT)
    rows = load_engine(llama_model, threads=1).logits_of(ids)
    expected = -negative_log_likelihood(rows[:-1], np.array(ids[1:]))
    reply = complete(running, prompt=ids, echo=True, logprobs=1, max_tokens=max_tokens, temperature=0).json
    logprobs = reply["choices"][0]["logprobs"]
    prompt_part = slice(0, len(ids))
    assert len(logprobs["tokens"]) == len(ids) + max_tokens == len(logprobs["text_offset"])
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert np.abs(np.array(logprobs["token_logprobs"][prompt_part][1:]) - expected).max() < 1e-9
    for row, top in zip(rows, logprobs["top_logprobs"][1 : len(ids)], strict=False):
        assert abs(max(top.values()) + negative_log_likelihood(row[None], row.argmax()[None])[0]) < 1e-6
    # A token that is the best has exactly the best one's number: clients compare them.
    best = [row.argmax() == token for row, token in zip(rows, ids[1:], strict=False)]
    told = zip(logprobs["token_logprobs"][1 : len(ids)], logprobs["top_logprobs"][1 : len(ids)], strict=True)
    assert [value == max(top.values()) for value, top in told] == best
    assert reply["usage"]["completion_tokens"] == max_tokens


def test_an_echoed_text_holds_its_prompt(running) -> None:
    """Offsets say where its tokens begin."""
    choice = complete(running, echo=True, logprobs=0, temperature=0).json["choices"][0]
    text, logprobs = choice["text"], choice["logprobs"]
    assert text.startswith(PROMPT)
    for token, offset in list(zip(logprobs["tokens"], logprobs["text_offset"], strict=True))[2:]:
        assert token.startswith("bytes:") or text[offset:].startswith(token)


def test_several_prompts_and_samples_come_in_order(running, llama_model: Path) -> None:
    """Prompt by prompt; a prompt counts once."""
    prompts = ["A castle", "The sea"]
    reply = complete(running, prompt=prompts, n=2, seed=4).json
    expected = [
        generate(llama_model, prompt, max_tokens=6, params=SamplingParams(seed=seed), threads=1).text
        for prompt in prompts
        for seed in (4, 5)
    ]
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in reply["choices"]] == expected
    encode = running.service.host.tokenizer.encode
    assert reply["usage"]["prompt_tokens"] == sum(len(encode(prompt)) for prompt in prompts)


def test_a_stream_joins_to_the_whole_text(running) -> None:
    """With the prompt before it, log-probabilities of every token, and offsets that go on."""
    fields = {"prompt": ["A castle", "The sea"], "n": 2, "logprobs": 1, "max_tokens": 9}
    whole = complete(running, **fields).json["choices"]
    events = complete(running, **fields, stream=True).events
    assert events[-1]["timings"]["predicted_n"] == 36
    for choice in whole:
        mine = [each for event in events for each in event["choices"] if each["index"] == choice["index"]]
        assert "".join(each["text"] for each in mine) == choice["text"]
        for name in ("tokens", "token_logprobs", "top_logprobs"):
            joined = [one for each in mine if each["logprobs"] for one in each["logprobs"][name]]
            assert joined == choice["logprobs"][name]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
    echoed = complete(running, echo=True, stream=True).events
    text = "".join(choice["text"] for event in echoed for choice in event["choices"])
    assert text == complete(running, echo=True).json["choices"][0]["text"]


def test_streamed_text_is_whole_text_for_any_stop_string(running) -> None:
    """Stop strings over the borders of tokens, and characters that several tokens make, are never shown in halves."""
    full = complete(running, temperature=1.5, min_p=0, max_tokens=60, seed=5, prompt="\u00e9\U0001f600\u6f22").json
    text = full["choices"][0]["text"]
    assert len(text) > 20
    for start in range(3, 15, 4):
        stop = [text[start : start + 3], "never"]
        fields = {
            "temperature": 1.5,
            "min_p": 0,
            "max_tokens": 60,
            "seed": 5,
            "prompt": "\u00e9\U0001f600\u6f22",
            "stop": stop,
        }
        whole = complete(running, **fields).json["choices"][0]
        assert whole["text"] == text[: text.index(stop[0])]
        assert whole["finish_reason"] == "stop"
        streamed = complete(running, **fields, stream=True).events
        assert "".join(choice["text"] for event in streamed for choice in event["choices"]) == whole["text"]


def test_wrong_prompts_are_refused(running) -> None:
    """400 that names the field, before or in the turn."""
    for prompt in (5, [], [[]], ["a", 5], [[1], "a", None], {"a": 1}, None, [True], [1.5]):
        reply = complete(running, prompt=prompt)
        assert (reply.status, reply.error["param"]) == (400, "prompt")
    assert running.client.post("/v1/completions", {}).error["param"] == "prompt"
    outside = complete(running, prompt=[1, 512])
    assert outside.status == 400
    assert "token id 512 is outside the vocabulary of 512" in outside.error["message"]
    long = complete(running, prompt=[5] * 129)
    assert (long.status, long.error["code"]) == (400, "context_length_exceeded")
    assert "129 tokens; the context holds 128" in long.error["message"]
    for field, fields in {
        "suffix": {"suffix": "end"},
        "best_of": {"best_of": 3},
        "stream": {"echo": True, "logprobs": 1, "stream": True},
        "logprobs": {"logprobs": 1000},
    }.items():
        reply = complete(running, **fields)
        assert (reply.status, reply.error["param"]) == (400, field)
