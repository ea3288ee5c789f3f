"""Wrong arguments of a decoder's branches: an exception that names them, and the branches as they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bad_arguments import every_other, frozen

from quantlab import native
from quantlab.generation.engines import load_engine

VOCABULARY = 512


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def logits(rows: int = 1) -> np.ndarray:
    return np.zeros((rows, VOCABULARY), np.float32)


@pytest.fixture
def one(llama_model: Path) -> native.Decoder:
    """A decoder whose sequence of three tokens has two branches with room for one."""
    engine = load_engine(llama_model, context=40, threads=1)
    engine.prefill([3, 4, 5])
    engine._decoder.begin_branches(2, 1)
    return engine._decoder


@pytest.mark.parametrize(
    ("tokens", "branches", "out", "error", "message"),
    [
        (ids(), ids(), logits(0), ValueError, "no tokens to append"),
        (ids(1), ids(0, 1), logits(), ValueError, "branches has 2 entries; expected 1, one for each token"),
        (ids(1), ids(2), logits(), ValueError, "branch 2: there are 2"),
        (ids(1), ids(-(2**31)), logits(), ValueError, "branch -2147483648: there are 2"),
        (ids(1, 1), ids(0, 0), logits(2), ValueError, "branch 0 is named twice"),
        (ids(512), ids(0), logits(), ValueError, "token id 512 is outside the vocabulary of 512"),
        (ids(1), ids(0), logits(2), ValueError, r"logits has shape \[2, 512\]; expected \[1, 512\]"),
        (ids(1), ids(0), np.zeros((1, 511), np.float32), ValueError, r"logits has shape \[1, 511\]"),
        (ids(1), ids(0), frozen(logits()), TypeError, "logits: .*read-only"),
        (ids(1), ids(0), every_other(logits()), TypeError, "logits: .*not contiguous"),
        (ids(1), ids(0).astype(np.int64), logits(), TypeError, "branches: .*got int64"),
        (ids(1).astype(np.int64), ids(0), logits(), TypeError, "tokens: .*got int64"),
        (None, ids(0), logits(), TypeError, "tokens"),
    ],
)
def test_append_to_branches(one, tokens, branches, out, error, message):
    with pytest.raises(error, match=message):
        one.append_to_branches(tokens, branches, out)
    one.append_to_branches(ids(1, 2), ids(1, 0), logits(2))  # there is room still
    with pytest.raises(ValueError, match="branch 0 is full: it has room for 1 tokens"):
        one.append_to_branches(ids(1), ids(0), logits())
    assert one.position == 3


@pytest.mark.parametrize(
    ("count", "room", "error", "message"),
    [
        (0, 1, ValueError, "count is 0; expected 1 to 65536 branches"),
        (2**31 - 1, 1, ValueError, "count is 2147483647"),
        (2, 0, ValueError, "room is 0; expected 1 to 40 tokens"),
        (2, 38, ValueError, "branches of 38 tokens do not fit: the context of 40 holds 3 already"),
        (2, -(2**31), ValueError, "room is -2147483648"),
        (2**40, 1, TypeError, "incompatible"),
        ("x", 1, TypeError, "incompatible"),
    ],
)
def test_begin_branches(one, count, room, error, message):
    with pytest.raises(error, match=message):
        one.begin_branches(count, room)
    one.append_to_branches(ids(1), ids(0), logits())  # those from before


def test_what_branches_take(one):
    tile = one.cache_bytes(16)
    assert one.branch_bytes(3, 1) == 3 * tile
    assert one.branch_bytes(3, 2) == 3 * 2 * tile  # behind a tile that is full but for one token
    with pytest.raises(ValueError, match="count is -1"):
        one.branch_bytes(-1, 1)
