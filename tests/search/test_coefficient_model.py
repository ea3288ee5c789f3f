"""The gradient of a merge's loss by its coefficients, against differences of losses and against autograd."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coefficient_models import SMALL, config_text, moved, noise, opened, spread, tokens, weights

from quantlab.checkpoint import open_checkpoint
from quantlab.formats import format_named
from quantlab.loading import load_model
from quantlab.search.coefficient_model import PART_TOKENS, padded, parts_of

WINDOWS = [*tokens(2, 12), *tokens(1, 7, seed=1)]


def family(make_model, root: Path, name: str) -> tuple[Path, Path, Path]:
    """A base and two models."""
    shape = SMALL if name == "llama" else {"n_embd": 32, "n_head": 2}
    base = make_model(root / "base", name, tied=name == "gpt2", **shape)
    return base, *(moved(base, root / f"model-{i}", noise(base, i)) for i in (1, 2))


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def models(request, make_model, tmp_path_factory):
    return family(make_model, tmp_path_factory.mktemp(request.param), request.param)


def merged_weights(models, coefficients, values, name: str, method: str) -> torch.Tensor:
    """What the merge of a tensor is, computed in float64 and independently."""
    base, *others = (weights(model)[name].double() for model in models)
    shares = values[coefficients.group_of()[name]]
    if method == "linear":
        return sum(share * other for share, other in zip(shares, others, strict=True))
    return base + sum(share * (other - base) for share, other in zip(shares, others, strict=True))


def mean_loss(model, parameters, windows) -> torch.Tensor:
    """Of ordinary forward passes."""
    total = 0.0
    for window in windows:
        ids = torch.tensor([window])
        logits = torch.func.functional_call(model, parameters, kwargs={"input_ids": ids, "use_cache": False}).logits
        total = total + F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
    return total / sum(len(window) - 1 for window in windows)


def texts(models) -> dict[str, str]:
    base, one, two = models
    return {
        "task_arithmetic": config_text("task_arithmetic", base, {one: 0.5, two: 0.25}, **{"lambda": 0.8}),
        "linear": config_text("linear", None, {one: 0.75, two: 0.25}, normalize=False),
    }


@pytest.mark.parametrize("grain", ["model", "layer", "tensor"])
@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
def test_the_gradient_is_that_of_autograd(models, method, grain):
    """Coefficients as leaves of a graph in float64, through weights and model."""
    merged, coefficients = opened(texts(models)[method], grain, models[0], dtype=torch.float64)
    values = spread(coefficients, 3).astype(np.float32).astype(np.float64)
    with merged:
        merged.take(values)
        loss, found = merged.gradient(WINDOWS)
    leaves = torch.tensor(values, requires_grad=True)
    model = load_model(models[0]).double()
    names = coefficients.group_of()
    parameters = {name: merged_weights(models, coefficients, leaves, name, method) for name in names}
    expected = mean_loss(model, parameters, WINDOWS)
    (gradient,) = torch.autograd.grad(expected, leaves)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-6)
    assert np.abs(found).max() > 1e-3
    np.testing.assert_allclose(found, gradient.numpy(), rtol=1e-4, atol=1e-5)


def test_the_gradient_is_the_slope_of_the_loss(models):
    """Central differences, the weights rounded to fp32 on the way, the model computing in float64."""
    merged, coefficients = opened(texts(models)["task_arithmetic"], "layer", models[0], dtype=torch.float64)

    def loss_at(values: np.ndarray) -> float:
        merged.take(values)
        found = [merged.losses(window) for window in WINDOWS]
        return sum(float(each.sum()) for each in found) / sum(map(len, found))

    with merged:
        values, step = spread(coefficients, 4), 0.01
        merged.take(values)
        _, found = merged.gradient(WINDOWS)
        for place in np.ndindex(values.shape):
            high, low = values.copy(), values.copy()
            high[place] += step
            low[place] -= step
            slope = (loss_at(high) - loss_at(low)) / (2 * step)
            assert slope == pytest.approx(found[place], rel=5e-3, abs=2e-4)


def test_a_quantized_merge_passes_gradients_straight_through(models):
    """Blocks in the forward pass, as an ordinary model with the decoded weights computes; what meets the deltas is its
    gradient.
    """
    base = models[0]
    checkpoint, format = open_checkpoint(base), format_named("q4_0")
    names = [name for name in checkpoint.names if len(checkpoint.shape(name)) == 2 and "embd.weight" not in name]
    names = [name for name in names if "wte" not in name and "wpe" not in name and "embed" not in name]
    formats = dict.fromkeys(names, format)
    merged, coefficients = opened(texts(models)["task_arithmetic"], "tensor", base, formats)
    values = spread(coefficients, 5).astype(np.float32).astype(np.float64)
    with merged:
        merged.take(values)
        loss, found = merged.gradient(WINDOWS)
    model, rows = load_model(base), coefficients.group_of()
    parameters = {}
    for name in rows:
        weight = merged_weights(models, coefficients, values, name, "task_arithmetic").float()
        if name in formats:
            turned = checkpoint.family.is_transposed(name)
            decoded = format.quantize(weight.T.contiguous() if turned else weight).dequantize()
            weight = decoded.T.contiguous() if turned else decoded
        parameters[name] = weight.requires_grad_()
    expected = mean_loss(model, parameters, WINDOWS)
    gradients = dict(zip(parameters, torch.autograd.grad(expected, list(parameters.values())), strict=True))
    wanted = np.zeros_like(found)
    for name, gradient in gradients.items():
        for column, other in enumerate(models[1:]):
            delta = weights(other)[name].double() - weights(base)[name].double()
            wanted[rows[name], column] = float((gradient.double() * delta).sum())
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-5)


def test_equal_tensors_have_nothing_to_learn(make_model, tmp_path):
    base = make_model(tmp_path / "base", "llama", **SMALL)
    deltas = {name: delta * ("layers.1." in name) for name, delta in noise(base, 1).items()}
    model = moved(base, tmp_path / "model", deltas)
    merged, coefficients = opened(config_text("task_arithmetic", base, {model: 0.5}), "layer", base)
    with merged:
        assert [group.name for group in coefficients.groups] == ["embeddings", "layer 0", "layer 1", "output"]
        assert merged.learnable.tolist() == [False, False, True, False]
        merged.take(coefficients.start)
        assert np.flatnonzero(merged.gradient(WINDOWS)[1][:, 0]).tolist() == [2]
        assert sum(parameter.requires_grad for parameter in merged.model.parameters()) == 9


def test_one_gradient_is_in_memory_at_a_time(models, monkeypatch):
    merged, coefficients = opened(texts(models)["linear"], "model", models[0])
    others, products = [], merged._products

    def counted(tensor, gradient):
        others.append(sum(parameter.grad is not None for parameter in merged.model.parameters()))
        return products(tensor, gradient)

    monkeypatch.setattr(merged, "_products", counted)
    with merged:
        merged.take(coefficients.start)
        first = merged.gradient(WINDOWS)
        assert others == [0] * len(coefficients.groups[0].tensors)
        assert all(parameter.grad is None for parameter in merged.model.parameters())
        again = merged.gradient(WINDOWS)
    assert first[0] == again[0]
    assert np.array_equal(first[1], again[1])


def test_parts_and_padding():
    short, long = (1,) * (PART_TOKENS // 4), (2,) * PART_TOKENS
    assert [len(part) for part in parts_of([short, short, short, short, short, long, short])] == [4, 1, 1, 1]
    ids, labels = padded([(5, 6, 7), (8, 9)])
    assert ids.tolist() == [[5, 6, 7], [8, 9, 8]]
    assert labels.tolist() == [[5, 6, 7], [8, 9, -100]]
