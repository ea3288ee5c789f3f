"""Low-rank updates: their one arithmetic, and what they make of blocks, against exact whole-number arithmetic."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from forced_kernel import can_run, kernel
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab import native
from quantlab.native import adapters

# Block bytes, where codes start, the stored code of zero, and of levels the least and the most code.
LAYOUT = {"q4_0": (18, 2, 8), "q4_1": (20, 4, 0), "q5_0": (22, 2, 16), "q5_1": (24, 4, 0), "q8_0": (34, 2, 0)}
LEVELS = {"q4_0": 16, "q4_1": 16, "q5_0": 32, "q5_1": 32, "q8_0": 255}
FEWER = {"q4_0": 7, "q4_1": 8, "q5_0": 31, "q5_1": 4, "q8_0": 15}
AFFINE = ("q4_1", "q5_1")
KERNELS = [name for name in ("scalar", "avx2") if can_run(name)]

every_format = pytest.mark.parametrize("format", LAYOUT)
every_kernel = pytest.mark.parametrize("name", KERNELS)
two_kernels = pytest.mark.skipif(len(KERNELS) < 2, reason="this processor has the portable kernel only")


def normal(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


def product(a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """The arithmetic as the module states it."""
    total = np.zeros((len(b), a.shape[1]), np.float32)
    for k in range(len(a)):
        total = total + b[:, k : k + 1] * a[k]
    return total * np.float32(scale)


def as_pair(update: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a and b with scale * (b @ a) == update for a scale of 1, whatever finite numbers it holds."""
    return update, np.eye(len(update), dtype=np.float32)


def random_blocks(format: str, rows: int, blocks: int, seed: int) -> np.ndarray:
    """Any bytes at all: scales of either sign, subnormal, infinite and NaN among them."""
    return np.random.default_rng(seed).integers(0, 256, (rows, blocks * LAYOUT[format][0]), np.uint8)


def sane_blocks(format: str, rows: int = 5, blocks: int = 3, seed: int = 0, levels: int | None = None) -> np.ndarray:
    return native.quantize(format, normal(rows, 32 * blocks, seed), LEVELS[format] if levels is None else levels)


# A slow reading of the formats, one block at a time.


def codes_of(format: str, block: bytes) -> list[int]:
    size, _, zero = LAYOUT[format]
    if format == "q8_0":
        return list(struct.unpack("32b", block[2:]))
    nibbles = block[size - 16 :]
    codes = [byte & 15 for byte in nibbles] + [byte >> 4 for byte in nibbles]
    if format.startswith("q5"):
        (high,) = struct.unpack("<I", block[size - 20 : size - 16])
        codes = [code | (high >> j & 1) << 4 for j, code in enumerate(codes)]
    return [code - zero for code in codes]


def with_codes(format: str, block: bytes, codes: list[int]) -> bytes:
    _, header, zero = LAYOUT[format]
    if format == "q8_0":
        return block[:2] + struct.pack("32b", *codes)
    stored = [code + zero for code in codes]
    high = struct.pack("<I", sum((code >> 4) << j for j, code in enumerate(stored)))
    nibbles = bytes((low & 15) | (upper & 15) << 4 for low, upper in zip(stored[:16], stored[16:], strict=True))
    return block[:header] + (high if format.startswith("q5") else b"") + nibbles


