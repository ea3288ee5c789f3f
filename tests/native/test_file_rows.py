"""Rows multiplied as they lie in files give the bits of the packed matrix that holds them, however work is shared."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab import native
from quantlab.errors import InputError
from quantlab.native import _core

BLOCK_BYTES = {"q4_0": 18, "q4_1": 20, "q5_0": 22, "q5_1": 24, "q8_0": 34, "tq2_0": 66}
WIDE = {"tq2_0": 256}  # columns of a block; its formula is in test_ternary_products.py
EPSILON = 2.0**-24  # what one rounding to fp32 may add, relative
SHARED = (520, 512)  # rows and columns of a product that is worth several threads

every_format = pytest.mark.parametrize("format", BLOCK_BYTES)
every_format_of_32 = pytest.mark.parametrize("format", [format for format in BLOCK_BYTES if format not in WIDE])


def random_rows(rng: np.random.Generator, format: str, rows: int, columns: int) -> np.ndarray:
    """Any codes, scales and minima of moderate size."""
    count = columns // WIDE.get(format, 32)
    blocks = rng.integers(0, 256, (rows, count, BLOCK_BYTES[format]), dtype=np.uint8)
    halves = 2 if format in ("q4_1", "q5_1") else 1
    scales = rng.normal(0, 0.02, (rows, count, halves)).astype(np.float16).view(np.uint8)
    if format == "tq2_0":
        blocks[:, :, 64:] = scales
    else:
        blocks[:, :, : 2 * halves] = scales
    return blocks.reshape(rows, -1)


def random_values(rng: np.random.Generator, tokens: int, columns: int) -> np.ndarray:
    return rng.normal(0, 1, (tokens, columns)).astype(np.float32)


def by_packed_matrix(format: str, blocks: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The engine's way: a second copy of the weights, activations quantized beforehand, one thread."""
    tokens, columns = values.shape
    codes = np.empty((tokens, columns), np.int8)
    if format in WIDE:
        x = (codes, np.empty((tokens, 1), np.float32), np.empty((tokens, columns // WIDE[format]), np.float32))
        _core.quantize_rows(values, *x)
    else:
        x = (codes, *np.empty((2, tokens, columns // 32), np.float32))
        _core.quantize_tokens(values, *x)
    matrix = _core.PackedMatrix(format, len(blocks), columns)
    matrix.fill(0, blocks)
    out = np.empty((tokens, len(blocks)), np.float32)
    matrix.multiply_codes(_core.ThreadPool(1), *x, out, 0, matrix.groups)
    return out


def bits(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint32)


# Equal bits.


@every_format
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 150),
    blocks=st.integers(1, 40),
    tokens=st.integers(1, 20),
    threads=st.integers(1, 3),
    scale=st.sampled_from([2.0**-130, 1.0, 2.0**60]),
)
@settings(deadline=None, max_examples=30)
def test_the_bits_are_the_packed_matrixs(format, seed, rows, blocks, tokens, threads, scale):
    rng, unit = np.random.default_rng(seed), WIDE.get(format, 32)
    columns = -(-32 * blocks // unit) * unit  # whole blocks
    weights = random_rows(rng, format, rows, columns)
    values = random_values(rng, tokens, columns) * np.float32(scale)
    found = np.empty((tokens, rows), np.float32)
    _core.multiply_file_rows(_core.ThreadPool(threads), format, weights, values, found)
    np.testing.assert_array_equal(bits(found), bits(by_packed_matrix(format, weights, values)))


@every_format
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_products_that_threads_share_have_them_too(format, threads):
    rng = np.random.default_rng(0)
    weights, values = random_rows(rng, format, *SHARED), random_values(rng, 7, SHARED[1])
    found = native.multiply_int8(format, weights, values, threads=threads)
    np.testing.assert_array_equal(bits(found), bits(by_packed_matrix(format, weights, values)))
    for token in (0, 6):
        alone = native.multiply_int8(format, weights, values[token : token + 1], threads=threads)
        np.testing.assert_array_equal(bits(alone), bits(found[token : token + 1]))


@every_format
def test_a_group_of_rows_may_be_larger_than_a_tile(format):
    rng = np.random.default_rng(0)
    columns = 256 * 160  # 165 KiB and more in sixteen rows
    weights, values = random_rows(rng, format, 40, columns), random_values(rng, 2, columns)
    found = native.multiply_int8(format, weights, values, threads=2)
    np.testing.assert_array_equal(bits(found), bits(by_packed_matrix(format, weights, values)))


@pytest.mark.parametrize("name", ["scalar", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same(name, monkeypatch):
    rng = np.random.default_rng(0)
    weights, values = random_rows(rng, "q5_1", 70, 256), random_values(rng, 3, 256)
    expected = native.multiply_int8("q5_1", weights, values)
    monkeypatch.setenv("QUANTLAB_CPU_KERNEL", name)
    try:
        native.cpu_kernel()
    except InputError:
        pytest.skip(f"no {name} here")
    np.testing.assert_array_equal(bits(native.multiply_int8("q5_1", weights, values)), bits(expected))


# The formula, without the engine's code.


@every_format_of_32
@pytest.mark.parametrize("tokens", [1, 6])
def test_the_product_is_that_of_rounded_activations(format, tokens):
    rng = np.random.default_rng(0)
    weights, values = random_rows(rng, format, 33, 256), random_values(rng, tokens, 256)
    blocks = values.reshape(tokens, -1, 32)
    scales = np.abs(blocks).max(axis=2, keepdims=True) / np.float32(127)
    codes = np.rint(blocks * (np.float32(1) / scales))
    rounded = (codes.astype(np.float64) * scales).reshape(tokens, -1)
    decoded = native.dequantize(format, weights).astype(np.float64)
    by_block = (tokens, 1, 8, 32), (1, 33, 8, 32)
    minima = _minima(format, weights)[None, :, :, None]
    x, steps = rounded.reshape(by_block[0]), decoded.reshape(by_block[1]) - minima
    parts = np.stack([(x * steps).sum(axis=3), (x * minima).sum(axis=3)])  # what is added up in fp32
    bound = 20 * EPSILON * np.abs(parts).sum(axis=(0, 3))  # two additions for each of 8 blocks, their factors
    found = native.multiply_int8(format, weights, values)
    assert np.all(np.abs(found - rounded @ decoded.T) <= bound)
    assert np.any(np.abs(found - values @ decoded.T) > 10 * bound)  # other than without rounding


def _minima(format: str, weights: np.ndarray) -> np.ndarray:
    """What code 0 stands for, of each block: float64 [rows, blocks]."""
    header = np.ascontiguousarray(weights.reshape(len(weights), -1, BLOCK_BYTES[format])[:, :, :4])
    halves = header.view(np.float16).astype(np.float64)
    zero_codes = {"q4_0": 8, "q5_0": 16, "q8_0": 128}
    return -zero_codes[format] * halves[:, :, 0] if format in zero_codes else halves[:, :, 1]


def test_by_hand():
    """Codes 0 to 15 twice, d = 1, m = 0.5, by activations that are whole multiples of their scale."""
    nibbles = np.arange(16, dtype=np.uint8) * 0x11
    block = np.concatenate([np.array([1, 0.5], np.float16).view(np.uint8), nibbles])[None]
    values = np.zeros((1, 32), np.float32)
    values[0, [0, 3, 31]] = [127, -1, 2]
    expected = 127 * 0.5 - 3.5 + 2 * 15.5
    assert native.multiply_int8("q4_1", block, values).tolist() == [[expected]]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_token_that_is_not_finite_spoils_itself_alone(value):
    rng = np.random.default_rng(0)
    weights, values = random_rows(rng, "q4_1", 20, 64), random_values(rng, 3, 64)
    expected = native.multiply_int8("q4_1", weights, values)
    values[1, 40] = value
    found = native.multiply_int8("q4_1", weights, values)
    assert np.isnan(found[1]).all()
    np.testing.assert_array_equal(found[[0, 2]], expected[[0, 2]])


def test_there_may_be_no_tokens_or_no_rows():
    weights = np.zeros((5, 40), np.uint8)
    assert native.multiply_int8("q4_1", weights, np.zeros((0, 64), np.float32)).shape == (0, 5)
    assert native.multiply_int8("q4_1", weights[:0], np.zeros((3, 64), np.float32)).shape == (3, 0)


def test_blocks_may_lie_at_any_address_and_be_read_only():
    rng = np.random.default_rng(0)
    weights, values = random_rows(rng, "q4_0", 33, 96), random_values(rng, 2, 96)
    shifted = np.empty(weights.size + 1, np.uint8)[1:].reshape(weights.shape)
    shifted[:] = weights
    shifted.flags.writeable = False
    found = native.multiply_int8("q4_0", shifted, values)
    np.testing.assert_array_equal(bits(found), bits(native.multiply_int8("q4_0", weights, values)))


def test_out_is_written_and_given_back():
    rng = np.random.default_rng(0)
    weights, values = random_rows(rng, "q4_0", 33, 96), random_values(rng, 2, 96)
    out = np.full((2, 33), np.nan, np.float32)
    assert native.multiply_int8("q4_0", weights, values, out=out) is out
    np.testing.assert_array_equal(out, native.multiply_int8("q4_0", weights, values))


# Threads and processes.


def test_callers_side_by_side_do_not_disturb_each_other():
    rng = np.random.default_rng(0)
    weights = random_rows(rng, "q4_1", *SHARED)
    values = [random_values(rng, 8, SHARED[1]) for _ in range(4)]
    expected = [native.multiply_int8("q4_1", weights, v, threads=1) for v in values]
    wrong: list[int] = []

    def work(i: int) -> None:
        for round in range(20):
            found = native.multiply_int8("q4_1", weights, values[i], threads=1 + (i + round) % 3)
            if not np.array_equal(found, expected[i]):
                wrong.append(i)

    callers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def _child(weights: np.ndarray, values: np.ndarray, queue: multiprocessing.Queue) -> None:
    queue.put(native.multiply_int8("q4_1", weights, values, threads=2))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_multiplies_too():
    rng = np.random.default_rng(0)
    weights, values = random_rows(rng, "q4_1", *SHARED), random_values(rng, 8, SHARED[1])
    expected = native.multiply_int8("q4_1", weights, values, threads=2)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(weights, values, queue))
    child.start()
    np.testing.assert_array_equal(queue.get(timeout=60), expected)
    child.join(timeout=60)
    assert child.exitcode == 0


def test_the_threads_let_the_interpreter_end_quietly():
    program = (
        "import numpy as np\n"
        "from quantlab import native\n"
        "native.multiply_int8('q4_1', np.zeros((512, 320), np.uint8), np.ones((64, 512), np.float32), threads=3)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


# Errors.


def test_requests_that_do_not_fit_are_named():
    blocks, values = np.zeros((3, 40), np.uint8), np.zeros((2, 64), np.float32)
    with pytest.raises(ValueError, match="unknown block format 'q3_k'"):
        native.multiply_int8("q3_k", blocks, values)
    with pytest.raises(ValueError, match="q4_1 blocks have 39 bytes a row; expected a multiple of 20"):
        native.multiply_int8("q4_1", np.zeros((3, 39), np.uint8), values)
    with pytest.raises(ValueError, match="q4_1 blocks have 0 bytes a row"):
        native.multiply_int8("q4_1", blocks[:, :0].copy(), values)
    with pytest.raises(ValueError, match=r"values has shape \[2, 32\]; expected \[2, 64\]"):
        native.multiply_int8("q4_1", blocks, values[:, :32].copy())
    with pytest.raises(ValueError, match=r"out has shape \[3, 2\]; expected \[2, 3\]"):
        native.multiply_int8("q4_1", blocks, values, out=np.zeros((3, 2), np.float32))
    with pytest.raises(ValueError, match="cannot use 0 threads"):
        native.multiply_int8("q4_1", blocks, values, threads=0)


@pytest.mark.parametrize(
    ("blocks", "values"),
    [
        (np.zeros((3, 40), np.int8), np.zeros((2, 64), np.float32)),
        (np.zeros((3, 80), np.uint8)[:, ::2], np.zeros((2, 64), np.float32)),
        (np.zeros((3, 40), np.uint8), np.zeros((2, 64))),
        (np.zeros((3, 40), np.uint8), np.zeros((64, 2), np.float32).T),
        (np.zeros((3, 40), np.uint8), np.zeros((1, 2, 64), np.float32)),
    ],
    ids=["int8 blocks", "strided blocks", "float64", "transposed", "three dimensions"],
)
def test_arrays_of_another_type_or_layout_are_not_copied(blocks, values):
    with pytest.raises(TypeError):
        native.multiply_int8("q4_1", blocks, values, out=np.zeros((2, 3), np.float32))


def test_an_out_that_is_read_only_is_refused():
    out = np.zeros((2, 3), np.float32)
    out.flags.writeable = False
    with pytest.raises(TypeError):
        native.multiply_int8("q4_1", np.zeros((3, 40), np.uint8), np.zeros((2, 64), np.float32), out=out)
