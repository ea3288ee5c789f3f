"""Rotary embeddings between transformers' parameters and GGUF's: divisors, factors, and what is missing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gguf_cases import CASES, SIZES
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from quantlab.checkpoint.checked_values import CheckedValues, shortest
from quantlab.checkpoint.gguf_architectures import ROWS
from quantlab.checkpoint.rope import (
    FREQS,
    LONG,
    SHORT,
    Rope,
    gguf_of_rope,
    llama3_divisors,
    parameters_of_rope,
    rope_of_config,
    rope_of_gguf,
)
from quantlab.errors import InputError

LLAMA = ROWS["llama"].rope
PHI3 = ROWS["phi3"].rope
LLAMA31 = Rope(500000.0, 128, "llama3", factor=8.0, original_context=8192)
LLAMA32 = Rope(500000.0, 64, "llama3", factor=32.0, original_context=8192)


def inverse_frequencies(rope: Rope) -> tuple[torch.Tensor, float]:
    """transformers' own."""
    parameters = parameters_of_rope(rope, LLAMA, rope.dims, 131072)
    config = LlamaConfig(
        hidden_size=4 * rope.dims, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=parameters
    )
    return ROPE_INIT_FUNCTIONS[rope.kind](config, torch.device("cpu"))


def back(metadata: dict[str, Any], tensors: dict[str, np.ndarray], use=LLAMA, head_dim=8, context=64) -> dict[str, Any]:
    """The `rope_parameters` of a file that says this."""
    values = CheckedValues(metadata, "f", way_out="convert it again")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    rope = rope_of_gguf(values, use, head_dim, context, shapes, tensors.__getitem__)
    return parameters_of_rope(rope, use, head_dim, context)


@pytest.mark.parametrize("rope", [LLAMA31, LLAMA32], ids=["8 of 128", "32 of 64"])
def test_llama3_divisors_are_those_of_transformers(rope):
    plain = 1 / rope.theta ** (np.arange(0, rope.dims, 2) / rope.dims)
    frequencies, attention = inverse_frequencies(rope)
    assert attention == 1
    divisors = llama3_divisors(rope)
    assert divisors.dtype == np.float32
    assert divisors[0] == 1
    assert divisors[-1] == rope.factor
    assert ((divisors > 1) & (divisors < rope.factor)).any()
    np.testing.assert_allclose(plain / divisors, frequencies.double().numpy(), rtol=1e-6)


@pytest.mark.parametrize("original", [32, 2048, 8192, 131072])
@pytest.mark.parametrize("rope", [LLAMA31, LLAMA32], ids=["8 of 128", "32 of 64"])
def test_llama3_parameters_are_found_from_their_divisors(rope, original):
    """Also from divisors computed in fp32 all the way, as llama.cpp's converter does."""
    rope = Rope(rope.theta, rope.dims, "llama3", factor=rope.factor, original_context=original)
    waves = np.float32(2 * np.pi) * np.float32(rope.theta) ** (np.arange(0, rope.dims, 2, np.float32) / rope.dims)
    smooth = (np.float32(original) / waves - np.float32(1)) / np.float32(3)
    blurred = 1 / ((1 - smooth) / np.float32(rope.factor) + smooth)
    blurred = np.where(waves < original / 4, 1, np.where(waves > original, rope.factor, blurred)).astype(np.float32)
    expected = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": rope.factor,
        "original_max_position_embeddings": original,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    for divisors in (llama3_divisors(rope), blurred):
        assert back({"rope.freq_base": 500000.0}, {FREQS: divisors}, head_dim=rope.dims) == expected


def test_other_divisors_are_kept_and_divide_exactly():
    divisors = np.array([1, 1.7, 2.3, 33.3], np.float32)
    parameters = back({"rope.freq_base": 10000.0}, {FREQS: divisors})
    assert parameters["short_factor"] == parameters["long_factor"] == [1.0, 1.7, 2.3, 33.3]
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, max_position_embeddings=64, rope_parameters=dict(parameters)
    )
    frequencies, attention = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))
    powers = 10000.0 ** (torch.arange(0, 8, 2, dtype=torch.int64).float() / 8)
    assert torch.equal(frequencies, 1 / (torch.from_numpy(divisors) * powers))
    assert attention == 1
    # and out again as the same tensor
    values = CheckedValues({"rope_parameters": parameters}, "f")
    metadata, tensors = gguf_of_rope(rope_of_config(values, LLAMA, 8, 64), LLAMA)
    assert metadata == {"rope.freq_base": 10000.0}
    assert list(tensors) == [FREQS]
    assert np.array_equal(tensors[FREQS], divisors)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(attention=st.decimals("0.1", "5", places=4).map(float), factor=st.integers(8, 400).map(lambda n: n / 8))
def test_an_attention_factor_survives(attention, factor):
    """llama.cpp's attn_factor is what remains after yarn's own."""
    rope = Rope(10000.0, 8, "yarn", factor=factor, original_context=16, attention_factor=attention)
    metadata, _ = gguf_of_rope(rope, LLAMA)
    metadata = {key: float(np.float32(v)) if isinstance(v, float) else v for key, v in metadata.items()}
    assert parameters_of_rope(rope, LLAMA, 8, 64) == back(metadata, {})


