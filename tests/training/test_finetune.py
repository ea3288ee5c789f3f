"""Fine-tuning end to end on models of two layers: what is written, and what fusing makes of it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tuning_cases import SPEAKING, write_split

from quantlab.adapters.reading import read_adapter
from quantlab.calibration.fuse import fuse_adapter
from quantlab.calibration.quantize import quantize_checkpoint
from quantlab.checkpoint import open_checkpoint
from quantlab.checkpoint.chat_text import chat_template
from quantlab.errors import InputError
from quantlab.loading import load_model
from quantlab.training.finetune import finetune
from quantlab.training.finetune_settings import FinetuneSettings
from quantlab.training.prepared import DataSettings

pytest.importorskip("accelerate")

SETTINGS = FinetuneSettings(
    rank=4, context=64, batch_size=2, max_steps=6, learning_rate=0.02, scheduler="constant", eval_every=3, seed=1
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_split(tmp_path_factory.mktemp("data"), SPEAKING, 6)


@pytest.fixture(scope="module")
def bases(make_model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Float models, and packed ones by format."""
    folder = tmp_path_factory.mktemp("bases")
    found = {family: make_model(folder / family, family) for family in ("llama", "gpt2", "gpt_neox")}
    for format in ("q4_0", "q4_1", "q5_1", "q8_0"):
        found[format] = folder / format
        quantize_checkpoint(found["llama"], found[format], format=format)
    found["gguf"] = folder / "q4_1.gguf"
    quantize_checkpoint(found["llama"], found["gguf"])
    found["gpt2 q4_1"] = folder / "gpt2-q4_1"
    quantize_checkpoint(found["gpt2"], found["gpt2 q4_1"])
    return found


def logits(model, ids: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(ids, use_cache=False).logits.numpy()


IDS = torch.arange(10, 50)[None]


@pytest.mark.parametrize("base", ["llama", "gpt2", "gpt_neox", "q4_0", "q4_1", "q8_0", "gguf", "gpt2 q4_1"])
def test_a_lora_learns_and_peft_loads_it(base: str, bases, data: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    result = finetune(bases[base], data, tmp_path / "out", settings=SETTINGS)
    assert result.steps == 6
    assert result.eval_loss < result.eval_loss_before
    adapter = read_adapter(tmp_path / "out")
    checkpoint = open_checkpoint(bases[base])
    assert set(adapter.pairs) == {n for n in checkpoint.names if ("attn" in n or "attention" in n) and
                                  checkpoint.family.linear and len(checkpoint.shape(n)) == 2}  # fmt: skip
    assert result.trainable_parameters == adapter.parameters
    assert not (tmp_path / "out.training").exists()
    log = json.loads((tmp_path / "out" / "training_log.json").read_text())
    assert log["result"]["eval_loss"] == result.eval_loss
    plain = logits(load_model(bases[base]), IDS)
    live = PeftModel.from_pretrained(load_model(bases[base]), str(tmp_path / "out")).eval()
    float_base = checkpoint.recipe is None
    if float_base:
        fuse_adapter(bases[base], tmp_path / "out", tmp_path / "fused")
        np.testing.assert_allclose(logits(load_model(tmp_path / "fused"), IDS), logits(live, IDS), rtol=1e-3, atol=1e-3)
    assert np.abs(logits(live, IDS) - plain).max() > 0.01


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        ("q4_1", {"method": "block-sum"}),
        ("q5_1", {"method": "block-sum", "activations": "float"}),
        ("gguf", {"method": "block-sum", "targets": "all-linear"}),
        ("gpt2 q4_1", {"method": "block-sum"}),
        ("q4_0", {"merge_aware": True}),
        ("q4_1", {"merge_aware": True, "activations": "float"}),
        ("q8_0", {"merge_aware": True, "targets": "mlp"}),
        ("q4_1", {"merge_aware": True, "regrid": True}),
        ("q4_1", {"merge_aware": True, "levels": 4, "regrid": True}),
        ("gpt2 q4_1", {"merge_aware": True}),
        ("q4_1", {"merge_aware": True, "gradient_checkpointing": True, "accumulation": 2}),
    ],
    ids=str,
)
def test_what_was_trained_is_what_fuse_writes(base: str, changes: dict, bases, data: Path, tmp_path: Path) -> None:
    """The loss of the fused files, as a plain model, is the adapter's in training, to the last bit."""
    from quantlab.training.batches import Collator, unpacked
    from quantlab.training.next_token_loss import computes_loss
    from quantlab.training.prepared import prepare_data

    settings = replace(SETTINGS, **changes)
    result = finetune(bases[base], data, tmp_path / "out", settings=settings)
    assert result.eval_loss < result.eval_loss_before
    report = fuse_adapter(bases[base], tmp_path / "out", tmp_path / "fused")
    assert report.exact
    from quantlab.checkpoint import load_tokenizer

    rows = prepare_data(data, load_tokenizer(bases[base]), None, DataSettings(context=64))
    activations = "int8" if settings.activations == "auto" else settings.activations
    model = load_model(tmp_path / "fused", activations=activations)
    computes_loss(model)
    with torch.no_grad():
        batch = Collator(0)(unpacked(rows.valid).windows)
        fused = model(**batch) / (batch["labels"] != -100).sum()
    assert fused.item() == pytest.approx(result.eval_loss, abs=2e-6)


