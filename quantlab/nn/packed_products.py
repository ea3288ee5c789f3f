"""Products with packed weights in float activations: whole layers, bit for bit as a float layer, or tile by tile.

A training step multiplies by every weight twice or more, so its tiled products hold no more than a tile of rows in
float at a time: of a head of 32000 x 2048 weights 4 MB in place of 262. A tile's rows are multiplied as the whole
layer's would be, but torch chooses another split of the work for another shape: the last bits may differ.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from quantlab.formats import BlockFormat

# Weights in float at a time. On a CPU they should stay in its cache; an accelerator wants few and large products.
_CPU_TILE = 1 << 20
_ACCELERATOR_TILE = 1 << 24
_ROW_UNIT = 16  # matrix products are fastest in whole units


def packed_linear(
    x: torch.Tensor, blocks: torch.Tensor, bias: torch.Tensor | None, format: BlockFormat, transposed: bool
) -> torch.Tensor:
    """What a layer over `blocks` (uint8 [out, row_bytes]) computes of x [..., in]; see `QuantLinear`."""
    weight = format.dequantize(blocks, x.dtype)
    if not transposed:
        return F.linear(x, weight, bias)
    weight = weight.T.contiguous()
    rows = x.reshape(-1, x.shape[-1])
    result = rows @ weight if bias is None else torch.addmm(bias, rows, weight)
    return result.reshape(*x.shape[:-1], weight.shape[1])


def tiled_linear(x: torch.Tensor, blocks: torch.Tensor, bias: torch.Tensor | None, format: BlockFormat) -> torch.Tensor:
    """`packed_linear`, not transposed, with no more than a tile of W in float; the same bits where one is enough.

    Autocast rounds to its dtype as it does for a float layer. Not for autograd to follow.
    """
    tiles = list(_row_tiles(blocks, format))
    if len(tiles) <= 1:
        return packed_linear(x, blocks, bias, format, transposed=False)
    dtype = _multiplied_dtype(x)
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    offset = None if bias is None else bias.to(dtype)
    result = rows.new_empty(len(rows), len(blocks))
    for tile, weight in _tiles_in_float(tiles, blocks, format, dtype):
        result[:, tile] = F.linear(rows, weight, None if offset is None else offset[tile])
    return result.reshape(*x.shape[:-1], len(blocks))


def tiled_input_gradient(gradient: torch.Tensor, blocks: torch.Tensor, format: BlockFormat) -> torch.Tensor:
    """The gradient of a layer's input, [..., in] in the dtype of its output's, [..., out]: `gradient @ W`.

    Multiplied in that dtype; tiles are added in fp32 at least, in ascending order of rows.
    """
    tiles = list(_row_tiles(blocks, format))
    if len(tiles) <= 1:
        return gradient @ format.dequantize(blocks, gradient.dtype)
    rows = gradient.reshape(-1, gradient.shape[-1])
    columns = format.columns(blocks.shape[1])
    total = rows.new_zeros(len(rows), columns, dtype=torch.promote_types(rows.dtype, torch.float32))
    with torch.autocast(rows.device.type, enabled=False):  # the forward pass has chosen the dtype
        for tile, weight in _tiles_in_float(tiles, blocks, format, rows.dtype):
            if total.dtype == rows.dtype:
                total.addmm_(rows[:, tile], weight)
            else:
                total += rows[:, tile] @ weight
    return total.to(gradient.dtype).reshape(*gradient.shape[:-1], columns)


def _multiplied_dtype(x: torch.Tensor) -> torch.dtype:
    """What a float layer multiplies x in; autocast leaves float64 alone."""
    device = x.device.type
    is_cast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if is_cast else x.dtype


def _tiles_in_float(
    tiles: list[slice], blocks: torch.Tensor, format: BlockFormat, dtype: torch.dtype
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Each tile's rows with their weights, which hold until the next one is asked for: on a CPU all use the same
    memory, which the system would else map and clear for every tile. Accelerators keep what is freed.
    """
    if blocks.device.type != "cpu":
        yield from ((tile, format.dequantize(blocks[tile], dtype)) for tile in tiles)
        return
    height = max(tile.stop - tile.start for tile in tiles)
    memory = torch.empty(height, format.columns(blocks.shape[1]), dtype=dtype)
    for tile in tiles:
        yield tile, format.dequantize(blocks[tile], dtype, out=memory[: tile.stop - tile.start])


def _row_tiles(blocks: torch.Tensor, format: BlockFormat) -> Iterator[slice]:
    """Consecutive rows of `blocks`, in order, each as many as a tile holds."""
    rows, row_bytes = blocks.shape
    most = _CPU_TILE if blocks.device.type == "cpu" else _ACCELERATOR_TILE
    height = max(1, most // max(1, format.columns(row_bytes)) // _ROW_UNIT) * _ROW_UNIT
    for start in range(0, rows, height):
        yield slice(start, min(start + height, rows))
