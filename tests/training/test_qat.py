"""Quantization-aware training end to end on models of two layers: what was trained is what is written."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tuning_cases import SPEAKING, held_out_loss, write_split

from quantlab.calibration.quantize import quantize_checkpoint
from quantlab.checkpoint import open_checkpoint
from quantlab.errors import InputError
from quantlab.formats import FORMATS
from quantlab.loading import load_model
from quantlab.training.finetune_settings import FinetuneSettings
from quantlab.training.prepared import DataSettings
from quantlab.training.qat import qat
from quantlab.training.qat_settings import QatSettings

pytest.importorskip("accelerate")

TRAINING = FinetuneSettings(
    rank=4, targets="all-linear", context=64, batch_size=2, max_steps=6, learning_rate=3e-3, scheduler="constant",
    eval_every=3, seed=1,
)  # fmt: skip
RATES = {"full": 3e-3, "lora": 2e-2, "scales": 3e-2, "minimums": 3e-2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_split(tmp_path_factory.mktemp("data"), SPEAKING, 6)


@pytest.fixture(scope="module")
def models(make_model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    found = {family: make_model(folder / family, family) for family in ("llama", "gpt2")}
    found["untied"] = make_model(folder / "untied", "llama", tied=False)
    found["uneven"] = make_model(folder / "uneven", "llama", intermediate_size=80)
    for format in ("q4_0", "q4_1"):
        found[format] = folder / format
        quantize_checkpoint(found["llama"], found[format], format=format)
    return found


def run(model: Path, data: Path, out: Path, train: str = "full", *, teacher=None, tuning=(), **options):
    settings = replace(TRAINING, **{"learning_rate": RATES[train], **dict(tuning)})
    chosen = QatSettings(train=train, **options)
    return qat(model, data, out, settings=chosen, training=settings, teacher=teacher)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("train", ["full", "lora", "scales", "minimums"])
def test_every_kind_learns_and_the_file_has_the_loss_of_the_training(train, family, models, data, tmp_path) -> None:
    result = run(models[family], data, tmp_path / "out", train)
    assert result.steps == 6
    assert result.eval_loss < result.eval_loss_before
    written, original = open_checkpoint(tmp_path / "out"), open_checkpoint(models[family])
    assert set(written.names) == set(original.names)
    assert result.bytes == written.nbytes
    activations = "int8" if train in ("full", "lora") else "float"
    assert held_out_loss(tmp_path / "out", data, activations) == pytest.approx(result.eval_loss, abs=2e-6)
    quantize_checkpoint(models[family], tmp_path / "rtn")
    assert held_out_loss(tmp_path / "rtn", data, activations) == pytest.approx(result.eval_loss_before, abs=2e-6)
    rounded = open_checkpoint(tmp_path / "rtn")
    for name in written.names:
        assert written.format(name) == rounded.format(name)
        if train != "full" and written.format(name) is None:
            assert torch.equal(written.read(name), original.read(name))
    assert not (tmp_path / "out.training").exists()
    log = json.loads((tmp_path / "out" / "training_log.json").read_text())
    assert log["result"]["eval_loss"] == result.eval_loss
    assert open_checkpoint(tmp_path / "out").config["quantization_config"]["method"] == "qat"


@pytest.mark.parametrize(
    ("options", "activations"),
    [({"format": "q4_0"}, "float"), ({"format": "q5_1", "uniform": True}, "int8"), ({"levels": 4}, "float"),
     ({"recipe": "q4_1-mixed"}, "int8")],
    ids=str,
)  # fmt: skip
def test_written_bytes_are_those_of_the_trained_weights(options, activations, models, data, tmp_path, monkeypatch):
    """The blocks are what the native quantizer makes of the weights in memory: no block differs."""
    from quantlab.training import qat_writing

    kept = {}
    original = qat_writing.write_trained

    def spy(start, trained, plan, *rest):
        kept.update({name: p.detach().clone() for name, p in trained.model.named_parameters()})
        kept["formats"] = plan.formats
        return original(start, trained, plan, *rest)

    monkeypatch.setattr(qat_writing, "write_trained", spy)
    for family in ("untied", "gpt2"):
        out = tmp_path / family
        result = run(models[family], data, out, tuning={"activations": activations}, **options)
        written, formats = open_checkpoint(out), kept["formats"]
        assert held_out_loss(out, data, activations) == pytest.approx(result.eval_loss, abs=2e-6)
        for name in written.names:
            weight = kept[name].T.contiguous() if written.family.is_transposed(name) else kept[name]
            if name in formats:
                expected = formats[name].quantize(weight).blocks
                assert int((written.read_packed(name).blocks != expected).sum()) == 0, name
            else:
                assert torch.equal(written.read(name), weight)
        if "levels" in options:
            linear = {formats[n].levels for n in formats if n not in (written.family.embedding, written.family.head)}
            assert linear == {4}


def test_a_gguf_file_holds_the_same_model(models, data, tmp_path) -> None:
    folder = run(models["llama"], data, tmp_path / "out")
    file = run(models["llama"], data, tmp_path / "out.gguf")
    assert file.eval_loss == folder.eval_loss
    a, b = open_checkpoint(tmp_path / "out"), open_checkpoint(tmp_path / "out.gguf")
    for name in a.names:
        if a.format(name) is not None:
            assert torch.equal(a.read_packed(name).blocks, b.read_packed(name).blocks)
    assert held_out_loss(tmp_path / "out.gguf", data, "int8") == pytest.approx(file.eval_loss, abs=2e-6)


@pytest.mark.parametrize(
    ("train", "rate"), [("full", 1e-3), ("lora", 1e-3), ("scales", 1e-2), ("minimums", 1e-2)], ids=str
)
def test_towards_a_teacher_the_divergence_falls(train, rate, models, prose, tmp_path) -> None:
    """On prose, of which nothing that is held out is trained on; random weights leave a low-rank update little."""
    training = replace(TRAINING, learning_rate=rate, max_steps=20, batch_size=4, eval_every=20)
    rows, settings = DataSettings(context=64, held_out=4), QatSettings(train=train, levels=8)
    result, alone = (
        qat(models["llama"], prose, tmp_path / str(steps), settings=settings, data_settings=rows, teacher=teacher,
            training=replace(training, max_steps=steps))
        for steps, teacher in ((20, models["llama"]), (1, None))
    )  # fmt: skip
    assert result.kld_after < 0.97 * result.kld_before
    assert alone.kld_before == pytest.approx(result.kld_before, rel=1e-6)  # the original is the reference then


def test_temperature_and_a_quantized_teacher(models, data, tmp_path) -> None:
    result = run(models["q4_0"], data, tmp_path / "out", "scales", teacher=models["q4_1"], temperature=2.0)
    assert 0 < result.kld_after < result.kld_before
    alone = run(models["q4_1"], data, tmp_path / "alone", "minimums")
    assert alone.kld_before is None
    assert alone.kld_after is None
    assert alone.eval_loss < alone.eval_loss_before


def test_frozen_codes_stay(models, data, tmp_path) -> None:
    from quantlab.formats.parts import codes_of, scales_of

    for train in ("scales", "minimums"):
        run(models["q4_1"], data, tmp_path / train, train)
        before, after = open_checkpoint(models["q4_1"]), open_checkpoint(tmp_path / train)
        name = "model.layers.0.mlp.down_proj.weight"
        one, other = before.read_packed(name), after.read_packed(name)
        assert torch.equal(codes_of(one.blocks, one.format), codes_of(other.blocks, other.format))
        (d, m), (new_d, new_m) = scales_of(one.blocks, one.format), scales_of(other.blocks, other.format)
        assert torch.equal(d, new_d) == (train == "minimums")
        assert not torch.equal(m, new_m)


def test_first_codes_are_calibrated_by_training_rows(models, prose, tmp_path, monkeypatch) -> None:
    """Not by the text that quantlab brings along; that steps in where the rows are too few."""
    from quantlab.checkpoint import load_tokenizer
    from quantlab.training.prepared import prepare_data

    requests = []

    def quantized(source, out, **options):
        request = options["calibration"].request
        requests.append(None if request is None else request.text.read_text())
        return quantize_checkpoint(source, out, **options)

    monkeypatch.setattr("quantlab.training.qat_start.quantize_checkpoint", quantized)
    rows, chosen = DataSettings(context=64, held_out=4), QatSettings(train="scales", method="gptq")
    few = tmp_path / "few.txt"
    few.write_text("Two words, and then some more of them.\n" * 20)
    for data in (prose, few):
        training = replace(TRAINING, learning_rate=3e-2, max_steps=1)
        qat(models["llama"], data, tmp_path / data.stem, settings=chosen, data_settings=rows, training=training)
    tokenizer = load_tokenizer(models["llama"])
    trained = prepare_data(prose, tokenizer, None, rows).train
    assert set(requests[0].split("\n<|endoftext|>\n")) == {tokenizer.decode(row.input_ids) for row in trained}
    assert requests[1] is None


def test_float_warmup_rounds_nothing_until_it_ends(models, data, tmp_path, monkeypatch) -> None:
    from quantlab.nn.fake_quant import FakeQuantLinear

    states = []
    original = FakeQuantLinear.forward

    def spy(layer, x):
        if layer.name.endswith("layers.0.mlp.up_proj.weight"):
            states.append((layer.enabled, torch.is_grad_enabled()))
        return original(layer, x)

    monkeypatch.setattr(FakeQuantLinear, "forward", spy)
    tuning = {"gradient_checkpointing": False}
    result = run(models["llama"], data, tmp_path / "out", float_steps=4, tuning=tuning)
    trained = [enabled for enabled, graded in states if graded]
    assert trained == [False] * 4 + [True] * 2
    assert all(enabled for enabled, graded in states if not graded)
    assert result.eval_loss < result.eval_loss_before


def test_checkpointing_accumulation_and_bfloat16(models, data, tmp_path) -> None:
    whole = run(models["llama"], data, tmp_path / "whole", tuning={"activations": "float"})
    tuning = {"gradient_checkpointing": True, "activations": "float"}
    assert run(models["llama"], data, tmp_path / "checked", tuning=tuning).eval_loss == whole.eval_loss
    tuning = {"dtype": "bfloat16", "accumulation": 2, "activations": "float"}
    result = run(models["untied"], data, tmp_path / "half", tuning=tuning)
    assert result.eval_loss < result.eval_loss_before


def test_early_stopping_writes_the_best(models, data, tmp_path) -> None:
    tuning = {"early_stopping": 1, "eval_every": 1, "max_steps": 20, "learning_rate": 0.03}
    result = run(models["gpt2"], data, tmp_path / "out", tuning=tuning)
    log = json.loads((tmp_path / "out" / "training_log.json").read_text())["log"]
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert result.steps < 20
    assert losses[-1] > min(losses)
    assert result.eval_loss == pytest.approx(min(losses), abs=2e-6)
    assert held_out_loss(tmp_path / "out", data, "int8") == pytest.approx(result.eval_loss, abs=2e-6)


def test_a_test_file_is_scored_at_the_end(models, data, tmp_path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for split, source in (("train", "train"), ("valid", "valid"), ("test", "valid")):
        (folder / f"{split}.jsonl").write_bytes((data / f"{source}.jsonl").read_bytes())
    result = run(models["llama"], folder, tmp_path / "out", "minimums")
    assert result.test_loss == result.eval_loss


def test_scales_of_a_gguf_file(models, data, tmp_path) -> None:
    quantize_checkpoint(models["llama"], tmp_path / "packed.gguf")
    file = run(tmp_path / "packed.gguf", data, tmp_path / "out", "scales")
    folder = run(models["q4_1"], data, tmp_path / "out2", "scales")
    assert file.eval_loss == folder.eval_loss
    assert file.eval_loss < file.eval_loss_before


def test_a_teacher_ends_dropout(models) -> None:
    from quantlab.training.distillation import Student

    taught = Student(load_model(models["gpt2"]), load_model(models["llama"]))
    alone = Student(load_model(models["gpt2"]))
    ids = torch.arange(10, 50)[None]
    found = {}
    for name, student in (("taught", taught), ("alone", alone)):
        student.train()
        found[name] = student(ids, ids).item() == student(ids, ids).item()
    assert found == {"taught": True, "alone": False}
    assert not any("teacher" in name for name, _ in taught.named_parameters())


def test_rows_that_are_no_whole_blocks_stay_float(models, data, tmp_path) -> None:
    result = run(models["uneven"], data, tmp_path / "out")
    assert any("down_proj.weight and 1 more: stay float" in note for note in result.notes)
    written = open_checkpoint(tmp_path / "out")
    assert written.format("model.layers.0.mlp.down_proj.weight") is None
    assert written.format("model.layers.0.mlp.up_proj.weight") == FORMATS["q4_1"]
    assert result.eval_loss < result.eval_loss_before


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("q4_1", {}, "use --train scales"),
        ("q4_1", {"train": "lora"}, "use --train scales"),
        ("q4_1", {"train": "scales", "format": "q4_0"}, "leave out --format"),
        ("q4_0", {"train": "minimums"}, "needs blocks with a minimum"),
        ("llama", {"train": "minimums", "format": "q4_0"}, "needs blocks with a minimum"),
        ("llama", {"levels": 99}, "99 levels"),
        ("llama", {"recipe": "absent.yaml"}, "absent.yaml"),
        ("llama", {"recipe": "q4_1", "format": "q4_0"}, "--recipe"),
        ("llama", {"float_steps": 6}, "the run has 6 steps"),
        ("llama", {"tuning": {"context": 4096}}, "128 positions"),
        ("llama", {"train": "lora", "tuning": {"targets": "wat"}}, "no linear layer"),
        ("llama", {"train": "scales", "tuning": {"activations": "int8"}}, "float activations"),
        ("llama", {"tuning": {"dropout": 0.1}}, "dropout"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(model, options, message, models, data, tmp_path) -> None:
    with pytest.raises(InputError, match=message):
        run(models[model], data, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.training").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "wat"}, "--train wat"),
        ({"format": "q9"}, "q9"),
        ({"temperature": 0.0}, "--temperature 0"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"float_steps": -1}, "--float-steps -1"),
        ({"train": "scales", "float_steps": 3}, "--float-steps"),
        ({"method": "gptq"}, "use --train scales"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_refused(options, message) -> None:
    with pytest.raises(InputError, match=message):
        QatSettings(**options)


def test_a_teacher_of_another_vocabulary_is_refused(models, make_model, data, tmp_path) -> None:
    other = make_model(tmp_path / "other", "llama", vocab_size=544)
    with pytest.raises(InputError, match="different sizes"):
        run(models["llama"], data, tmp_path / "out", teacher=other)
    swapped = make_model(tmp_path / "swapped", "llama")
    stored = json.loads((swapped / "tokenizer.json").read_text())
    vocabulary = stored["model"]["vocab"]
    a, b = list(vocabulary)[300:302]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (swapped / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match="different tokens"):
        run(models["llama"], data, tmp_path / "out", teacher=swapped)


def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(models, data, tmp_path, monkeypatch) -> None:
    from quantlab.training import trainer
    from quantlab.training.failures import TrainingFailedError

    original = trainer.NextTokenTrainer.training_step

    def poisoned(self, model, *args, **kwargs):
        if self.state.global_step == 4:
            with torch.no_grad():
                next(p for name, p in model.named_parameters() if "q_proj" in name).fill_(float("nan"))
        return original(self, model, *args, **kwargs)

    monkeypatch.setattr(trainer.NextTokenTrainer, "training_step", poisoned)
    with pytest.raises(
        TrainingFailedError, match=r"in step 5 .* packed any more.*q_proj.*checkpoint is .*checkpoint-3"
    ):
        run(models["llama"], data, tmp_path / "out")
    assert (tmp_path / "out.training" / "checkpoints" / "checkpoint-3" / "complete").is_file()


def test_a_damaged_model_is_refused_at_once(models, make_model, data, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_model(tmp_path / "damaged", "llama")
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][7, 33] = torch.inf
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"layers.1.mlp.up_proj.weight: row 7, column 33"):
        run(folder, data, tmp_path / "out")
