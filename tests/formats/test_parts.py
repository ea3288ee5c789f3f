"""Blocks come apart into the scales and codes that gguf multiplies, and together again into the same bytes."""

from __future__ import annotations

import gguf
import pytest
import torch

from quantlab.formats import FORMATS
from quantlab.formats.parts import codes_of, scales_of, with_codes, with_scales

OWN_SCALES = {name: row for name, row in FORMATS.items() if row.scale_of == "block"}
every_format = pytest.mark.parametrize("format", OWN_SCALES.values(), ids=OWN_SCALES)


def some_blocks(format, rows: int = 6, columns: int = 96) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return format.quantize(torch.randn(rows, columns, generator=generator) + 0.3).blocks


@every_format
def test_scales_times_codes_are_the_weights_as_gguf_reads_them(format):
    blocks = some_blocks(format)
    d, m = scales_of(blocks, format)
    codes = codes_of(blocks, format)
    assert torch.equal(codes, codes.round())
    assert (m is not None) == format.has_minimum
    weights = d.repeat_interleave(32, dim=1) * codes
    if m is not None:
        weights = weights + m.repeat_interleave(32, dim=1)
    kind = gguf.GGMLQuantizationType[format.name.upper()]
    assert torch.equal(weights, torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), kind)))


@every_format
def test_own_parts_give_the_bytes_back(format):
    blocks = some_blocks(format)
    assert torch.equal(with_scales(blocks, format, *scales_of(blocks, format)), blocks)
    assert torch.equal(with_codes(blocks, format, codes_of(blocks, format)), blocks)


@every_format
def test_other_codes_are_the_ones_that_are_read(format):
    blocks = some_blocks(format)
    before = blocks.clone()
    lowest = 0 if format.has_minimum else -(1 << (format.code_bits - 1))
    highest = lowest + (1 << format.code_bits) - 1
    wanted = torch.randint(lowest, highest + 1, (6, 96), generator=torch.Generator().manual_seed(4)).float()
    changed = with_codes(blocks, format, wanted)
    assert torch.equal(codes_of(changed, format), wanted)
    assert torch.equal(scales_of(changed, format)[0], scales_of(blocks, format)[0])
    assert torch.equal(blocks, before)


@every_format
def test_other_scales_are_rounded_to_fp16(format):
    blocks = some_blocks(format)
    d, m = scales_of(blocks, format)
    wanted = d * 1.2345678
    changed = with_scales(blocks, format, wanted, m)
    assert torch.equal(scales_of(changed, format)[0], wanted.half().float())
    assert torch.equal(codes_of(changed, format), codes_of(blocks, format))
