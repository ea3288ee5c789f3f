"""An embedding table whose rows stay in blocks until they are looked up."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from quantlab.formats import BlockFormat, PackedTensor


class QuantEmbedding(nn.Embedding):
    """Token embedding over blocks: only the rows that are asked for are dequantized.

    `weight` is a uint8 Parameter [num_embeddings, row_bytes] without gradient, which a tied head shares. An empty
    buffer carries the output's dtype, so that `.to(torch.bfloat16)` on the model changes it as for a float embedding.
    `scale` multiplies the output, as Gemma's embeddings do.
    """

    output_like: torch.Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        format: BlockFormat,
        padding_idx: int | None = None,
        scale: float | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Embedding's own would allocate the float table
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.format, self.scale = format, scale
        blocks = torch.zeros(num_embeddings, format.row_bytes(embedding_dim), dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(blocks, requires_grad=False)
        self.register_buffer("output_like", torch.empty(0, dtype=dtype, device=device), persistent=False)

    def packed_weight(self) -> PackedTensor:
        """The table's blocks, shared with the module."""
        return PackedTensor(self.weight.data, self.format)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Integer ids [...] -> [..., embedding_dim]."""
        rows = self.format.dequantize(F.embedding(input, self.weight), self.output_like.dtype)
        return rows if self.scale is None else rows * torch.tensor(self.scale).to(rows.dtype)

    def reset_parameters(self) -> None:
        """Nothing: blocks come from a checkpoint."""

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.format.name}"
