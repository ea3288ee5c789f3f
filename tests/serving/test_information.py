"""What a server tells about itself and its vocabulary."""

from __future__ import annotations

import json
import re


def test_metrics_count_requests_and_tokens(start, described) -> None:
    """In Prometheus' text form."""
    with start(described()) as running:
        running.client.chat(max_tokens=3, logit_bias={"2": -1000})
        running.client.chat(max_tokens=3, logit_bias={"2": -1000}, stream=True)
        running.client.post("/v1/completions", b"{")
        running.client.get("/nothing/secret")
        reply = running.client.get("/metrics")
        text, usage = reply.content.decode(), running.client.chat(max_tokens=3).json["usage"]
    assert reply.headers["content-type"].startswith("text/plain; version=")
    assert 'quantlab_requests_total{path="/v1/chat/completions",status="200"} 2.0' in text
    assert 'quantlab_requests_total{path="/v1/completions",status="400"} 1.0' in text
    assert 'quantlab_requests_total{path="other",status="404"} 1.0' in text
    assert f"quantlab_prompt_tokens_total {2 * usage['prompt_tokens']}.0" in text
    assert "quantlab_generated_tokens_total 6.0" in text
    assert f"quantlab_cached_tokens_total {usage['prompt_tokens'] - 1}.0" in text
    assert "quantlab_queue_length 0.0" in text
    assert "quantlab_model_loaded 1.0" in text
    assert re.search(r"quantlab_first_piece_seconds_count 2\.0", text)


def test_the_log_has_a_line_for_each_request(start, described) -> None:
    """Who, what, how it ended, what it took; of a strange path not more than the path."""
    with start(described()) as running:
        running.client.chat(max_tokens=3, logit_bias={"2": -1000})
        running.client.chat(temperature=-1)
    line, refused = running.log
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/chat/completions", 200)
    assert (line["client"], line["model"], line["completion_tokens"]) == ("127.0.0.1", "tiny", 3)
    assert min(line["queue_ms"], line["run_ms"], line["total_ms"] - line["run_ms"]) >= 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line["time"])
    assert refused["status"] == 400
    assert refused["error"].startswith("temperature: ")
    assert "completion_tokens" not in refused


def test_texts_become_tokens_and_texts_again(running) -> None:
    """llama-server's endpoints."""
    client, tokenizer = running.client, running.service.host.tokenizer
    text = "The caf\u00e9 by the sea"
    ids = client.post("/tokenize", {"content": text}).json["tokens"]
    assert ids == tokenizer.encode(text, add_special_tokens=False)
    assert client.post("/tokenize", {"content": text, "add_special": True}).json["tokens"] == tokenizer.encode(text)
    pieces = client.post("/tokenize", {"content": text, "with_pieces": True}).json["tokens"]
    assert [piece["id"] for piece in pieces] == ids
    assert client.post("/detokenize", {"tokens": ids}).json == {"content": text}
    assert client.post("/detokenize", {"tokens": [10**30]}).status == 400


def test_a_conversation_is_written_as_the_model_reads_it(running) -> None:
    """A last message of the assistant is the beginning of the answer."""
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Who?"}]},
    ]
    client = running.client
    prompt = client.post("/apply-template", {"messages": messages}).json["prompt"]
    assert prompt == "Be brief.\n\nUser: Who?\nAssistant:"
    begun = [*messages, {"role": "assistant", "content": " The k"}]
    assert client.post("/apply-template", {"messages": begun}).json["prompt"] == f"{prompt} The k"


def test_properties_tell_what_a_request_gets(start, described) -> None:
    """llama-server's names where it has them."""
    from quantlab.generation.sampling import SamplingParams

    with start(described(params=SamplingParams(temperature=0.1, top_k=3), max_tokens=5)) as running:
        found = running.client.get("/props").json
        defaults = found["default_generation_settings"]
        assert (defaults["n_ctx"], defaults["n_predict"], defaults["temperature"], defaults["top_k"]) == (
            128,
            5,
            0.1,
            3,
        )
        assert found["model_alias"] == "tiny"
        reply = running.client.post("/v1/completions", {"prompt": "a", "logit_bias": {"2": -1000}}).json
        assert reply["usage"]["completion_tokens"] == 5


def test_the_description_is_whole(running) -> None:
    """Every reference leads somewhere, every path is there, and what it requires is what is refused."""
    reply = running.client.get("/openapi.json").json
    assert reply["openapi"] == "3.1.0"
    schemas = reply["components"]["schemas"]
    assert set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(reply))) <= set(schemas)
    for path, operations in reply["paths"].items():
        for method, operation in operations.items():
            assert operation["summary"]
            if method == "post":
                content = operation["requestBody"]["content"]["application/json"]
                required = schemas[content["schema"]["$ref"].rpartition("/")[2]]["required"]
                refused = running.client.post(path, {})
                assert refused.status == (404 if path == "/v1/embeddings" else 400)
                assert refused.error["param"] in (*required, None)
            else:
                assert running.client.get(path).status == 200
