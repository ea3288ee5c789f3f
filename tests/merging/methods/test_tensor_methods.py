"""Methods that need whole matrices, against the papers' formulas in float64 numpy and numbers worked by hand."""

import itertools

import numpy as np
import pytest
import torch

from quantlab.errors import InputError
from quantlab.merging.methods.method import merge_tensor
from quantlab.merging.methods.table import METHODS

SPECTRAL = ["iso_c", "tsv_m", "wudi"]
SHAPES = [(24, 40), (40, 24), (32, 32)]


def merged(name: str, base, tensors, grams=None, **parameters) -> np.ndarray:
    out = merge_tensor(
        METHODS[name],
        None if base is None else as_tensor(base),
        [as_tensor(tensor) for tensor in tensors],
        parameters,
        grams=None if grams is None else [None if gram is None else as_tensor(gram) for gram in grams],
    )
    assert out.dtype == torch.float32
    return out.numpy()


def as_tensor(values) -> torch.Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.float32)


def drawn(
    shape: tuple[int, ...], models: int, seed: int = 0, size: float = 0.01
) -> tuple[np.ndarray, list[np.ndarray]]:
    """A base and its fine-tunes, float32."""
    generator = np.random.default_rng(seed)
    base = generator.normal(size=shape).astype(np.float32)
    return base, [(base + size * generator.normal(size=shape)).astype(np.float32) for _ in range(models)]


def deltas_of(base: np.ndarray, tensors: list[np.ndarray]) -> list[np.ndarray]:
    return [tensor.astype(np.float64) - base for tensor in tensors]


def isotropic(deltas: list[np.ndarray]) -> np.ndarray:
    u, s, vh = np.linalg.svd(sum(deltas), full_matrices=False)
    return s.mean() * u @ vh


def task_singular_vectors(deltas: list[np.ndarray]) -> np.ndarray:
    kept = min(deltas[0].shape) // len(deltas)
    us, ss, vs = zip(*(np.linalg.svd(delta, full_matrices=False) for delta in deltas), strict=True)
    u, s, v = (
        np.concatenate([u[:, :kept] for u in us], 1),
        np.concatenate([s[:kept] for s in ss]),
        np.concatenate([v[:kept] for v in vs]),
    )
    (p, _, q), (x, _, y) = (np.linalg.svd(matrix, full_matrices=False) for matrix in (u, v))
    return p @ q @ np.diag(s) @ x @ y


def interference_minimised(deltas: list[np.ndarray], iterations: int, rate: float = 1e-5) -> np.ndarray:
    """torch's Adam and autograd on the paper's loss, in float64."""
    stacked = torch.tensor(np.stack(deltas))
    tau = torch.nn.Parameter(stacked.sum(dim=0))
    adam = torch.optim.Adam([tau], lr=rate)
    norms = stacked.square().sum(dim=(1, 2))
    for _ in range(iterations):
        adam.zero_grad()
        loss = (((tau - stacked) @ stacked.transpose(1, 2)).square().sum(dim=(1, 2)) / norms).sum()
        loss.backward()
        adam.step()
    return tau.detach().numpy()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("models", [1, 2, 3])
