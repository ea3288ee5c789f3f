"""What a linear layer's inputs looked like on calibration text: the second moment of its columns, or parts of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantlab.errors import InputError
from quantlab.formats.blocks import BLOCK_SIZE

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class InputStatistics:
    """Means over `tokens` inputs x of one layer, [in] each.

    `diagonal` is float32 [in], the mean squares E[x_i^2]. `second_moment` is float32 [in, in], E[x x^T], symmetric, or
    None where it was not kept; `gptq` needs it. `tiles`, float32 [in / 32, 32, 32], are the blocks along its diagonal,
    one for each block of a row: a thousandth of its size at 32,000 columns, and worth much to `search`. They may be
    left out, and so may the second moment: `search` then uses the diagonal. `drift`, float32 [in, in], is
    E[(y - x) x^T] with y what the original model's layer reads where this one reads x; None where nobody looked.
    `output_drift`, float32 [out, in], takes its place where the layer's outputs are added to hidden states, s in the
    original and r here: E[(W y + s - (W x + r)) x^T] with W the original's weight.
    """

    tokens: int
    diagonal: torch.Tensor
    second_moment: torch.Tensor | None = None
    tiles: torch.Tensor | None = None
    drift: torch.Tensor | None = None
    output_drift: torch.Tensor | None = None

    @classmethod
    def of_second_moment(cls, tokens: int, second_moment: torch.Tensor, **drifts: torch.Tensor) -> InputStatistics:
        """Statistics with the diagonal taken from `second_moment`, float32 [in, in]; `drifts` by their names."""
        return cls(tokens, second_moment.diagonal().clone(), second_moment, **drifts)

    @classmethod
    def of_tiles(cls, tokens: int, tiles: torch.Tensor) -> InputStatistics:
        """Statistics with the diagonal taken from `tiles`, float32 [in / 32, 32, 32]."""
        return cls(tokens, tiles.diagonal(dim1=1, dim2=2).reshape(-1).clone(), tiles=tiles)

    def known_tiles(self) -> torch.Tensor | None:
        """The tiles, from the second moment if need be; None where neither is known."""
        if self.tiles is not None or self.second_moment is None:
            return self.tiles
        import torch

        blocks = range(0, self.columns, BLOCK_SIZE)
        return torch.stack([self.second_moment[i : i + BLOCK_SIZE, i : i + BLOCK_SIZE] for i in blocks])

    @property
    def knows_drift(self) -> bool:
        """Whether somebody looked for drift."""
        return self.drift is not None or self.output_drift is not None

    @property
    def columns(self) -> int:
        """Inputs of the layer: columns of its weight."""
        return int(self.diagonal.shape[0])

    def check(self, rows: int, columns: int, name: str) -> None:
        """Raise InputError, naming `name`, unless these are statistics of a layer with a weight [rows, columns]."""
        if self.tokens < 1:
            raise InputError(f"{name}: statistics of no tokens; collect them again with more calibration text")
        shapes: list[tuple[torch.Tensor, tuple[int, ...]]] = [(self.diagonal, (columns,))]
        if self.second_moment is not None:
            shapes.append((self.second_moment, (columns, columns)))
        if self.drift is not None:
            shapes.append((self.drift, (columns, columns)))
        if self.output_drift is not None:
            shapes.append((self.output_drift, (rows, columns)))
        if self.tiles is not None:
            shapes.append((self.tiles, (columns // BLOCK_SIZE, BLOCK_SIZE, BLOCK_SIZE)))
        for tensor, shape in shapes:
            if tuple(tensor.shape) != shape:
                raise InputError(
                    f"{name}: statistics of shape {list(tensor.shape)} for {columns} inputs; "
                    "they belong to another model, collect them again"
                )
            if not all(map(math.isfinite, tensor.aminmax())):
                raise InputError(
                    f"{name}: statistics hold NaN or infinity; the layer's inputs overflow on the calibration text, "
                    "collect them again in fp32"
                )
        if bool((self.diagonal < 0).any()):
            raise InputError(f"{name}: statistics hold negative mean squares; the file is damaged, collect them again")