@pytest.mark.parametrize("changes", [{}, {"method": "block-sum"}, {"merge_aware": True}], ids=str)
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_step_0_is_the_base_exactly(changes: dict, activations: str, bases) -> None:
    from quantlab.training.adapted_model import check_base, with_adapter

    settings = replace(SETTINGS, activations=activations, targets="all-linear", **changes)
    checkpoint = open_checkpoint(bases["q4_1"])
    expected = logits(load_model(bases["q4_1"], activations=activations), IDS)
    model = load_model(bases["q4_1"], activations=activations)
    adapted = with_adapter(model, checkpoint, check_base(checkpoint, settings), settings).eval()
    assert np.array_equal(logits(adapted, IDS), expected)


@pytest.mark.parametrize("changes", [{"method": "block-sum"}, {"merge_aware": True}], ids=str)
def test_gradients_of_fused_layers_are_those_of_a_lora(changes: dict, bases) -> None:
    """Straight-through: at B = 0 the fused weights are the base's, so that both see the same activations."""
    from quantlab.training.adapted_model import check_base, with_adapter

    found = {}
    for kind, options in (("lora", {}), ("fused", changes)):
        settings = replace(SETTINGS, **options)
        checkpoint = open_checkpoint(bases["q4_1"])
        torch.manual_seed(0)
        model = with_adapter(load_model(bases["q4_1"]), checkpoint, check_base(checkpoint, settings), settings)
        layer = model.get_base_model().model.layers[1].self_attn.q_proj
        a = layer.lora_A["default"].weight
        with torch.no_grad():
            values = torch.linspace(-1, 1, 8).reshape(4, 2)
            a.copy_(values if a.shape[1] == 2 else values.repeat_interleave(32, dim=1))
        model(IDS).logits.square().sum().backward()
        found[kind] = layer.lora_B["default"].weight.grad
        inputs = model.get_base_model().model.layers[0].self_attn.q_proj.lora_B["default"].weight.grad
        found[f"{kind} first layer"] = inputs.norm()
    assert found["lora"].abs().max() > 0
    torch.testing.assert_close(found["fused"], found["lora"], rtol=1e-3, atol=1e-2)


def test_full_training_writes_a_model(bases, data: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, method="full", learning_rate=1e-3)
    for family in ("llama", "gpt2"):
        result = finetune(bases[family], data, tmp_path / family, settings=settings)
        assert result.eval_loss < result.eval_loss_before
        assert result.trainable_parameters == result.parameters
        before, after = open_checkpoint(bases[family]), open_checkpoint(tmp_path / family)
        assert before.names == after.names
        assert all(not torch.equal(before.read(n), after.read(n)) for n in before.names if before.family.linear)
        assert (tmp_path / family / "tokenizer.json").is_file()


def test_full_training_keeps_the_chat_template_that_it_was_given(bases, data: Path, tmp_path: Path) -> None:
    """A model that was trained on its turns is asked by the same ones."""
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    finetune(bases["llama"], data, tmp_path / "out", settings=replace(SETTINGS, method="full"), template=template)
    assert chat_template(tmp_path / "out") == template