def test_iso_c_flattens_the_spectrum_of_the_sum(shape: tuple[int, int], models: int) -> None:
    base, tensors = drawn(shape, models)
    wanted = base + 1.5 * isotropic(deltas_of(base, tensors))
    np.testing.assert_allclose(merged("iso_c", base, tensors, **{"lambda": 1.5}), wanted, rtol=0, atol=3e-7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("models", [1, 2, 3])
def test_tsv_m_is_the_authors_recipe(shape: tuple[int, int], models: int) -> None:
    base, tensors = drawn(shape, models)
    wanted = base + task_singular_vectors(deltas_of(base, tensors))
    np.testing.assert_allclose(merged("tsv_m", base, tensors), wanted, rtol=0, atol=3e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_wudi_takes_the_steps_of_adam_on_the_papers_loss(shape: tuple[int, int]) -> None:
    base, tensors = drawn(shape, 3, size=0.02)
    wanted = interference_minimised(deltas_of(base, tensors), 300)
    moved = np.abs(wanted - sum(deltas_of(base, tensors))).max()
    assert moved > 1e-3
    found = merged("wudi", base, tensors) - base
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.01 * moved)
    assert np.abs(found - wanted).mean() < 1e-6


def test_wudi_options() -> None:
    base, tensors = drawn((8, 6), 2, size=0.02)
    deltas = deltas_of(base, tensors)
    options = {"iterations": 7, "learning_rate": 1e-3, "lambda": 0.5, "weight": [1.0, -2.0]}
    wanted = base + 0.5 * interference_minimised([deltas[0], -2 * deltas[1]], 7, 1e-3)
    np.testing.assert_allclose(merged("wudi", base, tensors, **options), wanted, rtol=0, atol=1e-5)
    np.testing.assert_allclose(merged("wudi", base, tensors, iterations=0), base + sum(deltas), rtol=0, atol=3e-7)


def test_a_single_model_keeps_its_delta_exactly_in_wudi() -> None:
    base, (tensor,) = drawn((16, 16), 1, size=0.5)
    base = np.round(base * 64) / 64  # so that base + (tensor - base) is the tensor
    tensor = np.round(tensor * 64) / 64
    assert np.array_equal(merged("wudi", base, [tensor]), tensor)


def test_the_identity_worked_by_hand() -> None:
    """Deltas diag(2, 0) and diag(0, 4): the sum's singular values 2 and 4 become 3; one triplet of each model is kept,
    and they are orthogonal, so nothing is lost; nor do they disturb each other.
    """
    base, tensors = np.ones((2, 2)), [np.ones((2, 2)) + np.diag([2.0, 0.0]), np.ones((2, 2)) + np.diag([0.0, 4.0])]
    np.testing.assert_allclose(merged("iso_c", base, tensors), [[4, 1], [1, 4]], rtol=1e-6)
    np.testing.assert_allclose(merged("tsv_m", base, tensors), [[3, 1], [1, 5]], rtol=1e-6)
    assert merged("wudi", base, tensors).tolist() == [[3, 1], [1, 5]]


@pytest.mark.parametrize("name", SPECTRAL)
@pytest.mark.parametrize("shape", [(5,), (24, 40)])
def test_the_order_of_models_does_not_matter(name: str, shape: tuple[int, ...]) -> None:
    base, tensors = drawn(shape, 3)
    weights = [1.0, 0.5, -0.25]
    first = merged(name, base, tensors, weight=weights)
    for order in itertools.permutations(range(3)):
        again = merged(name, base, [tensors[i] for i in order], weight=[weights[i] for i in order])
        np.testing.assert_allclose(again, first, rtol=0, atol=2e-5 if name == "wudi" else 5e-7)


@pytest.mark.parametrize("name", SPECTRAL)
def test_weights_scale_the_deltas(name: str) -> None:
    base, tensors = drawn((24, 40), 2)
    base = np.zeros_like(base)
    np.testing.assert_allclose(
        merged(name, base, tensors, weight=[0.5, 2.0]),
        merged(name, base, [0.5 * tensors[0], 2 * tensors[1]]),
        rtol=0,
        atol=1e-6,
    )


@pytest.mark.parametrize("name", SPECTRAL)
@pytest.mark.parametrize("as_matrix", [True, False])
def test_vectors_and_what_is_to_count_as_one_get_the_mean_of_the_deltas(name: str, as_matrix: bool) -> None:
    shape = (7,) if as_matrix else (7, 5)
    base, tensors = drawn(shape, 3)
    wanted = base + 0.5 * sum(deltas_of(base, tensors)) / 3
    found = merged(name, base, tensors, as_matrix=as_matrix, **{"lambda": 0.5})
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-7)


@pytest.mark.parametrize("name", SPECTRAL)
@pytest.mark.parametrize("shape", [(1,), (1, 1), (0,), (0, 4), (4, 0)])
def test_one_element_and_none(name: str, shape: tuple[int, ...]) -> None:
    base, tensors = np.full(shape, 1.0), [np.full(shape, 3.0), np.full(shape, 2.0)]
    found = merged(name, base, tensors)
    assert found.shape == shape
    if shape == (1,):
        assert found.tolist() == [2.5]
    if shape == (1, 1):
        # iso_c gives the sum; tsv_m half of each, polar factors of [1, 1] being [1, 1] / sqrt(2); wudi steps downhill.
        wanted = {"iso_c": 4.0, "tsv_m": 2.5, "wudi": 4.0 - 300e-5}[name]
        assert found[0, 0] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("name", SPECTRAL)
