"""Rows are shared out to threads without a trace in the result; faults are found in order; memory is the caller's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import gguf
import numpy as np
import pytest

from quantlab import native
from quantlab.errors import InputError

LEVELS = {"q4_0": 16, "q4_1": 16, "q5_0": 32, "q5_1": 32, "q8_0": 255}
STEPS = {"q4_0": 8, "q4_1": 15, "q5_0": 16, "q5_1": 31, "q8_0": 127}  # from zero to the farthest code
BITS = {"f32": np.uint32, "f16": np.uint16, "bf16": np.uint16}
INFINITY = {"f32": 0x7F800000, "f16": 0x7C00, "bf16": 0x7F80}

Q4_1 = gguf.GGMLQuantizationType.Q4_1

every_format = pytest.mark.parametrize("format", LEVELS)
every_element = pytest.mark.parametrize("element", BITS)


@pytest.fixture(scope="module", autouse=True, params=["scalar", "avx2"])
def kernel(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test holds for each kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTLAB_CPU_KERNEL", request.param)
        try:
            assert native.cpu_kernel() == request.param
        except InputError:
            pytest.skip(f"no {request.param} on this processor")
        yield


def gaussian(rows: int = 40, columns: int = 256) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.02, (rows, columns)).astype(np.float32)


def bits_of(weights: np.ndarray, element: str) -> np.ndarray:
    """float32 weights as bits of an element type; bfloat16 by cutting off, which is a rounding like any other here."""
    if element == "bf16":
        return (weights.view(np.uint32) >> 16).astype(np.uint16)
    return weights.astype({"f32": np.float32, "f16": np.float16}[element]).view(BITS[element])


def encoded(format: str, weights: np.ndarray, element: str = "f32", threads: int = 1) -> native.Quantized:
    return native.quantize_checked(format, weights, LEVELS[format], element=element, threads=threads)


# Threads. A thread takes 2**16 weights at least: these matrices are large enough for seven.


@every_element
@pytest.mark.parametrize("shape", [(243, 2048), (7, 1 << 17), (3, 1 << 17), (1, 1 << 19), (16385, 32)])
def test_threads_change_neither_bytes_nor_sums(element, shape):
    bits = bits_of(gaussian(*shape), element)
    one = encoded("q5_1", bits, element)
    for threads in (2, 3, 7, 100):
        several = encoded("q5_1", bits, element, threads)
        np.testing.assert_array_equal(several.blocks, one.blocks)
        np.testing.assert_array_equal(several.sums, one.sums)


@every_format
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_convert_every_format_alike(format, threads):
    weights = gaussian(243, 2048)
    blocks = native.quantize(format, weights, LEVELS[format], threads=1)
    np.testing.assert_array_equal(native.quantize(format, weights, LEVELS[format], threads=threads), blocks)
    for element in BITS:
        np.testing.assert_array_equal(
            native.dequantize(format, blocks, element=element, threads=threads),
            native.dequantize(format, blocks, element=element, threads=1),
        )


@pytest.mark.parametrize("threads", [0, -1])
def test_a_number_of_threads_below_one_is_refused(threads):
    with pytest.raises(ValueError, match=f"cannot use {threads} threads; expected at least 1"):
        native.quantize("q4_1", np.zeros((1, 32), np.float32), 16, threads=threads)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinities on this system")
def test_threads_by_default_are_the_cores_this_process_may_use(monkeypatch):
    assert 1 <= native.default_threads() <= len(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    assert native.default_threads() == 1


FORK = """
import os
import numpy as np
from quantlab import native
weights = np.random.default_rng(0).standard_normal((512, 1024), dtype=np.float32)
blocks = native.quantize("q4_1", weights, 16, threads=4)
child = os.fork()
if child == 0:
    os._exit(0 if np.array_equal(native.quantize("q4_1", weights, 16, threads=4), blocks) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_quantizes_with_threads_too():
    assert subprocess.run([sys.executable, "-c", FORK], timeout=60).returncode == 0


# Faults.


@every_element
@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("places", [[(0, 0)], [(242, 2047)], [(200, 3), (77, 1999), (77, 2000), (240, 0)]])
def test_the_first_weight_that_is_not_finite_is_found(element, threads, places):
    bits = bits_of(gaussian(243, 2048), element)
    for i, (row, column) in enumerate(places):
        bits[row, column] = INFINITY[element] + i  # infinity, then NaN
    assert encoded("q4_1", bits, element, threads).not_finite == min(places)


@every_format
@pytest.mark.parametrize("threads", [1, 7])
def test_the_first_block_whose_scale_overflows_is_found(format, threads):
    weights = gaussian(243, 2048)
    weights[200, 40] = weights[101, 2047] = weights[101, 1000] = 65520 * STEPS[format]
    found = encoded(format, weights, threads=threads)
    assert (found.not_finite, found.overflow) == (None, (101, 31))


@pytest.mark.parametrize("format", ["q4_1", "q5_1"])
def test_a_minimum_that_overflows_is_found(format):
    weights = np.full((1, 96), 65519.0, np.float32)
    assert encoded(format, weights).overflow is None
    weights[0, 32:64] = -65520
    assert encoded(format, weights).overflow == (0, 1)


def test_a_block_that_is_not_finite_is_no_overflow():
    weights = gaussian(3, 96)
    weights[0, 5], weights[2, 70] = np.inf, 1e9
    found = encoded("q8_0", weights)
    assert (found.not_finite, found.overflow) == ((0, 5), (2, 2))


def test_sound_weights_have_no_faults():
    found = encoded("q4_0", gaussian())
    assert (found.not_finite, found.overflow) == (None, None)


# Results in the caller's memory.


def test_blocks_and_weights_are_written_to_out():
    weights = gaussian(5, 64)
    blocks = np.zeros((5, 40), np.uint8)
    assert native.quantize("q4_1", weights, 16, out=blocks) is blocks
    np.testing.assert_array_equal(blocks, gguf.quants.quantize(weights, Q4_1))
    decoded = np.zeros((5, 64), np.float16)
    assert native.dequantize("q4_1", blocks, element="f16", out=decoded) is decoded
    np.testing.assert_array_equal(decoded, gguf.quants.dequantize(blocks, Q4_1).astype(np.float16))
    raw = np.zeros((5, 128), np.uint8)
    native.dequantize("q4_1", blocks, element="f16", out=raw)
    np.testing.assert_array_equal(raw, decoded.view(np.uint8))


def test_an_out_that_does_not_fit_is_refused():
    weights = np.zeros((2, 64), np.float32)
    with pytest.raises(ValueError, match=r"out has shape \[2, 39\]; expected \[2, 40\]"):
        native.quantize("q4_1", weights, 16, out=np.zeros((2, 39), np.uint8))
    with pytest.raises(ValueError, match=r"out has shape \[3, 128\]; expected \[2, 128\]"):
        native.dequantize("q4_1", np.zeros((2, 40), np.uint8), element="f16", out=np.zeros((3, 64), np.float16))
    with pytest.raises(TypeError, match=r"out: expected a writable .*got uint8 \[2, 40\], not contiguous"):
        native.quantize("q4_1", weights, 16, out=np.zeros((2, 80), np.uint8)[:, :40])
    read_only = np.zeros((2, 40), np.uint8)
    read_only.flags.writeable = False
    with pytest.raises(TypeError, match=r"out: expected a writable .*got uint8 \[2, 40\], read-only"):
        native.quantize("q4_1", weights, 16, out=read_only)
