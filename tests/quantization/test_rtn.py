"""Round to nearest writes what gguf writes, and its error is measured as a share of the weight's norm."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from quantlab.errors import InputError
from quantlab.formats import FORMATS, PackedTensor, arithmetic
from quantlab.quantization.rtn import relative_error, round_and_measure, round_to_nearest

OWN_SCALES = {name: row for name, row in FORMATS.items() if row.scale_of == "block"}
every_format = pytest.mark.parametrize("format", OWN_SCALES.values(), ids=OWN_SCALES)


def gaussian(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def q8_0_of(codes: torch.Tensor) -> PackedTensor:
    """Whole numbers up to 127 as q8_0 with scale 1, written by hand: fp16 1.0 is the bytes 00 3C."""
    blocks = codes.to(torch.int8).view(torch.uint8).reshape(-1, 32)
    one = torch.tensor([0x00, 0x3C], dtype=torch.uint8).expand(len(blocks), 2)
    return PackedTensor(torch.cat([one, blocks], dim=1).reshape(len(codes), -1), FORMATS["q8_0"])


@every_format
def test_round_to_nearest_gives_ggufs_blocks(format):
    weight = gaussian(10, 96)
    packed = round_to_nearest(weight, format, "w")
    expected = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType(format.ggml_type))
    np.testing.assert_array_equal(packed.blocks.numpy(), expected)
    assert packed.format is format


def test_what_cannot_be_packed_is_named():
    weight = gaussian(3, 32)
    weight[2, 1] = float("nan")
    with pytest.raises(InputError, match=r"^layer\.weight: row 2, column 1 is nan"):
        round_to_nearest(weight, FORMATS["q4_1"], "layer.weight")


def test_relative_error_by_hand():
    """Weights 3 and 4 in one row come back as 3 and 2: the error's norm is 2, the weight's 5."""
    weight, rounded = torch.zeros(2, 32), torch.zeros(2, 32)
    weight[1, :2] = torch.tensor([3.0, 4.0])
    rounded[1, :2] = torch.tensor([3.0, 2.0])
    assert relative_error(weight, q8_0_of(rounded)) == 2 / 5


@pytest.mark.parametrize(("rounded", "error"), [(0, 1.0), (5, 0.0), (10, 1.0), (-5, 2.0)])
def test_relative_error_of_constant_rows(rounded, error):
    weight = torch.full((3, 64), 5.0)
    assert relative_error(weight, q8_0_of(torch.full((3, 64), rounded))) == error


def test_the_error_of_a_zero_weight_is_zero():
    assert relative_error(torch.zeros(2, 32), q8_0_of(torch.zeros(2, 32))) == 0.0


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_relative_error_is_that_of_numpy_in_double_precision(format, dtype):
    weight = gaussian(40, 96).to(dtype)
    packed = round_to_nearest(weight, format, "w")
    original = weight.to(torch.float64).numpy()
    decoded = gguf.quants.dequantize(packed.blocks.numpy(), gguf.GGMLQuantizationType(format.ggml_type))
    expected = np.linalg.norm(decoded - original) / np.linalg.norm(original)
    assert relative_error(weight, packed) == pytest.approx(expected, rel=1e-6)


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_one_pass_gives_the_same_blocks_and_their_error(format, dtype):
    weight = gaussian(40, 96).to(dtype)
    packed, error = round_and_measure(weight, format, "w")
    expected = round_to_nearest(weight, format, "w")
    assert packed.format is format
    assert torch.equal(packed.blocks, expected.blocks)
    assert error == pytest.approx(relative_error(weight, expected), rel=1e-6)


def test_one_pass_over_a_strided_weight_in_several_chunks_has_the_same_error(monkeypatch):
    weight = gaussian(96, 40).T
    expected = round_and_measure(weight.contiguous(), FORMATS["q4_1"], "w")[1]
    monkeypatch.setattr(arithmetic, "CHUNK_ELEMENTS", 7 * 96)
    assert round_and_measure(weight, FORMATS["q4_1"], "w")[1] == expected


def test_what_one_pass_cannot_pack_is_named():
    weight = gaussian(3, 64)
    with pytest.raises(InputError, match=r"^w: shape \[3, 40\] cannot be packed as q4_1"):
        round_and_measure(weight[:, :40], FORMATS["q4_1"], "w")
    weight[2, 1] = float("inf")
    with pytest.raises(InputError, match=r"^w: row 2, column 1 is inf"):
        round_and_measure(weight, FORMATS["q4_1"], "w")


def test_a_tensor_measured_in_several_chunks_has_the_same_error():
    """Two rows of 2**21 weights fill a chunk; the third row alone is wrong: 5 instead of 3 beside three 3s' norm."""
    columns = 1 << 21
    weight = torch.full((3, columns), 3.0)
    rounded = torch.tensor([[3], [3], [5]], dtype=torch.int8).expand(3, columns)
    assert relative_error(weight, q8_0_of(rounded)) == pytest.approx(2 / (3 * 3**0.5), rel=1e-12)
