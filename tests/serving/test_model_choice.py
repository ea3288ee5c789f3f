"""Which weights answer: adapters by the request's model, and a model that is let go of and loaded again."""

from __future__ import annotations

import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest

from quantlab.adapters.adapter import Adapter, LowRankPair
from quantlab.adapters.peft_folder import write_peft_folder
from quantlab.checkpoint import open_checkpoint
from quantlab.errors import InputError
from quantlab.generation.generate import generate
from quantlab.generation.prompt_cache import PromptCache
from quantlab.generation.sampling import SamplingParams
from quantlab.serving.settings import ServerSettings


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.fixture(scope="module")
def adapters(llama_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters of random factors."""
    checkpoint, folder = open_checkpoint(llama_model), tmp_path_factory.mktemp("adapters")
    linear = [name for name in checkpoint.names if any(fnmatchcase(name, each) for each in checkpoint.family.linear)]
    made = {}
    for seed, name in enumerate(("tales", "poems")):
        random = np.random.default_rng(seed)
        pairs = {}
        for weight in linear:
            rows, columns = checkpoint.shape(weight)
            a, b = random.normal(0, 0.2, (4, columns)), random.normal(0, 0.5, (rows, 4))
            pairs[weight] = LowRankPair(a.astype(np.float32), b.astype(np.float32), 1.0)
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": "all-linear"}
        write_peft_folder(Adapter(folder / name, "lora", pairs), config, folder / name)
        made[name] = folder / name
    return made


def test_a_request_chooses_an_adapter_by_its_name(start, described, llama_model: Path, adapters) -> None:
    """In any order of requests, each gets what `quantlab generate --adapter` writes."""

    def expected(chosen: list[Path]) -> str:
        greedy = SamplingParams(temperature=0)
        return generate(llama_model, "The sea", max_tokens=8, params=greedy, adapters=chosen, threads=1).text

    texts = {"tiny": expected([]), **{name: expected([folder]) for name, folder in adapters.items()}}
    assert len(set(texts.values())) == 3
    with start(described(adapters=adapters)) as running:
        listed = running.client.get("/v1/models").json["data"]
        assert [(model["id"], model["parent"]) for model in listed] == [
            ("tiny", None),
            ("tales", "tiny"),
            ("poems", "tiny"),
        ]
        for name in ("tales", "tiny", "poems", "tales", "tales", "tiny"):
            asked = {"prompt": "The sea", "max_tokens": 8, "temperature": 0, "model": name}
            reply = running.client.post("/v1/completions", asked).json
            assert reply["model"] == name
            assert reply["choices"][0]["text"] == texts[name]


def test_an_adapter_that_does_not_fit_is_refused_at_the_start(start, described, tmp_path: Path) -> None:
    """Not at the first request."""
    with pytest.raises(InputError, match="nothing"), start(described(adapters={"nothing": tmp_path / "nothing"})):
        pass


def test_an_idle_model_is_let_go_of_and_comes_back(start, described) -> None:
    """The same answer before and after; /props and /metrics say when it is away."""
    with start(described(), ServerSettings(port=0, idle_unload=0.05)) as running:
        host, before = running.service.host, running.client.chat(temperature=0).json
        wait_until(lambda: not host.is_loaded)
        assert running.client.get("/props").json["is_sleeping"] is True
        assert b"quantlab_model_loaded 0.0" in running.client.get("/metrics").content
        after = running.client.chat(temperature=0).json
        assert after["choices"] == before["choices"]
        assert after["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_a_model_that_has_gone_meanwhile_is_told_of(start, make_model, tmp_path: Path) -> None:
    """503, and the server goes on."""
    from quantlab.serving.settings import ModelSettings

    model = make_model(tmp_path / "model", "llama")
    with start(ModelSettings(model=str(model), name="tiny", threads=1)) as running:
        running.service.host.release()
        (model / "model.safetensors").rename(model / "moved")
        reply = running.client.chat()
        assert (reply.status, reply.error["code"]) == (503, "model_not_loaded")
        (model / "moved").rename(model / "model.safetensors")
        assert running.client.chat().status == 200


def test_prompts_of_clients_in_turns_are_found_on_disk(start, described, llama_model: Path, tmp_path: Path) -> None:
    """With a prompt cache: what another request pushed out of the engine, answers too, and after a new start."""
    first = (
        "The harbour of the old town lay still and the ships of the king had gone to the island of the birds in spring."
    )
    asked = {"prompt": first, "max_tokens": 12, "temperature": 0, "logit_bias": {"2": -1000}}

    def cached(running, prompt: str | list[int]) -> int:
        reply = running.client.post("/v1/completions", {**asked, "prompt": prompt}).json
        return reply["usage"]["prompt_tokens_details"]["cached_tokens"]

    with start(described(prompt_cache=PromptCache(tmp_path / "cache"))) as running:
        encode = running.service.host.tokenizer.encode
        reply = running.client.post("/v1/completions", {**asked, "logprobs": 0}).json
        assert cached(running, "A" + first) < 10
        assert cached(running, first) == len(encode(first)) - 1
        again = running.client.post("/v1/completions", {**asked, "logprobs": 0}).json
        assert again["choices"] == reply["choices"]
    params = SamplingParams(temperature=0, logit_bias={2: -1000})
    written = generate(llama_model, first, max_tokens=12, params=params, threads=1).token_ids
    with start(described(prompt_cache=PromptCache(tmp_path / "cache"))) as running:
        conversation = [*encode(first), *written, 5]
        assert cached(running, conversation) == len(conversation) - 2  # all but what was drawn last, and what is new


def test_the_torch_engine_serves_too(start, described, llama_model: Path, adapters) -> None:
    """One sample after another; adapters it does not exchange."""
    expected = [
        generate(llama_model, "The sea", max_tokens=4, params=SamplingParams(seed=seed), engine="torch").text
        for seed in (0, 1)
    ]
    with start(described(engine="torch")) as running:
        assert running.client.get("/v1/models").json["data"][0]["engine"] == "torch"
        reply = running.client.post("/v1/completions", {"prompt": "The sea", "max_tokens": 4, "n": 2}).json
        assert [choice["text"] for choice in reply["choices"]] == expected
    with (
        pytest.raises(InputError, match="does not exchange adapters"),
        start(described(engine="torch", adapters=adapters)),
    ):
        pass
