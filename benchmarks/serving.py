"""What a server costs beside `generate`, and what it stands: the gates of docs/serving.md but lm-eval's.

    python benchmarks/serving.py WORK_FOLDER [--rounds 15] [--generate 300] [--threads 2] [--requests 1000]
                                 [--json FILE] [--only overhead,malformed,disconnect,clients]
                                 [--models fable-9m,random-346m]

overhead: the same random prompts continued in this process and by a server, in turns; both must write the same text.
The time to the first token is that to the first piece of text, here of `complete`'s callback, there of the stream. The
decoding speed of the server is taken twice: as it tells it, and as the client sees it, from the first piece to the end
of the stream. malformed: see serving_faults.py. disconnect: from closing a stream to the first byte of the request that
waits behind it, which includes that one's prefill. clients: 20 at once, with a queue of 20 and with one of 5.
"""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from larger_model import SHIPPED, machine, packed_models
from served_model import Served, served
from serving_faults import malformed

from quantlab import load_engine, load_tokenizer, quantize_checkpoint
from quantlab.generation.generator import complete
from quantlab.generation.sampling import SamplingParams

PROMPT_TOKENS = 64
CLIENTS = 20


def main() -> None:
    """Parse, measure each part for each model, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--generate", type=int, default=300)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--models", default="fable-9m,random-346m")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found: dict[str, Any] = {"machine": machine()}
    for name in arguments.models.split(","):
        model = packed(arguments.work, name)
        for part in arguments.only.split(","):
            result = found.setdefault(name, {})[part] = PARTS[part](model, arguments)
            print(name, part, json.dumps(result), flush=True)
    found["machine_after"] = machine()
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found) + "\n", encoding="utf-8")


def packed(work: Path, name: str) -> Path:
    """A model's folder, in Q4_1."""
    if name != "fable-9m":
        return packed_models(work)["random 346 M"]
    work.mkdir(parents=True, exist_ok=True)
    folder = work / "fable-9m-q4_1"
    if not folder.exists():
        quantize_checkpoint(SHIPPED, folder)
    return folder


def overhead(model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Ratios of decoding speed and differences of the time to the first token, server against process."""
    tokenizer, engine = load_tokenizer(model), load_engine(model, threads=arguments.threads)
    end = max(tokenizer.eos)
    count = min(arguments.generate, engine.context - PROMPT_TOKENS)
    rows = []
    with served(model, "--threads", str(arguments.threads)) as server:
        for number in range(-2, arguments.rounds):  # two to warm up
            prompt = np.random.default_rng(number + 2).integers(300, engine.vocabulary, PROMPT_TOKENS).tolist()
            ways: list[Callable[[], tuple[str, float, float, float]]] = [
                lambda prompt=prompt: inside(engine, tokenizer, prompt, count, end),
                lambda prompt=prompt: outside(server, prompt, count, end),
            ]
            order = (0, 1) if number % 2 else (1, 0)
            measured = {way: ways[way]() for way in order}
            if measured[0][0] != measured[1][0]:
                raise SystemExit(f"round {number}: the texts differ")
            if number >= 0:
                rows.append((measured[0][1:], measured[1][1:]))
    return {
        "rounds": len(rows),
        "tokens_per_second": statistics.median(mine[1] for mine, _ in rows),
        "speed_told_ratio": spread([theirs[1] / mine[1] for mine, theirs in rows]),
        "speed_seen_ratio": spread([theirs[2] / mine[1] for mine, theirs in rows]),
        "first_token_ms": statistics.median(1000 * mine[0] for mine, _ in rows),
        "first_token_added_ms": spread([1000 * (theirs[0] - mine[0]) for mine, theirs in rows]),
    }


def inside(engine: Any, tokenizer: Any, prompt: list[int], count: int, end: int) -> tuple[str, float, float, float]:
    """Text, seconds to its first piece, tokens a second as told, and again."""
    pieces: list[float] = []
    engine.rewind(0)
    params = SamplingParams(logit_bias={end: -1000.0})
    started = time.perf_counter()
    done = complete(
        engine,
        tokenizer,
        prompt,
        max_tokens=count,
        params=params,
        on_text=lambda text: pieces.append(time.perf_counter()),
    )
    speed = done.timings.decode_tokens_per_second
    return done.text, pieces[0] - started, speed, speed


def outside(server: Served, prompt: list[int], count: int, end: int) -> tuple[str, float, float, float]:
    """The same of the server; the second speed is the client's."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
    body = {"prompt": prompt, "max_tokens": count, "stream": True, "logit_bias": {str(end): -1000}}
    started = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body))
    texts, first, timings = [], 0.0, {}
    for line in connection.getresponse():
        if not line.startswith(b"data: {"):
            continue
        first = first or time.perf_counter()
        event = json.loads(line[6:])
        texts.append(event["choices"][0]["text"])
        timings = event.get("timings", timings)
    finished = time.perf_counter()
    connection.close()
    return "".join(texts), first - started, timings["predicted_per_second"], timings["predicted_n"] / (finished - first)


