"""The door to the quantizers: results, measures, fallbacks and errors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from slow_quantizers import correlated_moment, gaussian, weighted_error

from quantlab.errors import InputError
from quantlab.formats import FORMATS
from quantlab.quantization.methods import METHODS, QuantizedWeight, quantize_weight
from quantlab.quantization.search import search_blocks
from quantlab.quantization.statistics import InputStatistics

OWN_SCALES = [name for name, row in FORMATS.items() if row.scale_of == "block"]
every_format = pytest.mark.parametrize("format", OWN_SCALES)


def weight(rows: int = 40, columns: int = 128) -> torch.Tensor:
    return torch.from_numpy(gaussian(rows, columns))


def statistics(columns: int = 128, tokens: int = 2000) -> InputStatistics:
    return InputStatistics.of_second_moment(tokens, torch.from_numpy(correlated_moment(columns)))


def errors_by(result: QuantizedWeight, original: torch.Tensor, moment: np.ndarray) -> float:
    """tr((W - Q) H (W - Q)^T) / tr(W H W^T) in double precision."""
    decoded = result.packed.dequantize().numpy()
    zeros = np.zeros_like(decoded)
    return (
        weighted_error(original.numpy(), decoded, moment).sum() / weighted_error(original.numpy(), zeros, moment).sum()
    )


@every_format
@pytest.mark.parametrize("levels", [None, 4])
def test_rtn_is_the_formats_own_rounding(format, levels):
    chosen = FORMATS[format] if levels is None else replace(FORMATS[format], levels=levels)
    result = quantize_weight(weight(), format, "rtn", None, levels=levels)
    assert torch.equal(result.packed.blocks, chosen.quantize(weight()).blocks)
    assert result.packed.format == chosen
    assert result.note is None


@every_format
@pytest.mark.parametrize("levels", [None, 4])
def test_each_method_leaves_less_error_than_the_one_before(format, levels):
    results = [quantize_weight(weight(), format, method, statistics(), levels=levels) for method in METHODS]
    moment = statistics().second_moment.numpy()
    errors = [errors_by(result, weight(), moment) for result in results]
    assert errors[2] < 0.6 * errors[1]
    assert errors[1] < errors[0]
    assert [result.note for result in results] == [None] * 3


@pytest.mark.parametrize("method", METHODS)
def test_measures_are_those_of_double_precision(method):
    result = quantize_weight(weight(), "q4_1", method, statistics())
    moment = statistics().second_moment.numpy()
    same_block = np.arange(128)[:, None] // 32 == np.arange(128) // 32
    used = {"rtn": np.diag(moment.diagonal()), "search": np.where(same_block, moment, 0), "gptq": moment}[method]
    assert result.weighted_error == pytest.approx(errors_by(result, weight(), used), rel=1e-4)
    assert result.relative_error == pytest.approx(errors_by(result, weight(), np.eye(128)) ** 0.5, rel=1e-5)


def test_without_statistics_columns_count_alike():
    result = quantize_weight(weight(), "q4_1", "search", None)
    assert result.weighted_error == pytest.approx(result.relative_error**2)
    np.testing.assert_array_equal(result.packed.blocks.numpy(), search_blocks(weight().numpy(), FORMATS["q4_1"], None))


@pytest.mark.parametrize("method", METHODS)
def test_bytes_depend_on_neither_threads_nor_torchs(method):
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(quantize_weight(weight(100), "q4_1", method, statistics(), threads=threads))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0].packed.blocks, results[1].packed.blocks)
    assert results[0].weighted_error == results[1].weighted_error
    assert results[0].relative_error == results[1].relative_error


@pytest.mark.parametrize("method", ["rtn", "search"])
def test_nor_do_errors_where_torch_would_divide_sums(method):
    """Plans for a target size rest on them."""
    few_rows = torch.from_numpy(gaussian(64 * 32, 40)).view(64, 32, 40)
    given = InputStatistics.of_tiles(2000, few_rows @ few_rows.transpose(1, 2))
    before, errors = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            result = quantize_weight(weight(40, 2048), "q4_1", method, given, threads=threads)
            errors.add((result.weighted_error, result.relative_error))
    finally:
        torch.set_num_threads(before)
    assert len(errors) == 1


@pytest.mark.parametrize("method", METHODS)
def test_statistics_in_other_units_give_the_same_bytes(method):
    expected = quantize_weight(weight(), "q4_1", method, statistics())
    for factor in (2.0**-60, 2.0**60):
        scaled = InputStatistics.of_second_moment(2000, statistics().second_moment * factor)
        found = quantize_weight(weight(), "q4_1", method, scaled)
        assert torch.equal(found.packed.blocks, expected.packed.blocks)
        assert found.weighted_error == pytest.approx(expected.weighted_error)


def test_search_uses_as_much_as_is_known():
    """The diagonal, then the tiles, which the second moment holds as well."""
    whole = statistics()
    tiles = InputStatistics.of_tiles(
        whole.tokens,
        torch.from_numpy(np.stack([whole.second_moment.numpy()[i : i + 32, i : i + 32] for i in range(0, 128, 32)])),
    )
    diagonal = InputStatistics(whole.tokens, whole.diagonal)
    results = [quantize_weight(weight(), "q4_1", "search", given) for given in (diagonal, tiles, whole)]
    assert torch.equal(results[1].packed.blocks, results[2].packed.blocks)
    errors = [errors_by(result, weight(), whole.second_moment.numpy()) for result in results]
    assert errors[1] < 0.9 * errors[0]


def test_any_float_type_and_layout_is_read():
    expected = quantize_weight(weight().to(torch.bfloat16).to(torch.float32), "q4_1", "gptq", statistics())
    rows_apart = torch.cat([weight(), weight()], dim=1).to(torch.bfloat16)[:, :128]
    found = quantize_weight(rows_apart, "q4_1", "gptq", statistics())
    assert torch.equal(found.packed.blocks, expected.packed.blocks)


@pytest.mark.parametrize(
    ("given", "note"),
    [
        (None, "no second moment: search"),
        (InputStatistics(9, torch.ones(128)), "no second moment: search"),
        (InputStatistics.of_second_moment(9, torch.zeros(128, 128)), "no activations seen: search"),
        (InputStatistics.of_second_moment(9, torch.eye(128) - 0.9), "second moment not positive definite: search"),
    ],
)
def test_gptq_falls_back_to_search_and_says_so(given, note):
    fallback = quantize_weight(weight(), "q4_1", "gptq", given)
    searched = quantize_weight(weight(), "q4_1", "search", given)
    assert fallback.note == note
    assert torch.equal(fallback.packed.blocks, searched.packed.blocks)


def test_constant_inputs_and_few_tokens_are_damped():
    """A moment of rank one, and one of fewer tokens than inputs: no error, and outputs better than search's."""
    rng = np.random.default_rng(0)
    few = rng.normal(size=(20, 128)).astype(np.float32)
    moment = torch.from_numpy(few.T @ few / 20)
    for given in (torch.ones(128, 128), (moment + moment.T) / 2):
        tokens = InputStatistics.of_second_moment(20, given)
        result = quantize_weight(weight(), "q4_1", "gptq", tokens)
        searched = quantize_weight(weight(), "q4_1", "search", tokens)
        assert result.note == "20 calibration tokens for 128 inputs"
        errors = [errors_by(r, weight(), given.numpy()) for r in (result, searched)]
        assert errors[0] < 0.2 * errors[1]


