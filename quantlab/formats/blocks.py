"""The block formats as rows of one table, and packed tensors made of them.

A block is 32 consecutive weights of one row, of tq2_0 256. Layouts are ggml's (ggml-common.h), which are also those of
GGUF files:

    q4_0   18 bytes: fp16 d | 16 code bytes                     w = d * (q - 8)
    q4_1   20 bytes: fp16 d | fp16 m | 16 code bytes            w = d * q + m
    q5_0   22 bytes: fp16 d | 4 high-bit bytes | 16 code bytes  w = d * (q - 16)
    q5_1   24 bytes: fp16 d | fp16 m | 4 high-bit bytes | 16    w = d * q + m
    q8_0   34 bytes: fp16 d | 32 int8                           w = d * q
    tq2_0  66 bytes: 64 code bytes | fp16 d                     w = d * (q - 1)

Code byte j holds the low four bits of elements j (low nibble) and j + 16 (high nibble); bit j of the high-bit bytes is
the fifth bit of element j. In tq2_0 byte j of each 32 holds elements j, j + 32, j + 64 and j + 96 of 128, two bits
each, the first lowest. This file imports no torch until a tensor is at hand.

The first five have scales of each block's own. tq2_0 is used as BitNet b1.58 does (Ma et al. 2024, arXiv 2402.17764):
one scale a tensor, the mean magnitude of its weights, written in every block (`formats.ternary`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from quantlab.errors import InputError

if TYPE_CHECKING:
    import torch

BLOCK_SIZE = 32  # weights, of the formats whose blocks have scales of their own


@dataclass(frozen=True)
class BlockFormat:
    """One block format. `levels` is the number of codes in use; fewer than the format's own make a stress variant
    in the same bytes (`FORMATS["q4_1"].with_levels(8)`).

    `block_size` counts weights per block. `scale_of` tells what has one scale: each block, or the whole tensor, so that
    no part of it can be quantized by itself. `activations` tells how int8 activations are scaled where they meet the
    format: by the largest of each run of 32, or by the largest of the whole token.
    """

    name: str
    ggml_type: int
    block_bytes: int
    code_bits: int
    levels: int
    has_minimum: bool
    block_size: int = BLOCK_SIZE
    scale_of: Literal["block", "tensor"] = "block"
    activations: Literal["block", "token"] = "block"

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales included."""
        return 8 * self.block_bytes / self.block_size

    @property
    def scale_bytes(self) -> slice:
        """Where the fp16 scales lie in a block: d, and m where there is one."""
        if self.scale_of == "tensor":
            return slice(self.block_bytes - 2, self.block_bytes)
        return slice(0, 4 if self.has_minimum else 2)

    @property
    def code_bytes(self) -> slice:
        """Where the codes lie in a block: all that is no scale."""
        scales = self.scale_bytes
        return slice(0, scales.start) if scales.start else slice(scales.stop, self.block_bytes)

    def with_levels(self, levels: int | None) -> BlockFormat:
        """The format with so many codes in use; None leaves it as it is.

        Raises:
            InputError: it has not so many, or needs more: q8_0 has as many codes below zero as above.
        """
        if levels is None:
            return self
        if self.scale_of == "tensor" and levels != self.levels:
            raise InputError(f"{self.name} cannot use {levels} levels: it has {self.levels}; leave out the levels")
        fewest = 3 if self.code_bits == 8 else 2
        if not fewest <= levels <= self.levels:
            raise InputError(f"{self.name} cannot use {levels} levels; choose {fewest} to {self.levels}")
        return replace(self, levels=levels)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape can be packed: two dimensions, rows of whole blocks."""
        return len(shape) == 2 and shape[0] > 0 and shape[1] > 0 and shape[1] % self.block_size == 0

    def row_bytes(self, columns: int) -> int:
        """Bytes of one packed row of `columns` weights."""
        return columns // self.block_size * self.block_bytes

    def columns(self, row_bytes: int) -> int:
        """Weights in one packed row of `row_bytes` bytes."""
        return row_bytes // self.block_bytes * self.block_size

    def quantize(self, weight: torch.Tensor, name: str = "tensor") -> PackedTensor:
        """Round `weight` to the nearest codes between each block's minimum and maximum.

        Byte for byte what `gguf.quants` and llama.cpp (without an importance matrix) write. A format with one scale a
        tensor takes the mean magnitude of all weights for it; its bytes are those that `gguf.quants` writes for the
        rounded weights.

        Args:
            weight: floating point [rows, columns] on any device, columns a multiple of `block_size`; all of a tensor.
            name: what errors call the tensor.

        Raises:
            InputError: the shape does not fit, a weight is NaN or infinite, or a scale overflows fp16.
        """
        from quantlab.formats import arithmetic

        if not self.fits(tuple(weight.shape)):
            raise InputError(
                f"{name}: shape {list(weight.shape)} cannot be packed as {self.name}: "
                f"two dimensions and rows of a multiple of {self.block_size} are needed"
            )
        return PackedTensor(arithmetic.quantize(weight, self, name), self)

    def dequantize(
        self, blocks: torch.Tensor, dtype: torch.dtype | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Unpack `blocks` (uint8 [..., row_bytes]) to [..., columns]: computed in fp32, then cast to `dtype`.

        Args:
            out: contiguous, of the result's shape and dtype and on its device: written to and returned, which spares
                the system from mapping and clearing new memory every time.
        """
        from quantlab.formats import arithmetic

        return arithmetic.dequantize(blocks, self, dtype, out)

    def fake_quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """`dequantize(quantize(weight))` in the dtype of `weight`, all of a tensor; gradients pass straight through."""
        from quantlab.formats import arithmetic

        return arithmetic.fake_quantize(weight, self)


