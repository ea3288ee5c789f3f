"""Weights that make up for the drift of their inputs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from slow_quantizers import gaussian

from quantlab.quantization.drift import damping_of, undrifted
from quantlab.quantization.methods import NO_MOMENT, quantize_weight
from quantlab.quantization.statistics import InputStatistics

TOKENS, COLUMNS, ROWS = 32_000, 64, 600


@pytest.fixture(scope="module")
def inputs() -> tuple[np.ndarray, np.ndarray]:
    """What an original layer reads and what its copy reads, float64 [tokens, columns]: a part of the difference can be
    told from the copy's inputs, a part is noise.
    """
    draw = np.random.default_rng(3)
    there = draw.normal(size=(TOKENS, COLUMNS)) * np.linspace(0.2, 3, COLUMNS)
    mixed = there @ (np.eye(COLUMNS) + 0.03 * draw.normal(size=(COLUMNS, COLUMNS)))
    return there, mixed + 0.05 * draw.normal(size=(TOKENS, COLUMNS))


def known(there: np.ndarray, here: np.ndarray) -> InputStatistics:
    moment, drift = (torch.from_numpy(part.T @ here / TOKENS).float() for part in (here, there - here))
    return InputStatistics.of_second_moment(TOKENS, moment, drift=drift)


def test_it_is_the_least_squares_solution(inputs):
    there, here = inputs
    weight = torch.from_numpy(gaussian(ROWS, COLUMNS))
    statistics = known(there, here)
    found = undrifted(weight, statistics, threads=1)
    # ridge regression of W y - W x on x, as rows under the data
    penalty = np.sqrt(TOKENS * 0.02 * (here**2).sum(axis=1).mean() / COLUMNS) * np.eye(COLUMNS)
    wanted = np.vstack([(there - here) @ weight.double().numpy().T, np.zeros((COLUMNS, ROWS))])
    change = np.linalg.lstsq(np.vstack([here, penalty]), wanted, rcond=None)[0].T
    np.testing.assert_allclose(found.numpy(), weight.numpy() + change, rtol=1e-4, atol=1e-5)


def test_damping_follows_tokens_a_column():
    assert damping_of(64, 32_000) == pytest.approx(0.02)
    assert damping_of(5632, 65_536) == pytest.approx(0.859375)
    assert damping_of(256, 10**6) == 0.01


def test_what_a_few_tokens_seem_to_tell_is_left_out():
    """Of drift that has nothing to do with the inputs, on tokens that were not among them."""
    draw = np.random.default_rng(5)
    here, there = (part * np.linspace(0.5, 2, COLUMNS) for part in draw.normal(size=(2, 4256, COLUMNS)))
    there, seen, fresh = here + 0.3 * there, slice(256), slice(256, None)
    moment, drift = (torch.from_numpy(part[seen].T @ here[seen] / 256).float() for part in (here, there - here))
    weight = torch.from_numpy(gaussian(ROWS, COLUMNS))

    def lost(weight_used: torch.Tensor) -> float:
        apart = there[fresh] @ weight.double().numpy().T - here[fresh] @ weight_used.double().numpy().T
        return float(np.square(apart).sum())

    few = InputStatistics.of_second_moment(256, moment, drift=drift)
    assert lost(undrifted(weight, few, 1)) < 1.1 * lost(weight)
    many = InputStatistics.of_second_moment(10**6, moment, drift=drift)  # as if they were as good as that
    assert lost(undrifted(weight, many, 1)) > 1.2 * lost(weight)


def test_hidden_states_are_made_up_for_too(inputs):
    """Where the outputs are added to states that drifted by a part that the inputs tell of, little of it is left."""
    there, here = inputs
    told = here @ np.random.default_rng(4).normal(size=(COLUMNS, ROWS)) * 0.02
    weight = torch.from_numpy(gaussian(ROWS, COLUMNS))
    floats = weight.double().numpy()
    wanted = there @ floats.T + told
    statistics = known(there, here)
    drift = torch.from_numpy((wanted - here @ floats.T).T @ here / TOKENS).float()
    behind = InputStatistics.of_second_moment(TOKENS, statistics.second_moment, output_drift=drift)
    found = undrifted(weight, behind, 1)
    assert torch.equal(found, undrifted(weight, behind, 3))
    left = [np.square(wanted - here @ w.double().numpy().T).sum() for w in (found, undrifted(weight, statistics, 1))]
    assert left[0] < 0.2 * left[1]


def test_both_forms_of_drift_are_one_where_hidden_states_did_not(inputs):
    statistics = known(*inputs)
    weight = torch.from_numpy(gaussian(ROWS, COLUMNS))
    moment, drift = statistics.second_moment, weight @ statistics.drift
    behind = InputStatistics.of_second_moment(TOKENS, moment, output_drift=drift)
    torch.testing.assert_close(undrifted(weight, behind, 1), undrifted(weight, statistics, 1), rtol=1e-5, atol=1e-6)


def test_bits_do_not_depend_on_threads_and_no_drift_changes_nothing(inputs):
    statistics = known(*inputs)
    weight = torch.from_numpy(gaussian(ROWS, COLUMNS))
    assert torch.equal(undrifted(weight, statistics, 1), undrifted(weight, statistics, 3))
    none = replace(statistics, drift=torch.zeros_like(statistics.drift))
    assert torch.equal(undrifted(weight, none, 1), weight)


@pytest.mark.parametrize("exponent", [-90, 90])
def test_the_inputs_unit_changes_nothing(inputs, exponent):
    there, here = inputs
    weight = torch.from_numpy(gaussian(32, COLUMNS))
    statistics, far = known(there, here), known(there * 2.0 ** (exponent / 2), here * 2.0 ** (exponent / 2))
    assert torch.equal(undrifted(weight, far, 1), undrifted(weight, statistics, 1))


@pytest.mark.parametrize("format", ["q4_0", "q4_1"])
def test_outputs_come_closer_to_the_originals(inputs, format):
    there, here = inputs
    weight = torch.from_numpy(gaussian(ROWS, COLUMNS))

    def lost(**options: bool) -> float:
        found = quantize_weight(weight, format, "gptq", known(there, here), **options)
        decoded = found.packed.dequantize().double().numpy()
        apart = weight.double().numpy() - decoded
        assert found.relative_error == pytest.approx(np.linalg.norm(apart) / np.linalg.norm(weight.numpy()), rel=1e-6)
        return float(np.square(there @ weight.double().numpy().T - here @ decoded.T).sum())

    assert lost() < 0.8 * lost(correct_drift=False)


def test_a_moment_of_no_inputs_falls_back_to_search(inputs):
    statistics = known(*inputs)
    moment = -statistics.second_moment
    broken = InputStatistics(TOKENS, statistics.diagonal, moment, drift=statistics.drift)
    assert quantize_weight(torch.from_numpy(gaussian(32, COLUMNS)), "q4_1", "gptq", broken).note == NO_MOMENT
