"""`/v1/chat/completions`: the answers are `quantlab generate`'s, whole or in pieces."""

from __future__ import annotations

from pathlib import Path

from quantlab.checkpoint.chat_text import chat_ids
from quantlab.generation.generate import generate
from quantlab.generation.sampling import SamplingParams
from quantlab.serving.token_texts import TokenTexts


def text_of(events: list[dict], sample: int = 0) -> str:
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == sample]
    return "".join(choice["delta"].get("content", "") for choice in choices)


def test_a_greedy_answer_is_what_generate_writes(running, llama_model: Path) -> None:
    """Of the same token ids; usage counts them, and a second request finds the prompt cached."""
    layout = running.service.host.layout
    ids = chat_ids(layout.text([{"role": "user", "content": "A castle by the sea"}]), layout.tokenizer)
    expected = generate(
        llama_model, ids, max_tokens=8, params=SamplingParams(temperature=0), stop=layout.stop, threads=1
    )
    reply = running.client.chat("A castle by the sea", temperature=0, logprobs=True)
    choice = reply.json["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": expected.text}
    assert choice["finish_reason"] == expected.finish_reason
    texts = TokenTexts(layout.tokenizer)
    told = [bytes(one["bytes"]) for one in choice["logprobs"]["content"]]
    assert told == [texts.bytes_of(token) for token in expected.token_ids]
    again = running.client.chat("A castle by the sea", temperature=0).json
    assert again["usage"] == {
        "prompt_tokens": len(ids),
        "completion_tokens": 8,
        "total_tokens": len(ids) + 8,
        "prompt_tokens_details": {"cached_tokens": len(ids) - 1},
    }
    timings = again["timings"]
    assert (timings["cache_n"], timings["prompt_n"], timings["predicted_n"]) == (len(ids) - 1, 1, 8)
    assert timings["predicted_ms"] > 0


def test_a_stream_joins_to_the_whole_answer(running) -> None:
    """Pieces, log-probabilities, the reason and, where asked for, usage: the same as in one."""
    fields = {"seed": 3, "logprobs": True, "top_logprobs": 2, "n": 2, "max_tokens": 12}
    whole = running.client.chat(**fields).json
    reply = running.client.chat(**fields, stream=True, stream_options={"include_usage": True})
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, usage = reply.events
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] == 24
    assert events[-1]["timings"]["predicted_n"] == 24
    for choice in whole["choices"]:
        number = choice["index"]
        mine = [each for event in events for each in event["choices"] if each["index"] == number]
        assert text_of(events, number) == choice["message"]["content"]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert [each["finish_reason"] for each in mine if each["finish_reason"]] == [choice["finish_reason"]]
        told = [one for each in mine if each["logprobs"] for one in each["logprobs"]["content"]]
        assert told == choice["logprobs"]["content"]
    assert text_of(events, 0) != text_of(events, 1)


def test_wrong_fields_are_named(running) -> None:
    """400 in OpenAI's shape."""
    cases = {
        "messages.0.content": {"messages": [{"role": "user", "content": 5}]},
        "messages.0.role": {"messages": [{"role": "tool", "content": "a"}]},
        "messages": {"messages": []},
        "temperature": {"temperature": "hot"},
        "top_p": {"top_p": 2},
        "max_tokens": {"max_tokens": 0},
        "stop.1": {"stop": ["a", 5]},
        "n": {"n": 1000},
        "logit_bias": {"logit_bias": {"a": 1}},
        "tools": {"tools": [{"type": "function"}]},
        "retrieval": {"retrieval": True},
    }
    for field, wrong in cases.items():
        reply = running.client.chat(**wrong)
        assert reply.status == 400, field
        assert reply.error["param"] == field
        assert reply.error["type"] == "invalid_request_error"


def test_an_unknown_model_is_not_found(running) -> None:
    """The served name, the folder's and none at all mean the model."""
    for name in ("tiny", None, ""):
        assert running.client.chat(model=name).status == 200
    reply = running.client.chat(model="gpt-4o")
    assert (reply.status, reply.error["code"]) == (404, "model_not_found")
    assert "tiny" in reply.error["message"]