@pytest.mark.parametrize("shape", [(6,), (6, 4), (4, 6)])
def test_no_delta_gives_the_base_to_the_bit(name: str, shape: tuple[int, ...]) -> None:
    base, _ = drawn(shape, 1)
    assert np.array_equal(merged(name, base, [base, base]), base)


@pytest.mark.parametrize("name", SPECTRAL)
def test_a_model_without_a_delta_adds_nothing(name: str) -> None:
    base, (tensor,) = drawn((24, 16), 1)
    alone, beside = merged(name, base, [tensor]), merged(name, base, [base, tensor])
    if name == "tsv_m":  # which keeps half of the triplets for each of two models
        u, s, vh = np.linalg.svd(deltas_of(base, [tensor])[0], full_matrices=False)
        alone = base + (u[:, :8] * s[:8]) @ vh[:8]
    np.testing.assert_allclose(beside, alone, rtol=0, atol=2e-5 if name == "wudi" else 3e-7)


@pytest.mark.parametrize("name", ["iso_c", "tsv_m"])
@pytest.mark.parametrize("shape", SHAPES)
def test_deltas_of_low_rank_stay_in_their_space(name: str, shape: tuple[int, int]) -> None:
    """Rank 2 and rank 1 of 24 and more: directions that no delta has must not appear, whatever an SVD calls them."""
    generator = np.random.default_rng(3)
    base = np.zeros(shape)
    factors = [(generator.integers(-3, 4, (shape[0], r)), generator.integers(-3, 4, (r, shape[1]))) for r in (2, 1)]
    tensors = [(b @ a).astype(np.float64) for b, a in factors]  # whole numbers: exactly of that rank
    found = merged(name, base, tensors).astype(np.float64)
    assert (np.linalg.svd(found, compute_uv=False) > 1e-4).sum() == 3
    outside = np.eye(shape[0]) - (basis := np.linalg.svd(np.hstack([b for b, _ in factors]))[0][:, :3]) @ basis.T
    assert np.abs(outside @ found).max() < 1e-4
    values = np.linalg.svd(sum(tensors), compute_uv=False)[:3]
    if name == "iso_c":
        np.testing.assert_allclose(np.linalg.svd(found, compute_uv=False)[:3], values.mean(), rtol=1e-6)


def test_equal_models_give_their_reduced_delta_in_tsv_m() -> None:
    base, (tensor,) = drawn((24, 16), 1, size=1.0)
    u, s, vh = np.linalg.svd(deltas_of(base, [tensor])[0], full_matrices=False)
    wanted = base + (u[:, :8] * s[:8]) @ vh[:8]
    np.testing.assert_allclose(merged("tsv_m", base, [tensor, tensor]), wanted, rtol=0, atol=3e-6)


def test_more_models_than_directions_keep_one_triplet_each() -> None:
    base, tensors = drawn((2, 9), 3, size=1.0)
    found = merged("tsv_m", base, tensors)
    assert np.isfinite(found).all()
    assert not np.allclose(found, base)


@pytest.mark.parametrize("name", ["iso_c", "tsv_m"])
def test_weights_that_are_no_numbers_are_refused(name: str) -> None:
    base, tensors = drawn((4, 6), 2)
    tensors[1][2, 3] = np.nan
    with pytest.raises(InputError, match="NaN or infinity"):
        merged(name, base, tensors)


# RegMean


def moments(columns: int, count: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    inputs = [
        generator.normal(size=(3 * columns, columns)) @ generator.normal(size=(columns, columns)) for _ in range(count)
    ]
    return [(x.T @ x / len(x)).astype(np.float32).astype(np.float64) for x in inputs]


def reduced(gram: np.ndarray, factor: float) -> np.ndarray:
    return factor * gram + (1 - factor) * np.diag(np.diag(gram))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("factor", [1.0, 0.9, 0.0])
def test_regmean_solves_the_papers_equation(shape: tuple[int, int], factor: float) -> None:
    _, tensors = drawn(shape, 3, size=1.0)
    grams = moments(shape[1], 3)
    small = [reduced(gram, factor) for gram in grams]
    numerator = sum(tensor.astype(np.float64) @ gram for tensor, gram in zip(tensors, small, strict=True))
    wanted = numerator @ np.linalg.inv(sum(small))
    found = merged("regmean", None, tensors, grams, off_diagonal=factor, damping=0.0)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)
    for order in itertools.permutations(range(3)):
        again = merged(
            "regmean", None, [tensors[i] for i in order], [grams[i] for i in order], off_diagonal=factor, damping=0.0
        )
        np.testing.assert_allclose(again, found, rtol=0, atol=1e-6)


