"""The decoder, given what it cannot use: a Python exception that names it, and nothing worse."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import quantlab.native._core as _core
from bad_arguments import (
    FUZZ,
    REFUSALS,
    anything,
    arrays,
    call,
    every_other,
    frozen,
    matrix,
    misaligned,
    names,
    small,
    whole,
)
from hypothesis import given
from hypothesis import strategies as st

from quantlab import native

HIDDEN, HEADS, KEY_HEADS, HEAD, INNER, VOCABULARY, CONTEXT = 32, 4, 2, 32, 48, 21, 40
F16 = 1  # the cache's types are f32, f16, q8_0


def spec(**changes: Any) -> native.DecoderSpec:
    made = native.DecoderSpec()
    values = {"layers": 1, "hidden": HIDDEN, "heads": HEADS, "kv_heads": KEY_HEADS, "head_size": HEAD, "inner": INNER}
    values |= {"vocabulary": VOCABULARY, "rotated": HEAD, "attention_scale": 0.2, "windows": [0], "rope_tables": [0]}
    for name, value in {**values, **changes}.items():
        setattr(made, name, value)
    return made


def weights(context: int = CONTEXT, without: str = "") -> native.DecoderWeights:
    made = native.DecoderWeights(1)
    made.set_embedding(matrix(VOCABULARY, HIDDEN))
    for name, rows, columns in (
        ("query", HEADS * HEAD, HIDDEN),
        ("key", KEY_HEADS * HEAD, HIDDEN),
        ("value", KEY_HEADS * HEAD, HIDDEN),
        ("output", HIDDEN, HEADS * HEAD),
        ("gate", INNER, HIDDEN),
        ("up", INNER, HIDDEN),
        ("down", HIDDEN, INNER),
        ("head", VOCABULARY, HIDDEN),
    ):
        if name != without:
            made.set_matrix(0, name, matrix(rows, columns))
    for name in ("attention_norm", "inner_norm", "final_norm"):
        made.set_norm(0, name, np.ones(HIDDEN, np.float32))
    angles = np.zeros(context * HEAD // 2, np.float32)
    made.add_rotary_table(np.cos(angles), np.sin(angles))
    return made


def decoder(threads: int = 1) -> native.Decoder:
    return native.Decoder(spec(), weights(), CONTEXT, F16, True, threads)


def logits(rows: int = 1) -> np.ndarray:
    return np.zeros((rows, VOCABULARY), np.float32)


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


@pytest.mark.parametrize(
    ("tokens", "out", "error", "message"),
    [
        (np.array([1.0]), logits(), TypeError, r"tokens: expected .* int32 \[tokens\] .*got float64 \[1\]"),
        (np.array([1]), logits(), TypeError, r"tokens: .*got int64 \[1\]"),
        (np.array([True]), logits(), TypeError, r"tokens: .*got bool \[1\]"),
        (np.array([[1]], np.int32), logits(), TypeError, r"tokens: .*got int32 \[1, 1\]"),
        ([1], logits(), TypeError, "tokens: .*got list"),
        (None, logits(), TypeError, "append.*tokens: object, logits: object"),
        (ids(1, 2, 3, 4)[::2], logits(), TypeError, r"tokens: .*got int32 \[2\], not contiguous"),
        (misaligned(ids(1)), logits(), TypeError, "tokens: .*address is no multiple of 4"),
        (ids(1).astype(">i4"), logits(), TypeError, "tokens: .*got >i4"),
        (ids(), logits(0), ValueError, "no tokens"),
        (ids(-1), logits(), ValueError, "token id -1 is outside the vocabulary of 21"),
        (ids(3, 21), logits(), ValueError, "token id 21 is outside the vocabulary of 21"),
        (ids(2**31 - 1), logits(), ValueError, "token id 2147483647"),
        (ids(*[1] * 41), logits(), ValueError, "41 tokens do not fit: the context of 40 holds 0 already"),
        (ids(1), logits(2), ValueError, "logits has 2 rows; expected at most one for each of 1 tokens"),
        (ids(1), np.zeros((1, 20), np.float32), ValueError, "logits has 20 columns; expected 21"),
        (ids(1), np.zeros((1, 21)), TypeError, r"logits: expected a writable .* float32 .*got float64 \[1, 21\]"),
        (ids(1), np.zeros(21, np.float32), TypeError, r"logits: .*got float32 \[21\]"),
        (ids(1), frozen(logits()), TypeError, r"logits: .*got float32 \[1, 21\], read-only"),
        (ids(1, 2), np.asfortranarray(logits(2)), TypeError, "logits: .*not contiguous"),
        (ids(1), every_other(logits()), TypeError, "logits: .*not contiguous"),
        (ids(1), misaligned(logits()), TypeError, "logits: .*address is no multiple of 4"),
    ],
)
def test_append(tokens, out, error, message):
    one = decoder()
    with pytest.raises(error, match=message):
        one.append(tokens, out)
    assert one.position == 0
    one.append(ids(1), logits())
    assert one.position == 1


def test_the_context_overflows_by_one():
    one = decoder()
    one.append(ids(*[1] * 40), logits())
    with pytest.raises(ValueError, match="1 tokens do not fit: the context of 40 holds 40 already"):
        one.append(ids(1), logits())
    assert one.position == 40


@pytest.mark.parametrize("position", [-1, 3, 2**31 - 1, -(2**31)])
def test_rewind_beyond_the_sequence(position):
    one = decoder()
    one.append(ids(1, 2), logits(0))
    with pytest.raises(ValueError, match=f"position {position}: the sequence has 2 tokens"):
        one.rewind(position)


@pytest.mark.parametrize("wrong", ["x", 1.5, None, 2**40, [1]])
def test_numbers_that_are_none(wrong):
    one = decoder()
    for door in (one.rewind, one.cache_bytes, native.DecoderWeights, _core.ThreadPool):
        with pytest.raises(TypeError):
            door(wrong)


def test_caches_of_another_length():
    one = decoder()
    one.append(ids(1, 2, 3), logits())
    cache = np.zeros(one.cache_bytes(3), np.uint8)
    one.export_cache(cache, 0, 3)
    expected = f"expected {len(cache)}, those of the cache of 3 tokens"
    with pytest.raises(ValueError, match=f"bytes has {len(cache) - 1} bytes; {expected}"):
        one.export_cache(cache[1:], 0, 3)
    with pytest.raises(ValueError, match=f"bytes has 0 bytes; {expected}"):
        one.import_cache(cache[:0], 0, 3)
    for first in (-16, 1, 16, 2**31 - 1):
        with pytest.raises(ValueError, match=f"first is {first}; expected a multiple of 16 up to 3"):
            one.import_cache(cache, first, first)
        with pytest.raises(ValueError, match=f"first is {first}"):
            one.export_cache(cache, first, 3)
    with pytest.raises(ValueError, match="last is -1; expected 0 or more"):
        one.import_cache(cache, 0, -1)
    with pytest.raises(ValueError, match="last is 4: the sequence has 3 tokens"):
        one.export_cache(cache, 0, 4)
    for positions in (41, 2**31 - 1):
        with pytest.raises(ValueError, match=f"{positions} positions do not fit a context of 40"):
            one.import_cache(cache, 0, positions)
    for positions in (-1, 41, 2**31 - 1):
        with pytest.raises(ValueError, match=f"{positions} positions do not fit a context of 40"):
            one.cache_bytes(positions)
    with pytest.raises(TypeError, match=r"bytes: .*read-only"):
        one.export_cache(frozen(cache.copy()), 0, 3)
    with pytest.raises(TypeError, match=r"bytes: .*got int8"):
        one.import_cache(cache.view(np.int8), 0, 3)
    assert one.position == 3
    one.import_cache(frozen(cache), 0, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers is 0; expected 1 to"),
        ({"layers": 2}, "weights has 1 entries; expected one for each of 2 layers"),
        ({"hidden": -32}, "hidden is -32; expected 1 to"),
        ({"hidden": 40}, "hidden is 40; expected a multiple of 16"),
        ({"hidden": 64}, r"embedding has shape \[21, 32\]; expected \[21, 64\]"),
        ({"heads": 3}, "heads is 3; expected a multiple of 2, the number of key heads"),
        ({"heads": 2**30, "head_size": 2**20}, "heads is 1073741824; expected 1 to"),
        ({"heads": 2**20, "head_size": 2**20}, r"heads \* head_size is 1099511627776; expected 1 to"),
        ({"kv_heads": 0}, "kv_heads is 0"),
        ({"head_size": 16, "rotated": 16}, r"layer 0: query has shape \[128, 32\]; expected \[64, 32\]"),
        ({"inner": 64}, r"layer 0: gate has shape \[48, 32\]; expected \[64, 32\]"),
        ({"vocabulary": 22}, r"embedding has shape \[21, 32\]; expected \[22, 32\] or more rows"),
        ({"vocabulary": 20}, r"head has shape \[21, 32\]; expected \[20, 32\]"),
        ({"norm": 2}, "norm is 2; expected 0 to 1"),
        ({"norm": 1}, "layer 0: attention_norm.bias has 0 elements; expected 32"),
        ({"activation": -1}, "activation is -1; expected 0 to 2"),
        ({"gated": False}, "layer 0: gate is given; expected none: the spec is not gated"),
        ({"rotated": 33}, "rotated is 33; expected 0 to 32"),
        ({"rotated": 31}, "rotated is 31; expected a multiple of 2"),
        ({"windows": []}, "windows has 0 entries; expected one for each of 1 layers"),
        ({"windows": [-1]}, "a window is -1; expected 0 to"),
        ({"rope_tables": [0, 0]}, "rope_tables has 2 entries"),
        ({"rope_tables": [1]}, "a layer's rotary table is 1; expected 0 to 0"),
        ({"epsilon": float("nan")}, "epsilon is nan; expected a finite number"),
        ({"attention_scale": float("inf")}, "attention_scale is inf"),
        ({"logit_cap": -1.0}, "attention_cap and logit_cap must not be negative"),
    ],
)
def test_a_spec_that_contradicts_the_weights(changes, message):
    with pytest.raises(ValueError, match=message):
        native.Decoder(spec(**changes), weights(), CONTEXT, F16, True, 1)


@pytest.mark.parametrize(
    ("context", "cache", "threads", "message"),
    [
        (0, 1, 1, "context is 0; expected 1 to"),
        (2**31 - 1, 1, 1, "context is 2147483647; expected 1 to"),
        (41, 1, 1, "rotary table 0 has 640 angles; expected 656 for a context of 41"),
        (40, 3, 1, "cache type is 3; expected 0 to 2"),
        (40, -1, 1, "cache type is -1"),
        (40, 1, 0, "threads is 0; expected 1 to 1024"),
        (40, 1, -5, "threads is -5; expected 1 to 1024"),
        (40, 1, 2**31 - 1, "threads is 2147483647; expected 1 to 1024"),
    ],
)
def test_arguments_of_a_decoder(context, cache, threads, message):
    with pytest.raises(ValueError, match=message):
        native.Decoder(spec(), weights(), context, cache, True, threads)


def test_a_q8_0_cache_needs_whole_blocks():
    with pytest.raises(ValueError, match="head_size is 16; expected a multiple of 32 for a q8_0 cache"):
        native.Decoder(spec(head_size=16), weights(), CONTEXT, 2, True, 1)


def test_parts_of_weights():
    made = weights()
    with pytest.raises(KeyError, match="there is no matrix 'keys'"):
        made.set_matrix(0, "keys", matrix(1, 1))
    with pytest.raises(KeyError, match="there is no norm 'key'"):
        made.set_norm(0, "key", np.ones(1, np.float32))
    for layer in (-1, 1, 2**31 - 1):
        with pytest.raises(IndexError, match=f"layer {layer}: there are 1"):
            made.set_bias(layer, "query", np.ones(1, np.float32))
    with pytest.raises(TypeError, match=r"query: .*got float64 \[2\]"):
        made.set_bias(0, "query", np.ones(2))
    with pytest.raises(TypeError, match=r"query: .*not contiguous"):
        made.set_bias(0, "query", np.ones(4, np.float32)[::2])
    with pytest.raises(ValueError, match="sines has 2 elements; expected 1, those of cosines"):
        made.add_rotary_table(np.ones(1, np.float32), np.ones(2, np.float32))
    for layers in (0, -1, 2**31 - 1):
        with pytest.raises(ValueError, match=f"layers is {layers}; expected 1 to"):
            native.DecoderWeights(layers)
    made = weights(without="up")
    with pytest.raises(ValueError, match=r"layer 0: up missing; expected \[48, 32\]"):
        native.Decoder(spec(), made, CONTEXT, F16, True, 1)
    made.set_matrix(0, "up", matrix(INNER, HIDDEN))
    made.set_bias(0, "up", np.ones(47, np.float32))
    with pytest.raises(ValueError, match=r"layer 0: up.bias has 47 elements; expected 48"):
        native.Decoder(spec(), made, CONTEXT, F16, True, 1)


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def test_parts_of_adapters():
    made = native.DecoderAdapters(1)
    for layers in (0, -1, 2**31 - 1):
        with pytest.raises(ValueError, match=f"layers is {layers}; expected 1 to"):
            native.DecoderAdapters(layers)
    for layer in (-1, 1, 2**31 - 1):
        with pytest.raises(IndexError, match=f"layer {layer}: there are 1"):
            made.set_input(layer, "down", ones(2, INNER))
        with pytest.raises(IndexError, match=f"layer {layer}: there are 1"):
            made.set_rows(layer, "down", 0, ones(HIDDEN, 2))
    with pytest.raises(KeyError, match="there is no input 'query'"):
        made.set_input(0, "query", ones(2, HIDDEN))
    with pytest.raises(KeyError, match="there is no matrix 'head'"):
        made.set_rows(0, "head", 0, ones(VOCABULARY, 2))
    with pytest.raises(TypeError, match=r"a: expected .* float32 \[rank, columns\] .*got float64 \[2, 2\]"):
        made.set_input(0, "down", np.ones((2, 2)))
    with pytest.raises(TypeError, match=r"b: expected .* float32 \[rows, rank\] .*not contiguous"):
        made.set_rows(0, "down", 0, every_other(ones(16, 4)))
    with pytest.raises(ValueError, match="b has 17 rows; expected a multiple of 16"):
        made.set_rows(0, "down", 0, ones(17, 2))


@pytest.mark.parametrize(
    ("a", "first", "b", "message"),
    [
        (ones(2, INNER - 1), 0, ones(HIDDEN, 2), r"layer 0: down: a has 94 elements; expected \[2, 48\]"),
        (ones(2, INNER), 1, ones(HIDDEN, 2), "layer 0: down: first is 1; expected 0 to 0"),
        (ones(2, INNER), -1, ones(HIDDEN, 1), "layer 0: down: first is -1"),
        (ones(2, INNER), 0, ones(HIDDEN, 3), "layer 0: down: rank is 3; expected 0 to 2"),
        (ones(2, INNER), 0, ones(HIDDEN + 16, 2), r"layer 0: down: b has 96 elements; expected \[32, 2\]"),
    ],
)
def test_adapters_that_do_not_fit(a, first, b, message):
    one, made, expected, found = decoder(), native.DecoderAdapters(1), logits(), logits()
    one.append(ids(1), expected)
    made.set_input(0, "down", a)
    made.set_rows(0, "down", first, b)
    with pytest.raises(ValueError, match=message):
        one.set_adapters(made)
    with pytest.raises(ValueError, match="adapters has 2 entries; expected one for each of 1 layers"):
        one.set_adapters(native.DecoderAdapters(2))
    assert one.position == 1
    one.rewind(0)
    one.append(ids(1), found)
    assert np.array_equal(found, expected)


def test_objects_that_were_never_made():
    empty = native.Decoder.__new__(native.Decoder)
    for use in (
        lambda: empty.position,
        lambda: empty.append(ids(1), logits()),
        lambda: native.PackedMatrix.__new__(native.PackedMatrix).fill(0, np.zeros((1, 1), np.uint8)),
        lambda: weights().set_matrix(0, "up", native.PackedMatrix.__new__(native.PackedMatrix)),
        lambda: _core.ThreadPool.__new__(_core.ThreadPool).size,
    ):
        with pytest.raises(TypeError), pytest.warns(RuntimeWarning, match="uninitialized"):
            use()


def test_a_second_thread_is_told_or_waits_its_turn():
    """One decoder from two threads: every call counts or is refused, and no other thing happens."""
    one = decoder(threads=2)

    def use(_: int) -> int:
        done = 0
        for _ in range(15):
            try:
                one.append(ids(1), logits())
                done += 1
            except RuntimeError as error:
                assert "the decoder is in use by another thread" in str(error)  # noqa: PT017
            except ValueError as error:
                assert "do not fit" in str(error)  # noqa: PT017
        return done

    with ThreadPoolExecutor(3) as threads:
        total = sum(threads.map(use, range(3)))
    assert one.position == total > 0


def test_tokens_that_change_meanwhile():
    """The ids are checked and used from a copy: another thread that writes to them can break nothing."""
    one, tokens, stop = decoder(), ids(*[1] * 39), threading.Event()

    def spoil() -> None:
        while not stop.is_set():
            tokens[:] = 2**30
            tokens[:] = 1

    other = threading.Thread(target=spoil)
    other.start()
    for _ in range(50):
        try:
            one.append(tokens, logits())
        except ValueError as error:
            assert "token id 1073741824" in str(error)  # noqa: PT017
        one.rewind(0)
    stop.set()
    other.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_computes_the_same():
    one = decoder(threads=2)
    expected = logits()
    one.append(ids(1, 2, 3), expected)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            one.rewind(2)
            found = logits()
            one.append(ids(3), found)
            status = 0 if np.array_equal(found, expected) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    one.rewind(2)
    again = logits()
    one.append(ids(3), again)
    assert np.array_equal(again, expected)


@FUZZ
@given(st.data())
def test_any_arguments_of_decoders(data):
    draw = data.draw
    array = st.one_of(arrays(), anything)
    made = weights(8)
    for _ in range(draw(st.integers(0, 2))):
        layer = draw(st.sampled_from([0, 0, 0, 1, -1]))
        call(made.set_bias, layer, draw(names), draw(array))
        call(made.set_norm, layer, draw(names), draw(array))
        call(made.set_norm_bias, layer, draw(names), draw(array))
    described = spec()
    for name in draw(st.lists(st.sampled_from([n for n in dir(described) if not n.startswith("_")]), max_size=2)):
        try:
            setattr(described, name, draw(st.one_of(whole, st.lists(whole, max_size=2), anything)))
        except REFUSALS:
            continue
    try:
        one = native.Decoder(described, made, draw(small), draw(st.integers(-1, 3)), draw(st.booleans()), 1)
    except REFUSALS as error:
        assert str(error)  # noqa: PT017
        return
    tokens = draw(st.one_of(st.builds(lambda n: ids(*[1] * n), small), array))
    out = draw(st.one_of(st.builds(logits, st.integers(0, 9)), array))
    adapters = native.DecoderAdapters(1)
    parts = st.one_of(st.sampled_from(["attention", "down", "query"]), names)
    for _ in range(draw(st.integers(0, 2))):
        call(adapters.set_input, draw(st.sampled_from([0, 0, 1])), draw(parts), draw(array))
        call(adapters.set_rows, 0, draw(parts), draw(whole), draw(array))
    call(one.set_adapters, draw(st.one_of(st.just(adapters), anything)))
    call(one.append, tokens, out)
    call(one.begin_branches, draw(small), draw(small))
    call(one.append_to_branches, tokens, draw(st.one_of(st.just(ids(0)), array)), out)
    call(one.rewind, draw(whole))
    call(one.cache_bytes, draw(whole))
    call(one.export_cache, draw(array), draw(whole), draw(whole))
    call(one.import_cache, draw(array), draw(whole), draw(whole))
    assert 0 <= one.position <= one.context
