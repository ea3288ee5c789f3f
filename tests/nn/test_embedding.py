"""QuantEmbedding looks up what nn.Embedding holds after dequantizing, and keeps only blocks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quantlab.formats import FORMATS
from quantlab.nn import QuantEmbedding

ROWS, COLUMNS = 100, 64

OWN_SCALES = {name: row for name, row in FORMATS.items() if row.scale_of == "block"}
every_format = pytest.mark.parametrize("format", OWN_SCALES.values(), ids=OWN_SCALES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def twins(dtype: torch.dtype = torch.float32, format=FORMATS["q8_0"]) -> tuple[QuantEmbedding, nn.Embedding]:
    """A packed table and the float table of its dequantized rows."""
    packed = format.quantize(torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)))
    quantized = QuantEmbedding(ROWS, COLUMNS, format=format, dtype=dtype)
    quantized.weight.data = packed.blocks
    return quantized, nn.Embedding.from_pretrained(packed.dequantize(dtype))


@every_format
@every_dtype
@pytest.mark.parametrize("ids", [[3, 99, 3, 0], [[1, 2], [3, 4]], 7, []], ids=str)
def test_lookup_is_that_of_the_dequantized_table_to_the_last_bit(format, dtype, ids):
    quantized, plain = twins(dtype, format)
    ids = torch.tensor(ids, dtype=torch.long)
    result = quantized(ids)
    assert result.dtype == dtype
    assert torch.equal(result, plain(ids))


def test_ids_may_be_32_bit():
    quantized, plain = twins()
    assert torch.equal(quantized(torch.tensor([5, 6], dtype=torch.int32)), plain(torch.tensor([5, 6])))


@pytest.mark.parametrize("id", [-1, ROWS])
def test_ids_outside_of_the_table_are_refused(id):
    """Negative ones too: they do not count from the end."""
    quantized, plain = twins()
    for table in (plain, quantized):
        with pytest.raises(IndexError):
            table(torch.tensor([id]))


@every_dtype
def test_changing_the_dtype_changes_the_output_and_keeps_the_blocks(dtype):
    quantized, plain = twins()
    blocks = quantized.weight.clone()
    quantized.to(dtype)
    ids = torch.arange(ROWS)
    assert quantized(ids).dtype == dtype
    assert torch.equal(quantized(ids), plain(ids).to(dtype))
    assert torch.equal(quantized.weight, blocks)


def test_the_table_is_bytes_without_gradient():
    quantized, _ = twins(format=FORMATS["q4_0"])
    assert isinstance(quantized.weight, nn.Parameter)
    assert (quantized.weight.dtype, quantized.weight.shape) == (torch.uint8, (ROWS, COLUMNS // 32 * 18))
    assert not quantized.weight.requires_grad
    assert not quantized(torch.tensor([1])).requires_grad


def test_state_dict_holds_the_blocks_alone():
    quantized, _ = twins()
    state = quantized.state_dict()
    assert list(state) == ["weight"]
    fresh = QuantEmbedding(ROWS, COLUMNS, format=quantized.format)
    assert not fresh(torch.arange(ROWS)).any()
    fresh.load_state_dict(state)
    assert torch.equal(fresh(torch.arange(ROWS)), quantized(torch.arange(ROWS)))


def test_packed_weight_shares_the_modules_blocks():
    quantized, plain = twins()
    packed = quantized.packed_weight()
    assert packed.blocks.data_ptr() == quantized.weight.data_ptr()
    assert packed.shape == (ROWS, COLUMNS)
    assert torch.equal(packed.dequantize(), plain.weight)


def test_it_is_an_embedding_that_shows_its_format():
    table = QuantEmbedding(ROWS, COLUMNS, format=FORMATS["q4_1"], padding_idx=2)
    assert isinstance(table, nn.Embedding)
    assert repr(table) == "QuantEmbedding(100, 64, padding_idx=2, format=q4_1)"


def test_resetting_parameters_keeps_the_blocks():
    quantized, _ = twins()
    blocks = quantized.weight.clone()
    quantized.reset_parameters()
    assert torch.equal(quantized.weight, blocks)
