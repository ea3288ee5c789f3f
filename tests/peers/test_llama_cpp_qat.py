"""llama.cpp runs what quantization-aware training wrote, with the loss that training ended with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from test_llama_cpp import LN_PERPLEXITY, llama_logits, nll

from quantlab import FinetuneSettings, QatSettings, load_tokenizer, qat
from quantlab.training.prepared import DataSettings, prepare_data

pytest.importorskip("llama_cpp")
pytest.importorskip("accelerate")

ROWS = DataSettings(context=64, held_out=4)
TRAINING = FinetuneSettings(context=64, batch_size=4, max_steps=8, scheduler="constant", eval_every=8, rank=4, seed=1)


@pytest.mark.parametrize(
    ("family", "settings", "rate"),
    [
        ("llama", QatSettings(format="q4_0"), 1e-3),
        ("gpt2", QatSettings(), 1e-3),
        ("llama", QatSettings(train="minimums"), 3e-2),
        ("llama", QatSettings(format="ternary"), 2e-3),
    ],
    ids=["llama q4_0", "gpt2 q4_1", "minimums", "ternary"],
)
def test_the_same_loss(
    family: str, settings: QatSettings, rate: float, make_model, prose: Path, tmp_path: Path
) -> None:
    # llama.cpp rounds activations that meet ternary weights in runs of 256: in rows so short these are whole tokens
    shape = {"hidden_size": 256, "intermediate_size": 256} if settings.format == "ternary" else {}
    base, training = make_model(tmp_path / "base", family, **shape), replace(TRAINING, learning_rate=rate)
    result = qat(base, prose, tmp_path / "out.gguf", settings=settings, training=training, data_settings=ROWS)
    rows = prepare_data(prose, load_tokenizer(base), None, ROWS).valid
    total = count = 0.0
    for row in rows:
        total += nll(llama_logits(tmp_path / "out.gguf", row.input_ids), row.input_ids) * (len(row.input_ids) - 1)
        count += len(row.input_ids) - 1
        assert row.labels[1:] == row.input_ids[1:]
    assert result.eval_loss is not None
    assert result.eval_loss_before is not None
    assert abs(total / count - result.eval_loss) <= LN_PERPLEXITY
    assert result.eval_loss < result.eval_loss_before - 10 * LN_PERPLEXITY
