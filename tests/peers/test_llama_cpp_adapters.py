"""llama.cpp adds our adapters to our models and predicts what they predict together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from quantlab import load_engine, quantize_checkpoint
from quantlab.adapters.adapter import Adapter, LowRankPair
from quantlab.adapters.gguf_adapter import export_adapter
from quantlab.checkpoint import open_checkpoint
from quantlab.checkpoint.export import export_checkpoint

llama_cpp = pytest.importorskip("llama_cpp")

IDS = [1, *range(20, 50)]
TARGETS = {"llama": ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj"), "gpt2": ("c_attn", "c_fc")}


def random_adapter(base: Path, seed: int = 0) -> Adapter:
    checkpoint, generator, pairs = open_checkpoint(base), np.random.default_rng(seed), {}
    for name in checkpoint.names:
        if name.removesuffix(".weight").endswith(TARGETS[checkpoint.family.model_type]):
            out, columns = checkpoint.shape(name)
            a = generator.normal(0, 0.5, (4, columns)).astype(np.float32)
            b = generator.normal(0, 0.05, (out, 4)).astype(np.float32)
            pairs[name] = LowRankPair(a, b, 1.5)
    return Adapter(base, "lora", pairs)


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("packed", [False, True], ids=["float", "q4_1"])
def test_logits_with_an_adapter(family: str, packed: bool, make_model, tmp_path: Path) -> None:
    base, file = make_model(tmp_path / "base", family), tmp_path / "base.gguf"
    if packed:
        quantize_checkpoint(base, file)
    else:
        export_checkpoint(base, file, "gguf")
    adapter = random_adapter(base)
    export_adapter(adapter, open_checkpoint(base), tmp_path / "adapter.gguf")
    theirs = []
    for lora in (None, str(tmp_path / "adapter.gguf")):
        model = llama_cpp.Llama(
            model_path=str(file), lora_path=lora, n_ctx=64, n_batch=64, logits_all=True, type_k=0, type_v=0,
            n_threads=1, verbose=False, flash_attn=False,
        )  # fmt: skip
        model.eval(IDS)
        theirs.append(np.array(model.scores[len(IDS) - 1]))
    plain, with_adapter = theirs
    engine = load_engine(file, threads=1, kv="f32", activations="f32", adapters=[adapter])
    engine.prefill(IDS)
    effect = np.abs(with_adapter - plain).max()
    assert effect > 0.5
    # llama.cpp rounds activations to int8 where weights are packed
    assert np.abs(engine.logits() - with_adapter).max() < (0.1 * effect if packed else 2e-3)