def test_what_llama_cpps_converter_copies_of_yarn_is_read():
    metadata = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16}
    usual = back(metadata, {})
    assert usual == {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    copied = {"yarn_attn_factor": 1.25, "yarn_beta_fast": 16.0, "yarn_beta_slow": 1.0, "yarn_ext_factor": 1.0}
    copied = {f"rope.scaling.{key}": value for key, value in copied.items()}
    assert back(metadata | copied, {}) == usual | {"attention_factor": 1.25, "beta_fast": 16.0}


def test_a_factor_without_a_type_is_linear():
    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 0.1}
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    factor = float(np.float32(0.1))
    assert back({"rope.scaling.factor": factor}, {}) == linear
    assert back({"rope.scale_linear": factor}, {}) == linear
    assert back({"rope.scaling.factor": factor, "rope.scaling.type": "none"}, {}) == plain
    assert back({"rope.scaling.factor": 0.0}, {}) == plain
    assert back({"rope.scaling.factor": 1.0, "rope.scaling.type": "linear"}, {}) == plain


ONES = np.ones(4, np.float32)


@pytest.mark.parametrize(
    ("use", "metadata", "tensors", "message"),
    [
        (LLAMA, {}, {FREQS: np.ones(5, np.float32)}, "f: tensor rope_freqs.weight is not 4 positive numbers; convert"),
        (LLAMA, {}, {FREQS: np.ones((4, 1), np.float32)}, "tensor rope_freqs.weight is not 4 positive numbers"),
        (LLAMA, {}, {FREQS: ONES * 0}, "tensor rope_freqs.weight is not 4 positive numbers"),
        (LLAMA, {}, {FREQS: ONES * np.float32("nan")}, "tensor rope_freqs.weight is not 4 positive numbers"),
        (
            LLAMA,
            {},
            {FREQS: ONES, LONG: ONES},
            "rope.scaling.type does not go with rope_freqs.weight, rope_factors_long",
        ),
        (LLAMA, {}, {LONG: ONES, SHORT: ONES}, "rope.scaling.type does not go with rope_factors_long.weight, rope_"),
        (LLAMA, {"rope.scaling.type": "longrope"}, {LONG: ONES}, "rope.scaling.type does not go with"),
        (LLAMA, {"rope.scaling.type": "yarn"}, {FREQS: ONES}, "rope.scaling.type does not go with rope_freqs.weight"),
        (LLAMA, {"rope.scaling.factor": 2.0}, {FREQS: ONES}, "rope.scaling.type does not go with rope_freqs.weight"),
        (PHI3, {}, {LONG: ONES}, "rope.scaling.type does not go with rope_factors_long.weight and rope_factors_short"),
        (PHI3, {}, {FREQS: ONES}, "rope.scaling.type does not go with"),
        (
            PHI3,
            {"rope.scaling.type": "yarn"},
            {},
            "rope.scaling.type asks for yarn; this architecture has default, long",
        ),
        (
            ROWS["qwen2"].rope,
            {},
            {FREQS: ONES},
            "rope.scaling.type asks for llama3; this architecture has default, linear",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(use, metadata, tensors, message):
    with pytest.raises(InputError) as caught:
        back(metadata, tensors, use)
    assert message in str(caught.value)


def test_divisors_of_the_wrong_size_are_not_read():
    """A header may claim any shape."""
    shapes = {FREQS: (2**40,)}
    with pytest.raises(InputError, match="is not 4 positive numbers"):
        rope_of_gguf(CheckedValues({}, "f"), LLAMA, 8, 64, shapes, lambda name: pytest.fail(name))


def test_the_share_of_rotated_columns_is_the_one_that_transformers_turns_into_them():
    use = ROWS["gpt_neox"].rope
    for head_dim in range(2, 260):
        for dims in range(2, head_dim + 1, 2):
            share = parameters_of_rope(Rope(1.0, dims), use, head_dim, 64)["partial_rotary_factor"]
            assert int(head_dim * share) == dims
    assert parameters_of_rope(Rope(1.0, 32), use, 80, 64)["partial_rotary_factor"] == 0.4


def test_phi3_takes_the_original_context_from_outside_or_else_4096():
    values = ROWS["phi3"].config_values({"rope_scaling": CASES["phi3-su"]["rope_scaling"]}, "f")
    assert rope_of_config(values, PHI3, 8, 8192).original_context == 4096
    values = ROWS["phi3"].config_values(CASES["phi3-longrope"], "f")
    assert rope_of_config(values, PHI3, 8, 64).original_context == 16


def test_missing_parameters_of_a_new_config_take_defaults():
    values = ROWS["llama"].config_values({**SIZES, "rope_parameters": {"rope_type": "default"}}, "f")
    assert rope_of_config(values, LLAMA, 8, 64) == Rope(10000.0, 8)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_shortest_is_the_same_fp32(value):
    assert np.float32(shortest(value)) == np.float32(value)
    assert len(repr(shortest(value))) <= len(repr(value))


def test_shortest_gives_the_decimals_that_people_write():
    for value in (1e-05, 1e-06, 0.1, 500000.0, 1.1902381, 3e-12):
        assert shortest(float(np.float32(value))) == value
