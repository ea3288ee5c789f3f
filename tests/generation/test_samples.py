"""Several continuations of one prompt: each is the completion of its own seed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from quantlab.checkpoint import Tokenizer, load_tokenizer
from quantlab.errors import InputError
from quantlab.generation.engines import open_engine
from quantlab.generation.generator import complete
from quantlab.generation.samples import complete_many
from quantlab.generation.sampling import SamplingParams

PROMPT = "The lamp in the boathouse"
SAMPLED = SamplingParams(temperature=1.2, top_k=0, top_p=1.0, min_p=0.0, seed=5)


@pytest.fixture(scope="module")
def tokenizer(llama_model: Path) -> Tokenizer:
    return load_tokenizer(llama_model)


@pytest.mark.parametrize("kind", ["native", "torch"])
def test_sample_i_is_the_completion_of_seed_plus_i(llama_model: Path, tokenizer: Tokenizer, kind: str) -> None:
    engine = open_engine(llama_model, kind)
    found = complete_many(engine, tokenizer, PROMPT, 4, max_tokens=12, params=SAMPLED)
    assert len({each.token_ids for each in found}) > 1
    for index, each in enumerate(found):
        params = replace(SAMPLED, seed=SAMPLED.seed + index)
        alone = complete(engine, tokenizer, PROMPT, max_tokens=12, params=params)
        assert (each.text, each.token_ids, each.finish_reason) == (alone.text, alone.token_ids, alone.finish_reason)
        assert each.engine == kind


@pytest.mark.parametrize(
    ("samples", "seed", "message"),
    [(0, 0, "0 samples: at least one"), (2, (1 << 64) - 1, "seed must be at least 0 and below")],
)
def test_samples_that_cannot_be_drawn(
    llama_model: Path, tokenizer: Tokenizer, samples: int, seed: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        complete_many(open_engine(llama_model), tokenizer, PROMPT, samples, params=SamplingParams(seed=seed))
