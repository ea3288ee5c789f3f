"""The official client finds what it expects, and reads it into its own types."""

from __future__ import annotations

import json

import openai
import pytest


@pytest.fixture
def client(running) -> openai.OpenAI:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        yield client


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who lives in the castle?"}]


def test_a_chat(client: openai.OpenAI) -> None:
    """Message, usage, and our timings beside them."""
    reply = client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=6, seed=1)
    assert reply.object == "chat.completion"
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].message.content
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 6
    assert reply.usage.prompt_tokens_details.cached_tokens >= 0
    assert reply.timings["predicted_n"] == 6


def test_a_stream(client: openai.OpenAI) -> None:
    """Joined, the text of the same request without a stream; usage in a chunk of its own."""
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 20, "seed": 2}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage] == [20]
    assert chunks[-2].choices[0].finish_reason == "length"


def test_log_probabilities(client: openai.OpenAI) -> None:
    """A token's bytes join to the text; the best alternatives come first. The grammar is GBNF."""
    grammar = {"grammar": "root ::= [a-z ]+"}
    reply = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=6, logprobs=True, top_logprobs=3, extra_body=grammar
    )
    assert set(reply.choices[0].message.content) <= set("abcdefghijklmnopqrstuvwxyz ")
    told = reply.choices[0].logprobs.content
    assert len(told) == 6
    assert b"".join(bytes(one.bytes) for one in told).decode("ascii") == reply.choices[0].message.content
    for one in told:
        values = [other.logprob for other in one.top_logprobs]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert one.logprob <= values[0] < 0


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ann", "Bob"]}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
    "additionalProperties": False,
}


def test_a_json_schema(client: openai.OpenAI) -> None:
    """The answer is JSON that the schema describes, streamed or not."""
    format_ = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 60, "response_format": format_}
    reply = client.chat.completions.create(**asked)
    found = json.loads(reply.choices[0].message.content)
    assert found["name"] in ("Ann", "Bob")
    assert isinstance(found["old"], bool)
    assert set(found) == {"name", "old"}
    assert reply.choices[0].finish_reason == "stop"
    chunks = client.chat.completions.create(**asked, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == reply.choices[0].message.content


def test_the_streaming_helper(client: openai.OpenAI) -> None:
    """The client's own accumulator makes the final message of our chunks."""
    format_ = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 60, "response_format": format_, "logprobs": True}
    with client.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion()
    whole = client.chat.completions.create(**asked)
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].finish_reason == whole.choices[0].finish_reason == "stop"
    assert final.choices[0].logprobs.content == whole.choices[0].logprobs.content


def test_a_parsed_schema(client: openai.OpenAI) -> None:
    """The client makes the schema of a class, and an object of the answer."""
    from typing import Literal

    from pydantic import BaseModel

    class Person(BaseModel):
        name: Literal["Ann", "Bob"]
        old: bool

    reply = client.chat.completions.parse(model="tiny", messages=MESSAGES, max_tokens=60, response_format=Person)
    assert isinstance(reply.choices[0].message.parsed, Person)


def test_completions(client: openai.OpenAI) -> None:
    """The legacy endpoint, echo and log-probabilities among it."""
    reply = client.completions.create(model="tiny", prompt="The sea", max_tokens=4, echo=True, logprobs=2)
    assert reply.choices[0].text.startswith("The sea")
    assert reply.choices[0].logprobs.token_logprobs[0] is None
    streamed = client.completions.create(model="tiny", prompt="The sea", max_tokens=4, stream=True)
    assert "The sea" + "".join(chunk.choices[0].text for chunk in streamed) == reply.choices[0].text


def test_models(client: openai.OpenAI) -> None:
    """What clients offer to choose from."""
    (model,) = client.models.list()
    assert (model.id, model.object, model.context_length, model.engine) == ("tiny", "model", 128, "native")


def test_errors(client: openai.OpenAI) -> None:
    """Of the client's own classes, with the field that is wrong."""
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4o' here"):
        client.chat.completions.create(model="gpt-4o", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=-1)
    assert caught.value.param == "temperature"
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    with pytest.raises(openai.BadRequestError, match="function calls are not supported yet"):
        client.chat.completions.create(model="tiny", messages=MESSAGES, tools=[tool])