def test_bfloat16_products_train_fp32_weights(bases, data: Path, tmp_path: Path) -> None:
    """A rate that moves no bfloat16 weight, for its steps are below half of their last bit, still trains."""
    settings = replace(SETTINGS, method="full", dtype="bfloat16", learning_rate=1e-5, max_steps=2)
    finetune(bases["llama"], data, tmp_path / "out", settings=settings)
    before, after = (open_checkpoint(path).read("model.norm.weight") for path in (bases["llama"], tmp_path / "out"))
    assert before.dtype == after.dtype == torch.float32
    assert torch.equal(before, torch.ones_like(before))
    assert 0 < (after - before).abs().max() < 2**-9


def test_packing_and_checkpointing_train_too(bases, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    settings = replace(SETTINGS, packing=True, context=100, gradient_checkpointing=True, batch_size=1)
    result = finetune(bases["q4_1"], data, tmp_path / "out", settings=settings)
    assert result.eval_loss < result.eval_loss_before


def test_a_test_file_is_scored_at_the_end(bases, data: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for split, source in (("train", "train"), ("valid", "valid"), ("test", "valid")):
        (tmp_path / "data" / f"{split}.jsonl").write_bytes((data / f"{source}.jsonl").read_bytes())
    result = finetune(bases["q4_1"], tmp_path / "data", tmp_path / "out", settings=SETTINGS)
    assert result.test_loss == pytest.approx(result.eval_loss, rel=1e-6)


def test_dora_on_a_float_base(bases, data: Path, tmp_path: Path) -> None:
    result = finetune(bases["llama"], data, tmp_path / "out", settings=replace(SETTINGS, dora=True))
    assert result.eval_loss < result.eval_loss_before
    assert read_adapter(tmp_path / "out").has_magnitudes


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        ("llama", {"method": "block-sum"}, "not packed; quantize"),
        ("llama", {"merge_aware": True}, "not packed; quantize"),
        ("q8_0", {"method": "block-sum"}, "q4_1 or q5_1"),
        ("q4_1", {"method": "full"}, "give the float model"),
        ("q4_1", {"dora": True}, "leave it out, or give the float model"),
        ("q4_1", {"targets": "wat"}, "no linear layer"),
        ("llama", {"context": 4096}, "128 positions"),
        ("q4_1", {"merge_aware": True, "levels": 99}, "99 levels"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(base: str, changes: dict, message: str, bases, data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        finetune(bases[base], data, tmp_path / "out", settings=replace(SETTINGS, **changes))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.training").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "wat"}, "--method wat"),
        ({"rank": 0}, "--rank 0"),
        ({"learning_rate": 0.0}, "--learning-rate 0"),
        ({"learning_rate": float("nan")}, "--learning-rate nan"),
        ({"dropout": 1.0}, "--dropout"),
        ({"merge_aware": True, "method": "block-sum"}, "--merge-aware"),
        ({"regrid": True}, "--regrid"),
        ({"merge_aware": True, "dropout": 0.1}, "--dropout"),
        ({"merge_aware": True, "dora": True}, "--dora"),
        ({"method": "full", "rslora": True}, "--method full"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        FinetuneSettings(**changes)


def test_an_existing_folder_is_not_replaced(bases, data: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="--overwrite"):
        finetune(bases["llama"], data, tmp_path / "out", settings=SETTINGS)


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(bases, data, tmp_path, monkeypatch) -> None:
    from quantlab.training import trainer
    from quantlab.training.failures import TrainingFailedError

    original = trainer.NextTokenTrainer.training_step

    def poisoned(self, model, *args, **kwargs):
        if self.state.global_step == 4:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
        return original(self, model, *args, **kwargs)

    monkeypatch.setattr(trainer.NextTokenTrainer, "training_step", poisoned)
    with pytest.raises(TrainingFailedError, match=r"step 5 is nan; the last good checkpoint is .*checkpoint-3"):
        finetune(bases["q4_1"], data, tmp_path / "out", settings=SETTINGS)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.training" / "checkpoints" / "checkpoint-3" / "complete").is_file()
