"""Models of different tokens, merged to files: rows and tokenizer agree."""

from pathlib import Path

import numpy as np
from merge_models import LETTERS, llama
from safetensors.numpy import load_file

from quantlab.checkpoint.tokenizer import load_tokenizer
from quantlab.merging.config import read_config
from quantlab.merging.merge import merge_checkpoints

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def merged(text: str, out: Path) -> dict[str, np.ndarray]:
    merge_checkpoints(read_config(text), out)
    return load_file(out / "model.safetensors")


def test_a_union_by_rows(tmp_path):
    one = llama(tmp_path / "one", tokens=(*LETTERS, "ab"), merges=[("a", "b")], added=("<|x|>",), seed=1)
    two = llama(tmp_path / "two", tokens=("<s>", "</s>", "b", "a", "z"), tied=True, seed=2)
    text = f"""
models:
  - {{model: {one}, parameters: {{weight: 0.25}}}}
  - {{model: {two}, parameters: {{weight: 0.75}}}}
merge_method: linear
tokenizer:
  source: union
  pad_to_multiple_of: 4
  tokens:
    z: {{source: {{kind: model_token, model: {one}, token: f}}}}
chat_template: "{{{{ messages[0]['content'] }}}}"
"""
    out = merged(text, tmp_path / "out")
    first, second = (load_file(folder / "model.safetensors") for folder in (one, two))
    tokenizer = load_tokenizer(tmp_path / "out")
    ids = {token: tokenizer.backend.token_to_id(token) for token in (*LETTERS, "ab", "<|x|>", "z")}
    assert sorted(ids.values()) == list(range(11))
    for name, other in ((EMBEDDING, EMBEDDING), (HEAD, EMBEDDING)):
        mine, theirs = first[name], second[other]
        assert out[name].shape == (12, mine.shape[1])
        for token, row in (("a", 3), ("b", 2)):
            expected = 0.25 * mine[ids[token]] + 0.75 * theirs[row]
            np.testing.assert_allclose(out[name][ids[token]], expected, rtol=1e-6, atol=1e-7)
        for token in ("c", "ab", "<|x|>"):  # the first model's alone
            np.testing.assert_allclose(out[name][ids[token]], mine[ids[token]], rtol=1e-6, atol=1e-7)
        expected = 0.25 * mine[ids["f"]] + 0.75 * theirs[4]  # the second has a row of its own
        np.testing.assert_allclose(out[name][ids["z"]], expected, rtol=1e-6, atol=1e-7)
        assert not out[name][11].any()
    assert tokenizer.encode("abz<|x|>", add_special_tokens=False) == [ids["ab"], ids["z"], ids["<|x|>"]]
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages[0]['content'] }}"


def test_repeated_layers(tmp_path):
    one = llama(tmp_path / "one", seed=1)
    text = f"""
slices:
  - sources: [{{model: {one}, layer_range: [0, 3]}}]
  - sources: [{{model: {one}, layer_range: [1, 4], parameters: {{scale: [{{filter: down_proj, value: 0}}]}}}}]
merge_method: passthrough
"""
    out, given = merged(text, tmp_path / "out"), load_file(one / "model.safetensors")
    up, down = "model.layers.{}.mlp.up_proj.weight", "model.layers.{}.mlp.down_proj.weight"
    for layer, source in enumerate((0, 1, 2, 1, 2, 3)):
        np.testing.assert_array_equal(out[up.format(layer)], given[up.format(source)])
        np.testing.assert_array_equal(out[down.format(layer)], given[down.format(source)] * (layer < 3))
    assert len(out) == len(given) + 2 * 9


def test_zeros_for_a_bias(tmp_path):
    one, two = llama(tmp_path / "one", seed=1), llama(tmp_path / "two", biases=True, seed=2)
    text = f"models: [{{model: {one}}}, {{model: {two}}}]\nmerge_method: linear\nmissing_biases: zero\n"
    out, given = merged(text, tmp_path / "out"), load_file(two / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.bias"
    np.testing.assert_allclose(out[name], given[name] / 2, rtol=1e-6)
