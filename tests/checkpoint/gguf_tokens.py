"""A few pieces and merges to make tokenizers of."""

from __future__ import annotations

PIECES = {
    piece: -float(rank)
    for rank, piece in enumerate(["ab", "\u2581a", "\u2581\u2581", "aba", "\u2581ab", "ba", "\u2581", "a", "b", "c"])
}

MERGES = "h e, l l, he ll, \u0120 w, 1 2, 12 3, \u0120 \u0120, a b, b c, ' s, \u010a \u010a"