def test_regmean_worked_by_hand() -> None:
    """Diagonal moments weigh each column's mean: (1 * 3 + 4 * 1) / 4 and (2 * 1 + 6 * 3) / 4."""
    tensors, grams = [[[1.0, 2.0]], [[4.0, 6.0]]], [np.diag([3.0, 1.0]), np.diag([1.0, 3.0])]
    assert merged("regmean", None, tensors, grams, damping=0.0).tolist() == [[1.75, 5.0]]
    weighted = merged("regmean", None, tensors, grams, damping=0.0, weight=[1.0, 3.0])  # (3 + 4 * 3) / 6, (2 + 54) / 10
    np.testing.assert_allclose(weighted, [[2.5, 5.6]], rtol=1e-6)


def test_regmean_without_moments_is_the_weighted_mean() -> None:
    _, tensors = drawn((6, 4), 2, size=1.0)
    for grams in (None, [None, None], [moments(4, 1)[0], None]):
        np.testing.assert_allclose(
            merged("regmean", None, tensors, grams, weight=[1.0, 3.0]), 0.25 * tensors[0] + 0.75 * tensors[1], atol=1e-6
        )
    vectors = [tensor[0] for tensor in tensors]
    np.testing.assert_allclose(merged("regmean", None, vectors), sum(vectors) / 2, atol=1e-6)
    assert merged("regmean", None, [[[2.0]], [[4.0]]], [[[1.0]], [[3.0]]], damping=0.0).tolist() == [[3.5]]


def test_inputs_that_no_model_sees_get_the_mean() -> None:
    _, tensors = drawn((6, 4), 2, size=1.0)
    grams = moments(4, 2)
    for gram in grams:
        gram[2] = gram[:, 2] = 0
    found = merged("regmean", None, tensors, grams, damping=0.0)
    np.testing.assert_allclose(found[:, 2], (tensors[0][:, 2] + tensors[1][:, 2]) / 2, rtol=1e-6)
    kept = [0, 1, 3]
    wanted = merged("regmean", None, [t[:, kept] for t in tensors], [g[np.ix_(kept, kept)] for g in grams], damping=0.0)
    np.testing.assert_allclose(found[:, kept], wanted, rtol=0, atol=1e-5)
    nothing = [np.zeros((4, 4))] * 2
    np.testing.assert_allclose(merged("regmean", None, tensors, nothing), sum(tensors) / 2, atol=1e-6)


def test_equal_models_stay_as_they_are_in_regmean() -> None:
    _, (tensor,) = drawn((6, 4), 1)
    found = merged("regmean", None, [tensor, tensor, tensor], moments(4, 3), weight=[0.1, 0.7, 1.9])
    assert np.array_equal(found, tensor)


def test_what_regmean_refuses() -> None:
    _, tensors = drawn((6, 4), 2)
    with pytest.raises(InputError, match="for 4 inputs"):
        merged("regmean", None, tensors, moments(6, 2))
    with pytest.raises(InputError, match="all weights are zero"):
        merged("regmean", None, tensors, weight=[0.0, 0.0])
    bad = moments(4, 2)
    bad[1][0, 0] = np.nan
    with pytest.raises(InputError, match="NaN"):
        merged("regmean", None, tensors, bad)
    with pytest.raises(InputError, match="positive semidefinite"):
        merged("regmean", None, tensors, [np.diag([1.0, 1, 1, -2.0])] * 2)


@pytest.mark.parametrize("name", [*SPECTRAL, "regmean"])
def test_inputs_are_not_changed(name: str) -> None:
    base, tensors = drawn((8, 6), 2)
    given = [as_tensor(base), *map(as_tensor, tensors)]
    grams = [as_tensor(gram) for gram in moments(6, 2)]
    before = [tensor.clone() for tensor in [*given, *grams]]
    method = METHODS[name]
    merge_tensor(method, given[0], given[1:], {}, grams=grams)
    assert all(torch.equal(now, then) for now, then in zip([*given, *grams], before, strict=True))
    assert method.copies((8, 6)) > 1
    assert method.copies((6,)) >= 1