def code_range(format: str, levels: int) -> tuple[int, int]:
    if format in AFFINE:
        return 0, levels - 1
    if format == "q8_0":
        return -((levels - 1) // 2), (levels - 1) // 2
    return -(levels // 2), levels - 1 - levels // 2


def exact(number: float) -> int:
    """In units of 2^-149, of which every finite fp32 number is a whole multiple."""
    numerator, denominator = float(number).as_integer_ratio()
    return numerator * (2**149 // denominator)


def moved(format: str, block: bytes, update: np.ndarray, levels: int) -> bytes:
    halves = [float(half) for half in np.frombuffer(block[: LAYOUT[format][1]], np.float16)]
    if not np.isfinite(halves).all() or halves[0] == 0:
        return block
    step = exact(halves[0])
    least, most = code_range(format, levels)

    def nearest(code: int, by: int) -> int:
        allowed = range(min(least, code), max(most, code) + 1)
        return min(allowed, key=lambda other: (abs(by - (other - code) * step), abs(other - code)))

    codes = codes_of(format, block)
    return with_codes(format, block, [nearest(code, exact(by)) for code, by in zip(codes, update, strict=True)])


def rechosen(format: str, blocks: np.ndarray, update: np.ndarray, levels: int) -> np.ndarray:
    size = LAYOUT[format][0]
    rows = []
    for row, updates in zip(blocks, update, strict=True):
        parts = [row[i : i + size].tobytes() for i in range(0, len(row), size)]
        moves = [updates[32 * i : 32 * i + 32] for i in range(len(parts))]
        new = b"".join(moved(format, part, move, levels) for part, move in zip(parts, moves, strict=True))
        rows.append(np.frombuffer(new, np.uint8))
    return np.stack(rows)


def telling_updates(format: str, blocks: np.ndarray, seed: int) -> np.ndarray:
    """Halves of steps, the floats beside them, whole steps, nothing, and numbers far too large and too small."""
    rng = np.random.default_rng(seed)
    size = LAYOUT[format][0]
    scales = blocks.reshape(len(blocks), -1, size)[..., :2].copy().view(np.float16)[..., 0].astype(np.float32)
    steps = np.repeat(np.where(np.isfinite(scales), scales, 1), 32, axis=1)
    span = 300 if format == "q8_0" else 40
    halves = (steps * np.float32(0.5) * rng.integers(-span, span, steps.shape)).astype(np.float32)
    choices = [
        halves,
        np.nextafter(halves, np.float32(np.inf)),
        np.nextafter(halves, np.float32(-np.inf)),
        (steps * rng.normal(size=steps.shape) * 4).astype(np.float32),
        np.zeros_like(steps),
        np.full_like(steps, -0.0),
        rng.choice(np.array([1e30, -1e30, 1e-45, -1e-45, 3e38], np.float32), steps.shape),
    ]
    return np.ascontiguousarray(np.choose(rng.integers(0, len(choices), steps.shape), choices))


# The product.


@every_kernel
@given(
    rows=st.integers(0, 70),
    columns=st.integers(0, 70),
    rank=st.one_of(st.integers(0, 9), st.just(300)),
    scale=st.sampled_from([1.0, 2.0, -0.37, 0.0, 1e-30]),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=40)
def test_the_product_is_the_stated_arithmetic(name, rows, columns, rank, scale, seed):
    a, b = normal(rank, columns, seed), normal(rows, rank, seed + 1)
    with kernel(name):
        np.testing.assert_array_equal(adapters.low_rank_product(a, b, scale), product(a, b, scale))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_the_product_does_not_depend_on_threads(threads):
    a, b = normal(33, 200), normal(500, 33, 1)
    np.testing.assert_array_equal(adapters.low_rank_product(a, b, 0.5, threads=threads), product(a, b, 0.5))


def test_the_order_of_the_sum_counts():
    """So that the test above is one of the order: backwards, other bits."""
    a, b = normal(33, 200), normal(500, 33, 1)
    backwards = product(a[::-1], b[:, ::-1], 1.0)
    assert (adapters.low_rank_product(a, b, 1.0) != backwards).mean() > 0.1


def test_products_are_rounded_before_they_are_added():
    """1 + 2^-12 squared is 1 + 2^-11 + 2^-24: the last term is lost before 1 is subtracted, not so in a fused one."""
    a = np.array([[-1.0], [1 + 2**-12]], np.float32)
    b = np.array([[1.0, 1 + 2**-12]], np.float32)
    assert adapters.low_rank_product(a, b, 1.0)[0, 0] == 2**-11


def test_subnormal_updates_are_kept():
    a, b = np.full((1, 32), 1e-20, np.float32), np.full((2, 1), 1e-20, np.float32)
    result = adapters.low_rank_product(a, b, 1.0)
    np.testing.assert_array_equal(result, product(a, b, 1.0))
    assert result.min() > 0


def test_the_product_is_written_where_it_is_wanted():
    a, b = normal(3, 40), normal(6, 3, 1)
    out = np.full((6, 40), np.nan, np.float32)
    assert adapters.low_rank_product(a, b, 2.0, out=out) is out
    np.testing.assert_array_equal(out, product(a, b, 2.0))


@pytest.mark.parametrize(
    ("fault", "place"),
    [({"a": (1, 37, np.nan)}, (0, 37)), ({"a": (0, 5, np.inf)}, (0, 5)), ({"b": (3, 1, -np.inf)}, (3, 0))],
)
def test_updates_that_are_not_finite_are_named(fault, place):
    arrays = {"a": normal(2, 96), "b": normal(70, 2, 1)}
    for name, (row, column, value) in fault.items():
        arrays[name][row, column] = value
    message = rf"scale \* b @ a is NaN or infinite at \[{place[0]}, {place[1]}\]; expected finite numbers"
    out = np.full((70, 96), 5, np.float32)
    with pytest.raises(ValueError, match=message):
        adapters.low_rank_product(**arrays, scale=1.0, out=out)
    assert (out == 5).all()
    blocks = sane_blocks("q4_1", 70)
    before = blocks.copy()
    with pytest.raises(ValueError, match=message):
        adapters.rechoose_codes("q4_1", blocks, **arrays, scale=1.0, out=blocks)
    np.testing.assert_array_equal(blocks, before)


def test_sums_beyond_fp32_are_named():
    a, b = np.zeros((2, 64), np.float32), np.ones((80, 2), np.float32)
    a[:, 40] = 2e38
    b[:66] = 0
    with pytest.raises(ValueError, match=r"NaN or infinite at \[66, 40\]"):
        adapters.low_rank_product(a, b, 1.0)
    with pytest.raises(ValueError, match=r"NaN or infinite at \[66, 40\]"):
        adapters.low_rank_product(a / 2, b, 1e10)
    a[1] = 0  # as large, and within
    np.testing.assert_array_equal(adapters.low_rank_product(a, b, 1.5), product(a, b, 1.5))


# Codes chosen anew.


@every_kernel
@every_format
@pytest.mark.parametrize("levels", [LEVELS, FEWER], ids=["all", "fewer"])
@given(seed=st.integers(0, 10**6), is_sane=st.booleans())
@settings(deadline=None, max_examples=12)
def test_each_code_becomes_the_nearest_in_exact_arithmetic(name, format, levels, seed, is_sane):
    blocks = sane_blocks(format, 3, 2, seed) if is_sane else random_blocks(format, 3, 2, seed)
    update = telling_updates(format, blocks, seed)
    with kernel(name):
        found = adapters.rechoose_codes(format, blocks, *as_pair(update), 1.0, levels=levels[format])
    np.testing.assert_array_equal(found, rechosen(format, blocks, update, levels[format]))


@every_format
def test_all_levels_are_the_default(format):
    blocks = random_blocks(format, 3, 2, 0)
    pair = as_pair(telling_updates(format, blocks, 0))
    by_default = adapters.rechoose_codes(format, blocks, *pair, 1.0)
    np.testing.assert_array_equal(
        by_default, adapters.rechoose_codes(format, blocks, *pair, 1.0, levels=LEVELS[format])
    )


@every_kernel
@every_format
@pytest.mark.parametrize("levels", [LEVELS, FEWER], ids=["all", "fewer"])
@given(seed=st.integers(0, 10**6), rank=st.integers(0, 3), scale=st.sampled_from([1.0, -2.0, 0.0]))
@settings(deadline=None, max_examples=25)
def test_an_update_of_zero_gives_back_any_bytes(name, format, levels, seed, rank, scale):
    blocks = random_blocks(format, 5, 3, seed)
    a, b = normal(rank, 96, seed), np.zeros((5, rank), np.float32)
    with kernel(name):
        found = adapters.rechoose_codes(format, blocks, a, b, scale, levels=levels[format])
    np.testing.assert_array_equal(found, blocks)


@every_format
@pytest.mark.parametrize("half", [0x0000, 0x8000, 0x7C00, 0xFC00, 0x7E00, 0x7C01], ids=hex)
def test_blocks_that_hold_no_codes_stay(format, half):
    """d zero, infinite or NaN, and so m."""
    update = as_pair(np.full((1, 32), 3, np.float32))
    blocks = sane_blocks(format, 1, 1)
    blocks[0, :2] = np.array([half], np.uint16).view(np.uint8)
    np.testing.assert_array_equal(adapters.rechoose_codes(format, blocks, *update, 1.0), blocks)
    if format in AFFINE:
        blocks = sane_blocks(format, 1, 1)
        blocks[0, 2:4] = np.array([half], np.uint16).view(np.uint8)
        stays = half & 0x7C00 != 0
        assert np.array_equal(adapters.rechoose_codes(format, blocks, *update, 1.0), blocks) == stays


@pytest.mark.parametrize("step", [0.25, -0.25, 2**-24, -(2**-24)])
def test_halves_stay_on_the_side_they_come_from(step):
    """From code 5 by k + 1/2 steps: k codes, with the least more k + 1."""
    block = np.zeros((1, 20), np.uint8)
    block[0, :2] = np.array([step], np.float16).view(np.uint8)
    block[0, 4:] = 0x55
    halves = np.array([0.5, -0.5, 1.5, -1.5, 2.5, -2.5, 3.5, -3.5] * 4, np.float32) * np.float32(step)
    stay = adapters.rechoose_codes("q4_1", block, *as_pair(halves[None]), 1.0)
    beyond = np.nextafter(halves, halves * 2)
    go = adapters.rechoose_codes("q4_1", block, *as_pair(beyond[None]), 1.0)
    assert codes_of("q4_1", stay.tobytes())[:8] == [5, 5, 6, 4, 7, 3, 8, 2]
    assert codes_of("q4_1", go.tobytes())[:8] == [6, 4, 7, 3, 8, 2, 9, 1]


def test_codes_beyond_the_levels_move_inwards_only():
    block = np.zeros((1, 34), np.uint8)
    block[0, :2] = np.array([1.0], np.float16).view(np.uint8)
    block[0, 2:] = np.array([-128, 127, -128, 127] * 8, np.int8).view(np.uint8)
    update = np.array([[-3, 3, 2, -2] * 8], np.float32)
    all_levels = adapters.rechoose_codes("q8_0", block, *as_pair(update), 1.0)
    assert codes_of("q8_0", all_levels.tobytes())[:4] == [-128, 127, -126, 125]
    few_levels = adapters.rechoose_codes("q8_0", block, *as_pair(update), 1.0, levels=15)
    assert codes_of("q8_0", few_levels.tobytes())[:4] == [-128, 127, -126, 125]
    far = adapters.rechoose_codes("q8_0", block, *as_pair(update * 100), 1.0, levels=15)
    assert codes_of("q8_0", far.tobytes())[:4] == [-128, 127, 7, -7]


@every_format
def test_the_update_is_the_products(format):
    """At a scale where its last bits decide: codes of a product of rank 40 are those of its own fp32 values."""
    blocks = sane_blocks(format, 70, 3)
    a, b = normal(40, 96, 1), normal(70, 40, 2)
    update = adapters.low_rank_product(a, b, 0.01)
    found = adapters.rechoose_codes(format, blocks, a, b, 0.01)
    np.testing.assert_array_equal(found, adapters.rechoose_codes(format, blocks, *as_pair(update), 1.0))
    assert (found != blocks).any()


@every_format
@pytest.mark.parametrize("levels", [LEVELS, FEWER], ids=["all", "fewer"])
def test_bytes_do_not_depend_on_threads_or_kernels(format, levels):
    blocks = sane_blocks(format, 300, 8, levels=levels[format])
    a, b = normal(16, 256, 1), normal(300, 16, 2)
    results = []
    for name in KERNELS:
        with kernel(name):
            results += [
                adapters.rechoose_codes(format, blocks, a, b, 0.1, levels=levels[format], threads=threads)
                for threads in (1, 2, 3, 7)
            ]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@every_format
def test_blocks_may_be_changed_in_place(format):
    blocks = sane_blocks(format, 70, 2)
    a, b = normal(4, 64, 1), normal(70, 4, 2)
    expected = adapters.rechoose_codes(format, blocks, a, b, 0.1)
    assert adapters.rechoose_codes(format, blocks, a, b, 0.1, out=blocks) is blocks
    np.testing.assert_array_equal(blocks, expected)


# Minima shifted.


def halves_at(blocks: np.ndarray, size: int, place: int) -> list[bytes]:
    return [row[i + place : i + place + 2].tobytes() for row in blocks for i in range(0, len(row), size)]


@pytest.mark.parametrize("format", AFFINE)
@given(seed=st.integers(0, 10**6), rank=st.integers(0, 4), size=st.sampled_from([1e-6, 0.01, 1.0, 100.0]))
@settings(deadline=None, max_examples=60)
def test_minima_are_rounded_once(format, seed, rank, size):
    """Against Python's own rounding to half precision, of sums in fp32."""
    bytes_each = LAYOUT[format][0]
    blocks = sane_blocks(format, 4, 3, seed)
    a, b = normal(rank, 3, seed) * np.float32(size), normal(4, rank, seed + 1)
    found = adapters.shift_minimums(format, blocks, a, b, 0.5)
    update = product(a, b, 0.5).ravel()
    for before, after, by in zip(
        halves_at(blocks, bytes_each, 2), halves_at(found, bytes_each, 2), update, strict=True
    ):
        (old,) = struct.unpack("<e", before)
        expected = struct.pack("<e", float(np.float32(old) + by)) if by else before
        assert after == expected
    same = np.ones(bytes_each, bool)
    same[2:4] = False
    kept = np.tile(same, 3)
    np.testing.assert_array_equal(found[:, kept], blocks[:, kept])


@pytest.mark.parametrize("format", AFFINE)
def test_a_shift_of_zero_gives_back_any_bytes(format):
    blocks = random_blocks(format, 200, 7, 0)
    a, b = normal(3, 7), np.zeros((200, 3), np.float32)
    np.testing.assert_array_equal(adapters.shift_minimums(format, blocks, a, b, -1.0), blocks)


def test_ties_of_minima_go_to_even():
    """Between 2048 and 4096 half-precision numbers are 2 apart."""
    blocks = np.zeros((1, 40), np.uint8)
    with_m = adapters.with_minimums("q4_1", blocks, np.array([[2048, 2050]], np.float16))
    shifted = adapters.shift_minimums("q4_1", with_m, np.ones((1, 2), np.float32), np.ones((1, 1), np.float32), 1.0)
    assert adapters.minimums("q4_1", shifted).tolist() == [[2048, 2052]]


@pytest.mark.parametrize("format", AFFINE)
def test_minima_beyond_half_precision_are_named(format):
    blocks = sane_blocks(format, 3, 4)
    before = blocks.copy()
    a, b = np.zeros((1, 4), np.float32), np.array([[0], [1], [1]], np.float32)
    a[0, 2] = -65504 - 32
    with pytest.raises(ValueError, match=r"minimum of block 2 of row 1 would be -6553\d\.?\d*, beyond half precision"):
        adapters.shift_minimums(format, blocks, a, b, 1.0, out=blocks)
    np.testing.assert_array_equal(blocks, before)


def test_minima_that_are_not_finite_stay():
    values = np.array([[0x7C00, 0xFC00, 0x7C01, 0x7E05]], np.uint16).view(np.float16)
    blocks = adapters.with_minimums("q5_1", random_blocks("q5_1", 1, 4, 0), values)
    a, b = np.full((1, 4), 3, np.float32), np.ones((1, 1), np.float32)
    np.testing.assert_array_equal(adapters.shift_minimums("q5_1", blocks, a, b, 1.0), blocks)


@pytest.mark.parametrize("format", AFFINE)
def test_minima_can_be_put_back(format):
    blocks = random_blocks(format, 50, 5, 0)
    blocks[:, 3 :: LAYOUT[format][0]] &= 0xBF  # m at most 2, so that no shift goes beyond half precision
    kept = adapters.minimums(format, blocks)
    assert (kept.dtype, kept.shape) == (np.float16, (50, 5))
    shifted = adapters.shift_minimums(format, blocks, normal(2, 5), normal(50, 2, 1), 1.0)
    assert (shifted != blocks).any()
    undone = adapters.with_minimums(format, shifted, kept)
    np.testing.assert_array_equal(undone, blocks)
    assert adapters.with_minimums(format, shifted, kept, out=shifted) is shifted
    np.testing.assert_array_equal(shifted, blocks)