def disconnect(model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds until the engine is free for the next."""
    seconds = []
    with served(model, "--threads", str(arguments.threads), "--queue", "4") as server:
        for _ in range(arguments.rounds):
            running = send(server.port, {"prompt": [5], "max_tokens": 100_000, "stream": True})
            running.recv(1)
            waiting = send(server.port, {"prompt": [5], "max_tokens": 1})
            time.sleep(0.02)
            started = time.perf_counter()
            running.close()
            if not waiting.recv(12).endswith(b"200"):
                raise SystemExit("the request behind was not answered")
            seconds.append(time.perf_counter() - started)
            waiting.close()
    return {"rounds": len(seconds), "milliseconds": spread([1000 * each for each in seconds])}


def send(port: int, body: dict[str, Any]) -> socket.socket:
    """A request on a socket; without an end token, so that the text goes on."""
    content = json.dumps({"logit_bias": {"2": -1000}, **body}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", port), timeout=600)
    connection.sendall(head.encode() + content)
    return connection


def clients(model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """How long each of 20 waited where the queue holds all, and who was refused where it holds five."""
    body = {"prompt": "Once upon a time", "max_tokens": 40, "logit_bias": {"2": -1000}}
    found: dict[str, Any] = {}
    for queue in (CLIENTS, 5):
        with served(model, "--threads", str(arguments.threads), "--queue", str(queue)) as server:
            server.json("/v1/completions", body)
            started = time.perf_counter()
            with ThreadPoolExecutor(CLIENTS) as pool:
                replies = list(pool.map(lambda begun: timed(server, body, begun), [started] * CLIENTS))
        answered = sorted(seconds for status, _, seconds in replies if status == 200)
        refused = [retry for status, retry, _ in replies if status == 429]
        turns = [later - sooner for sooner, later in zip([0.0, *answered], answered, strict=False)]
        found[f"queue_{queue}"] = {
            "answered": len(answered),
            "refused_with_retry_after": sum(retry is not None for retry in refused),
            "refused": len(refused),
            "seconds_in_all": answered[-1],
            "longest_turn_over_median": max(turns) / statistics.median(turns),
        }
    return found


def timed(server: Served, body: dict[str, Any], started: float) -> tuple[int, str | None, float]:
    """Status, Retry-After, and seconds since the start of all."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
    connection.request("POST", "/v1/completions", json.dumps(body))
    reply = connection.getresponse()
    reply.read()
    connection.close()
    return reply.status, reply.getheader("Retry-After"), time.perf_counter() - started


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def faults(model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Malformed requests, and memory before and after."""
    with served(model, "--threads", str(arguments.threads), "--max-tokens", "8") as server:
        return malformed(server, arguments.requests)


PARTS = {"overhead": overhead, "malformed": faults, "disconnect": disconnect, "clients": clients}

if __name__ == "__main__":
    main()
