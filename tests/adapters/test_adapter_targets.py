"""Which layers an adapter is for, family by family."""

from pathlib import Path

import pytest

from quantlab.adapters.targets import target_modules
from quantlab.checkpoint import open_checkpoint
from quantlab.errors import InputError

ATTENTION = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "gpt2": {"attn.c_attn", "attn.c_proj"},
    "gpt_neox": {"query_key_value", "dense"},
    "phi3": {"qkv_proj", "o_proj"},
}
MLP = {
    "llama": {"gate_proj", "up_proj", "down_proj"},
    "gpt2": {"mlp.c_fc", "mlp.c_proj"},
    "gpt_neox": {"dense_h_to_4h", "dense_4h_to_h"},
    "phi3": {"gate_up_proj", "down_proj"},
}


@pytest.mark.parametrize("family", ATTENTION)
def test_groups_are_the_projections_of_every_layer(family: str, make_model, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_model(tmp_path / "m", family))

    def ends(targets: str) -> list[str]:
        return target_modules(checkpoint, targets)

    def matching(expected: set[str]) -> set[str]:
        names = {name.removesuffix(".weight") for name in checkpoint.names if name.endswith(".weight")}
        return {name for name in names if any(name.endswith(f".{end}") for end in expected)}

    assert set(ends("attention")) == matching(ATTENTION[family])
    assert set(ends("mlp")) == matching(MLP[family])
    assert ends("all-linear") == [n for n in ends("all-linear") if n in {*ends("attention"), *ends("mlp")}]
    assert len(ends("all-linear")) == len(ends("attention")) + len(ends("mlp"))


def test_names_choose_by_their_ends(llama_model: Path) -> None:
    checkpoint = open_checkpoint(llama_model)
    assert set(target_modules(checkpoint, "q_proj, mlp.up_proj")) == {
        f"model.layers.{i}.{end}" for i in (0, 1) for end in ("mlp.up_proj", "self_attn.q_proj")
    }
    assert target_modules(checkpoint, "model.layers.1.self_attn.v_proj") == ["model.layers.1.self_attn.v_proj"]


@pytest.mark.parametrize("targets", ["wat", "q_proj,wat", "", ",", "lm_head", "embed_tokens", "roj"])
def test_a_name_that_matches_nothing_is_refused_with_those_that_would(llama_model: Path, targets: str) -> None:
    with pytest.raises(InputError, match=r"self_attn\.q_proj"):
        target_modules(open_checkpoint(llama_model), targets)
