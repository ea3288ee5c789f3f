"""The loss without logits against transformers' own, values and gradients, in every family."""

import pytest
import torch
from tiny_families import FAMILIES, tiny

from quantlab.training import next_token_loss
from quantlab.training.next_token_loss import computes_loss
from quantlab.training.sample import NO_LOSS

TOKENS = 24


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 96, (2, TOKENS), generator=generator)
    labels = ids.clone()
    labels[0, :9] = NO_LOSS
    labels[1, 15:] = NO_LOSS
    return ids, labels


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk_bytes", [1, 7 * 4 * 96, 1 << 20], ids=["one position", "seven", "all"])
def test_loss_and_gradients_are_those_of_transformers(
    family: str, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(next_token_loss, "LOGIT_BYTES", chunk_bytes)
    ids, labels = batch()
    theirs, ours = tiny(family, tied=True), tiny(family, tied=True)
    expected = theirs(input_ids=ids, labels=labels, use_cache=False).loss * (labels[:, 1:] != NO_LOSS).sum()
    expected.backward()
    computes_loss(ours)
    found = ours(input_ids=ids, labels=labels)
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    for (name, one), other in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_a_frozen_head_gets_no_gradient_and_passes_one_on() -> None:
    ids, labels = batch()
    model = tiny("llama", tied=False)
    model.lm_head.requires_grad_(False)
    computes_loss(model)
    model(input_ids=ids, labels=labels).backward()
    assert model.lm_head.weight.grad is None
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_without_labels_the_loss_is_nothing() -> None:
    ids, labels = batch()
    model = tiny("llama", tied=True)
    computes_loss(model)
    assert model(input_ids=ids, labels=torch.full_like(labels, NO_LOSS)).item() == 0
