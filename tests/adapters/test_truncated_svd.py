"""Leading singular directions: both ways of finding them against numpy's SVD."""

import numpy as np
import pytest
import torch

from quantlab.adapters.truncated_svd import SPARE, STEPS, WORTH, truncated_svd

LARGE = (300, 420)  # where a rank of 2 goes by a Krylov space


def test_the_large_case_takes_the_other_way() -> None:
    assert WORTH * min(LARGE) > (2 + SPARE) * (STEPS + 1)


@pytest.mark.parametrize(("shape", "rank"), [((12, 20), 5), ((20, 12), 12), ((1, 7), 3), ((7, 1), 1), (LARGE, 2)])
def test_triplets_are_numpys(shape: tuple[int, int], rank: int) -> None:
    matrix = np.random.default_rng(0).normal(size=shape)
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    rank = min(rank, len(s))
    found = truncated_svd(torch.from_numpy(matrix), rank)
    loose = 1e-4 if shape == LARGE else 1e-10  # a flat spectrum: the hardest for a Krylov space
    np.testing.assert_allclose(found.s, s[:rank], rtol=loose)
    np.testing.assert_allclose(found.u.T @ found.u, np.eye(rank), atol=1e-9)
    np.testing.assert_allclose(found.vh @ found.vh.T, np.eye(rank), atol=1e-9)
    assert (found.u[found.u.abs().argmax(dim=0), torch.arange(rank)] > 0).all()
    best = np.linalg.norm(matrix - (u[:, :rank] * s[:rank]) @ vh[:rank])
    assert np.linalg.norm(matrix - found.product().numpy()) <= best * (1 + loose) + 1e-10


@pytest.mark.parametrize("shape", [(30, 40), LARGE, LARGE[::-1]])
def test_a_matrix_of_low_rank_is_found_whole(shape: tuple[int, int]) -> None:
    generator = np.random.default_rng(1)
    matrix = torch.from_numpy(generator.normal(size=(shape[0], 2)) @ generator.normal(size=(2, shape[1])))
    found = truncated_svd(matrix, 2)
    torch.testing.assert_close(found.product(), matrix, rtol=0, atol=1e-12)
    whole = truncated_svd(torch.arange(shape[0])[:, None].expand(shape), 2)
    assert whole.rank == 1  # directions that are zero are left out


def test_zero_has_no_direction_and_one_number_has_one() -> None:
    assert truncated_svd(torch.zeros(4, 6), 3).rank == 0
    one = truncated_svd(torch.tensor([[-3.0]]), 2)
    assert (one.u.tolist(), one.s.tolist(), one.vh.tolist()) == ([[1.0]], [3.0], [[-1.0]])


def test_the_same_matrix_gives_the_same_bits() -> None:
    matrix = torch.from_numpy(np.random.default_rng(2).normal(size=LARGE).astype(np.float32))
    one, two = truncated_svd(matrix, 2), truncated_svd(matrix.clone(), 2)
    assert torch.equal(one.u, two.u)
    assert torch.equal(one.vh, two.vh)
