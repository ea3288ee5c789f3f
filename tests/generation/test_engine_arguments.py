"""Token ids and arguments that no engine can use: one line that names them, and the sequence stays as it was."""

from __future__ import annotations

import numpy as np
import pytest

from quantlab import InputError
from quantlab.generation.native_engine import NativeEngine, load_native


@pytest.fixture(scope="module")
def engine(make_model, tmp_path_factory) -> NativeEngine:
    """Holds three tokens."""
    made = load_native(make_model(tmp_path_factory.mktemp("model") / "llama", "llama"), threads=1, context=16)
    made.prefill([5, 6, 7])
    return made


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "the prompt holds no token"),
        ([5, -1], "token id -1 is outside the vocabulary of 512"),
        ([512], "token id 512 is outside"),
        ([2**31], "token id 2147483648 is outside"),
        ([2**100], "is outside the vocabulary"),
        (np.array([600], np.uint16), "token id 600 is outside"),
        ([5.0], "token id 5.0: a whole number is expected"),
        ([True], "token id True: a whole number is expected"),
        (["5"], "token id '5': a whole number is expected"),
        ([None], "token id None: a whole number is expected"),
        (np.array([5.5]), "a whole number is expected"),
        ([5] * 17, "the prompt has 17 tokens; the context holds 16"),
    ],
)
def test_token_ids(engine, ids, message):
    for use in (engine.prefill, engine.logits_of):
        with pytest.raises(InputError, match=message):
            use(ids)
        assert engine.tokens == [5, 6, 7]
        assert engine._decoder.position == 3


def test_numpys_integers_are_token_ids(make_model, tmp_path):
    folder = make_model(tmp_path / "llama", "llama")
    engine, other = load_native(folder, threads=1), load_native(folder, threads=1)
    engine.prefill(np.array([5, 6, 7], np.int64))
    other.prefill([5, 6, 7])
    assert np.array_equal(engine.logits(), other.logits())
    engine.save(tmp_path / "cache")
    assert other.restore(tmp_path / "cache")
    assert other.tokens == [5, 6, 7]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 0}, "context 0: at least 1 token is needed"),
        ({"threads": -3}, "threads -3: at least 1 is needed"),
        ({"threads": 10**6}, "threads 1000000: at most 1024 can be used"),
        ({"kv": "q8_0"}, "kv q8_0: .* has heads of 16, no multiple of 32; choose f16"),
    ],
)
def test_arguments(make_model, tmp_path, arguments, message):
    folder = make_model(tmp_path / "llama", "llama")
    with pytest.raises(InputError, match=message):
        load_native(folder, **arguments)


@pytest.mark.parametrize("position", [-1, 4])
def test_positions(engine, position):
    with pytest.raises(InputError, match=f"position {position}: the sequence has 3 tokens"):
        engine.rewind(position)