@dataclass(frozen=True)
class PackedTensor:
    """A matrix in blocks: `blocks` is uint8 [rows, row_bytes]."""

    blocks: torch.Tensor
    format: BlockFormat

    @property
    def shape(self) -> tuple[int, int]:
        """The logical shape, (rows, columns)."""
        rows, row_bytes = self.blocks.shape
        return rows, self.format.columns(row_bytes)

    @property
    def nbytes(self) -> int:
        """Packed size in bytes."""
        return self.blocks.numel()

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weights, [rows, columns], fp32 unless `dtype` says otherwise."""
        return self.format.dequantize(self.blocks, dtype)


# ggml_type: the numbers of ggml.h's enum ggml_type, which GGUF files carry.
FORMATS: dict[str, BlockFormat] = {
    row.name: row
    for row in (
        BlockFormat("q4_0", ggml_type=2, block_bytes=18, code_bits=4, levels=16, has_minimum=False),
        BlockFormat("q4_1", ggml_type=3, block_bytes=20, code_bits=4, levels=16, has_minimum=True),
        BlockFormat("q5_0", ggml_type=6, block_bytes=22, code_bits=5, levels=32, has_minimum=False),
        BlockFormat("q5_1", ggml_type=7, block_bytes=24, code_bits=5, levels=32, has_minimum=True),
        BlockFormat("q8_0", ggml_type=8, block_bytes=34, code_bits=8, levels=255, has_minimum=False),
        BlockFormat(
            "tq2_0", ggml_type=35, block_bytes=66, code_bits=2, levels=3, has_minimum=False,
            block_size=256, scale_of="tensor", activations="token",
        ),
    )
}  # fmt: skip
ALIASES = {"ternary": "tq2_0"}


def format_named(name: str) -> BlockFormat:
    """The format of that name or alias, in any case.

    Raises:
        InputError: there is none; the message lists those there are.
    """
    word = name.lower()
    try:
        return FORMATS[ALIASES.get(word, word)]
    except KeyError:
        raise InputError(f"unknown format {name!r}; choose one of: {', '.join((*FORMATS, *ALIASES))}") from None


def check_own_scales(format: BlockFormat, what: str, way_out: str = "choose one of the other formats") -> None:
    """Refuse a format with one scale a tensor where blocks are changed one by one; `what` names who cannot take it.

    Raises:
        InputError: it has one scale a tensor.
    """
    if format.scale_of == "tensor":
        raise InputError(f"{what} needs blocks with scales of their own, and {format.name} has one a tensor; {way_out}")
