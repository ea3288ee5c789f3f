"""Defaults that depend on where a tensor lies."""

from pathlib import Path

import pytest
from merge_models import by_name, llama, planned

OUTSIDE = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


@pytest.mark.parametrize("method", ["iso_c", "tsv_m", "wudi"])
def test_methods_for_linear_layers_average_embeddings_and_heads(method: str, tmp_path: Path) -> None:
    base, a = llama(tmp_path / "base"), llama(tmp_path / "a", seed=1)
    text = f"{{merge_method: {method}, base_model: {base}, models: [{{model: {a}}}]"
    found = by_name(planned(f"{text}}}"))
    assert {name for name, plan in found.items() if not plan.parameters["as_matrix"]} == OUTSIDE
    asked = by_name(planned(f"{text}, parameters: {{as_matrix: [{{filter: embed, value: true}}]}}}}"))
    assert {name for name, plan in asked.items() if not plan.parameters["as_matrix"]} == OUTSIDE - {
        "model.embed_tokens.weight"
    }