def test_inputs_that_are_never_active_do_no_harm():
    moment = statistics().second_moment.clone()
    dead = [0, 5, *range(64, 96)]
    moment[dead] = 0
    moment[:, dead] = 0
    result = quantize_weight(weight(), "q4_1", "gptq", InputStatistics.of_second_moment(500, moment))
    decoded = result.packed.dequantize()
    assert result.note is None
    assert (decoded[:, 64:96] - weight()[:, 64:96]).abs().max() < 0.01  # a step is about 0.005
    assert errors_by(result, weight(), moment.numpy()) < 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_zeros_and_constants_are_kept(method):
    zeros = quantize_weight(torch.zeros(3, 64), "q4_1", method, statistics(64))
    assert not zeros.packed.dequantize().any()
    assert (zeros.relative_error, zeros.weighted_error) == (0, 0)
    constant = quantize_weight(torch.full((3, 64), 0.5), "q4_1", method, statistics(64))
    assert torch.equal(constant.packed.dequantize(), torch.full((3, 64), 0.5))


@pytest.mark.parametrize("method", METHODS)
def test_bad_input_is_named(method):
    broken = weight()
    broken[3, 40] = float("nan")
    with pytest.raises(InputError, match="layer: row 3, column 40 is nan"):
        quantize_weight(broken, "q4_1", method, statistics(), name="layer")
    with pytest.raises(InputError, match=r"layer: shape \[4, 48\] cannot be packed as q4_1"):
        quantize_weight(torch.ones(4, 48), "q4_1", method, None, name="layer")
    with pytest.raises(InputError, match="layer: row 0, columns 0 to 31: the q4_0 scale overflows fp16"):
        quantize_weight(torch.full((2, 32), 1e7), "q4_0", method, None, name="layer")
    with pytest.raises(InputError, match=r"layer: statistics of shape \[64\] for 128 inputs"):
        quantize_weight(weight(), "q4_1", method, statistics(64), name="layer")


def test_bad_requests_are_named():
    with pytest.raises(InputError, match="unknown method 'awq'; choose one of: rtn, search, gptq"):
        quantize_weight(weight(), "q4_1", "awq", None)
    with pytest.raises(InputError, match="unknown format 'q9'"):
        quantize_weight(weight(), "q9", "rtn", None)
    for levels in (1, 17):
        with pytest.raises(InputError, match=f"q4_1 cannot use {levels} levels; choose 2 to 16"):
            quantize_weight(weight(), "q4_1", "rtn", None, levels=levels)
