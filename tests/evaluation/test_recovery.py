"""Recovery, by hand and on fused models."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from quantlab import FinetuneSettings, finetune, fuse_adapter, load_model, load_tokenizer, quantize_checkpoint
from quantlab.evaluation.recovery import measure_recovery, recovery_of
from quantlab.training.prepared import DataSettings, prepare_data

pytest.importorskip("accelerate")


def test_a_worked_example() -> None:
    base, adapter = np.array([10.0, 20.0, 30.0]), np.array([8.0, 17.0, 25.0])
    fused, tokens = np.array([9.0, 18.0, 26.0]), np.array([5, 5, 10])
    found = recovery_of(base, adapter, fused, tokens)
    assert found.recovery == pytest.approx(7 / 10)
    residuals = np.array([1 - 0.7 * 2, 2 - 0.7 * 3, 4 - 0.7 * 5])
    error = math.sqrt(3 / 2 * (residuals**2).sum()) / 10
    assert found.high - found.recovery == pytest.approx(1.96 * error, rel=1e-4)
    assert found.recovery - found.low == pytest.approx(1.96 * error, rel=1e-4)
    assert (found.loss_base, found.loss_adapter, found.loss_fused) == (3.0, 2.5, 2.65)
    assert (found.samples, found.tokens) == (3, 20)


def test_an_adapter_that_gained_nothing_has_no_recovery() -> None:
    same = np.array([1.0, 2.0])
    assert math.isnan(recovery_of(same, same, same - 1, np.array([1, 1])).recovery)


def test_one_sample_has_no_interval() -> None:
    found = recovery_of(np.array([3.0]), np.array([1.0]), np.array([2.0]), np.array([1]))
    assert found.recovery == 0.5
    assert math.isnan(found.low)


def test_exact_kinds_recover_everything_and_plain_ones_less(llama_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {n}: ", "completion": f"it is {n} and {n + 1}."} for n in range(12)]
    (tmp_path / "data").mkdir()
    for split, part in (("train", rows[:8]), ("valid", rows[8:])):
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    base = tmp_path / "base"
    quantize_checkpoint(llama_model, base)
    plain = FinetuneSettings(
        rank=4, context=64, max_steps=8, learning_rate=0.005, scheduler="constant", activations="float"
    )
    settings, found = DataSettings(context=64), {}
    for name, chosen in (("lora", plain), ("merge", replace(plain, merge_aware=True))):
        finetune(base, tmp_path / "data", tmp_path / name, settings=chosen)
        fuse_adapter(base, tmp_path / name, tmp_path / f"{name}-fused", method="rtn")
        found[name] = measure_recovery(
            base, tmp_path / name, tmp_path / f"{name}-fused", tmp_path / "data", settings=settings, threads=1
        )
    assert found["merge"].loss_adapter < found["merge"].loss_base
    assert (found["merge"].recovery, found["merge"].low, found["merge"].high) == (1.0, 1.0, 1.0)
    assert found["lora"].recovery != 1.0
    assert found["lora"].samples == 4
    log = json.loads((tmp_path / "merge" / "training_log.json").read_text())["result"]
    assert found["merge"].loss_fused == pytest.approx(log["eval_loss"], rel=1e-4)
    # the same figure by transformers
    import torch

    samples = prepare_data(tmp_path / "data", load_tokenizer(base), None, settings).valid
    with torch.inference_mode():
        model, total = load_model(base), 0.0
        for sample in samples:
            scores = model(torch.tensor([sample.input_ids]), use_cache=False).logits[0, :-1].double().log_softmax(-1)
            labels = torch.tensor(sample.labels[1:])
            kept = labels != -100
            total -= scores[kept].gather(1, labels[kept][:, None]).sum().item()
    assert found["lora"].loss_base == pytest.approx(total / found["lora"].tokens, rel=1e-5)
