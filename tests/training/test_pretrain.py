"""Pretraining from a recipe: the model learns, its folder is complete, and an interruption changes no byte."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tiny_pretraining import GPT2, RECIPE, STEP, Run, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantlab
from quantlab.checkpoint import open_checkpoint
from quantlab.training.corpus import read_documents
from quantlab.training.pretrain import pretrain

COMPLETE = {
    "checksums.json", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "training_log.json",
}  # fmt: skip


def stored(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 it is no dict


def test_the_loss_falls_far_below_that_of_guessing(run: Run) -> None:
    """A model that knows nothing has ln(400) = 5.99 nats; thirty steps bring held-out text below 5.2."""
    log = json.loads((run.out / "training_log.json").read_text())
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[0] > losses[-1]
    assert run.result.train_loss == losses[-1] < math.log(400) - 0.8
    assert run.result.eval_loss < math.log(400) - 0.8


def test_the_result_counts_steps_tokens_and_parameters(run: Run) -> None:
    """Steps and tokens are the recipe's; parameters count the tied head once, as the written folder does."""
    assert (run.result.steps, run.result.training_tokens) == (30, 30 * STEP)
    assert (
        run.result.parameters == open_checkpoint(run.out).parameters == sum(w.numel() for w in stored(run.out).values())
    )
    assert run.result.tokens_per_second > 0


def test_progress_reports_steps_and_loss(run: Run) -> None:
    """The callback hears (tokens done, tokens in all, the newest loss) after every step."""
    assert [(done, total) for done, total, _ in run.reports] == [(STEP * step, 30 * STEP) for step in range(1, 31)]
    log = json.loads((run.out / "training_log.json").read_text())
    losses = [f"loss {entry['loss']:.3f}" for entry in log if "loss" in entry]
    (held_out, *_) = [f"held out {entry['eval_loss']:.3f}" for entry in log if "eval_loss" in entry]
    notes = [note for _, _, note in run.reports]
    assert notes == [""] * 10 + [losses[0]] * 5 + [held_out] * 5 + [losses[1]] * 10


def test_the_folder_is_complete_and_nothing_else_is_left(run: Run) -> None:
    """Weights, config, tokenizer in all its forms, generation settings and loss log; the work folder is gone."""
    assert {file.name for file in run.out.iterdir()} == COMPLETE
    assert sorted(entry.name for entry in run.out.parent.iterdir()) == ["corpus", "out", "recipe.yaml"]
    assert json.loads((run.out / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 2}


def test_weights_are_fp16_and_the_config_says_so(run: Run) -> None:
    """Every tensor is half precision, none is the tied head, and the shape is the recipe's."""
    weights = stored(run.out)
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    assert "lm_head.weight" not in weights
    config = json.loads((run.out / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert {name: config[name] for name in RECIPE["model"]} == RECIPE["model"]
    assert (config["vocab_size"], config["bos_token_id"], config["eos_token_id"]) == (400, 1, 2)


def test_the_log_holds_training_and_validation_losses(run: Run) -> None:
    """Training losses every ten steps, validation losses every fifteen; the learning rate stays, then falls."""
    log = json.loads((run.out / "training_log.json").read_text())
    assert [entry["step"] for entry in log if "loss" in entry] == [10, 20, 30]
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [15, 30, 30]  # the last is the test text's
    rates = [entry["learning_rate"] for entry in log if "loss" in entry]
    assert rates[0] == rates[1] == 0.01
    assert rates[2] < 0.01 / 4


def test_transformers_loads_the_folder(run: Run, prose: Path) -> None:
    """AutoModelForCausalLM and AutoTokenizer take it as any other folder, and load_model gives the same logits."""
    text = read_documents(prose)[0][:300]
    tokenizer = AutoTokenizer.from_pretrained(run.out)
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids[0].tolist() == quantlab.load_tokenizer(run.out).encode(text)
    ids = ids[:, :128]
    theirs, info = AutoModelForCausalLM.from_pretrained(run.out, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, quantlab.load_model(run.out)(ids).logits)


def test_eval_loss_is_the_written_models_loss_on_the_test_text(run: Run) -> None:
    """The reported loss, computed again from the files: windows over <s> text </s>, each after a start token.

    Tolerance: training evaluates fp32 weights, the folder holds fp16. Rounding moves a weight by at most 2^-11 of
    itself at random, a token's loss by some 1e-4, the mean over 1700 tokens by less than 1e-4.
    """
    tokenizer = quantlab.load_tokenizer(run.out)
    (document,) = read_documents(run.corpus / "test.txt")
    stream = [1, *tokenizer.encode(document, add_special_tokens=False), 2]
    windows = torch.tensor([[1, *stream[start : start + 127]] for start in range(0, len(stream) - 126, 127)])
    assert len(windows) >= 5
    with torch.no_grad():
        logits = quantlab.load_model(run.out)(windows, use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    assert run.result.eval_loss == pytest.approx(float(expected), abs=1e-4)


def test_perplexity_agrees_with_eval_loss(run: Run) -> None:
    """`perplexity` at the recipe's context scores the same text in windows shifted by one token.

    Tolerance: eval_loss also scores <s> after <s>, at most ln(400) and some nats more than a token's mean, and leaves
    out the last, incomplete window, up to 126 tokens whose mean lies within a few tenths of the rest's.
    """
    measured = quantlab.perplexity(run.out, run.corpus / "test.txt", context=128)
    tolerance = (10 + 126 * 0.4) / measured.tokens
    assert tolerance < 0.04
    assert measured.nll == pytest.approx(run.result.eval_loss, abs=tolerance)
    assert measured.perplexity == pytest.approx(math.exp(measured.nll))


class InterruptedRun(Exception):  # noqa: N818 it is no error
    """Stands for whatever stops a run."""


def stop(*_: object) -> None:
    raise InterruptedRun


def interrupt_at(tokens: int):
    def progress(done: int, total: int, note: str) -> None:
        if done >= tokens:
            raise InterruptedRun

    return progress


@pytest.fixture
def interrupted(run: Run, tmp_path: Path) -> Path:
    """OUT of the same run, stopped at step 15: after its first checkpoint, before its second."""
    out = tmp_path / "out"
    with pytest.raises(InterruptedRun):
        pretrain(run.recipe, run.corpus, out, progress=interrupt_at(15 * STEP))
    assert not out.exists()
    assert [f.name for f in (tmp_path / "out.training" / "checkpoints").iterdir()] == ["checkpoint-10"]
    return out


def test_a_resumed_run_ends_in_the_same_bytes(run: Run, interrupted: Path) -> None:
    """Interrupted after a checkpoint, before the learning rate falls, and resumed: model.safetensors is equal."""
    # What a save that was cut short leaves behind: a newer checkpoint that lacks a file. It is passed over.
    checkpoints = interrupted.with_name("out.training") / "checkpoints"
    shutil.copytree(checkpoints / "checkpoint-10", checkpoints / "checkpoint-20")
    (checkpoints / "checkpoint-20" / "trainer_state.json").unlink()
    steps: list[int] = []
    result = pretrain(
        run.recipe, run.corpus, interrupted, resume=True, progress=lambda done, *_: steps.append(done // STEP)
    )
    assert steps == list(range(11, 31))  # the first ten steps were not repeated
    assert (interrupted / "model.safetensors").read_bytes() == (run.out / "model.safetensors").read_bytes()
    assert (result.eval_loss, result.train_loss) == (run.result.eval_loss, run.result.train_loss)
    assert not interrupted.with_name("out.training").exists()


def test_a_run_stopped_while_its_model_was_written_is_finished(
    tmp_path: Path, prose: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All steps were done: resuming trains nothing again and writes what an undisturbed run writes."""
    recipe = write_recipe(tmp_path, tokens=10 * STEP)
    whole = pretrain(recipe, prose, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("quantlab.training.pretrain.write_model", stop)
        with pytest.raises(InterruptedRun):
            pretrain(recipe, prose, tmp_path / "out")
    result = pretrain(recipe, prose, tmp_path / "out", resume=True)
    assert (result.eval_loss, result.train_loss) == (whole.eval_loss, whole.train_loss)
    assert result.tokens_per_second == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]


def test_one_file_is_enough_and_every_twentieth_document_is_held_out(tmp_path: Path, prose: Path) -> None:
    """A single file trains like a folder with the same train.txt; the first of eight documents is the held-out one."""
    recipe = write_recipe(tmp_path, tokens=2 * STEP, warmup_tokens=0)
    (tmp_path / "folder").mkdir()
    shutil.copy(prose, tmp_path / "folder" / "train.txt")
    (tmp_path / "split").mkdir()
    documents = read_documents(prose)
    (tmp_path / "split" / "train.txt").write_text("\n<|endoftext|>\n".join(documents[1:]), encoding="utf-8")
    (tmp_path / "split" / "valid.txt").write_text(documents[0], encoding="utf-8")
    results = {}
    for name, data in (("file", prose), ("folder", tmp_path / "folder"), ("split", tmp_path / "split")):
        results[name] = pretrain(recipe, data, tmp_path / f"out-{name}").eval_loss
        assert (tmp_path / f"out-{name}" / "tokenizer.json").is_file()
    assert results["file"] == results["folder"] == results["split"]


def test_tokens_and_seed_replace_the_recipes(tmp_path: Path, prose: Path) -> None:
    """Two steps instead of thirty; another seed is another model, the same seed the same bytes."""
    recipe = write_recipe(tmp_path)
    weights = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        assert pretrain(recipe, prose, tmp_path / name, tokens=2 * STEP, seed=seed).steps == 2
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_gpt2_trains_and_its_folder_loads(tmp_path: Path, prose: Path) -> None:
    """A GPT-2 of the recipe's shape: the loss falls, and the files are as transformers' own, Conv1D as [in, out]."""
    recipe = write_recipe(tmp_path, model=GPT2, tokens=20 * STEP, short_context=0)
    result = pretrain(recipe, prose, tmp_path / "out")
    assert result.eval_loss < math.log(400) - 0.5
    weights = stored(tmp_path / "out")
    assert tuple(weights["transformer.h.0.attn.c_attn.weight"].shape) == (64, 192)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, weight in weights.items():
        assert torch.equal(model.get_parameter(name), weight.float())
    measured = quantlab.perplexity(tmp_path / "out", prose, context=128)
    assert measured.nll < math.log(400) - 0.5


@pytest.mark.parametrize("model", [RECIPE["model"], GPT2], ids=["llama", "gpt2"])
def test_muon_takes_hidden_matrices_and_nothing_else(tmp_path: Path, model: dict[str, Any]) -> None:
    """Embeddings (GPT-2's positions too), head, norms and biases go to AdamW."""
    from quantlab.training.pretraining_model import new_model
    from quantlab.training.pretraining_trainer import muon
    from quantlab.training.recipe_file import read_pretrain_recipe

    file = write_recipe(tmp_path, model={**model, "tie_word_embeddings": False})
    recipe = read_pretrain_recipe(file)
    network = new_model(recipe, file)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = {
        group["muon"]: {names[id(p)] for p in group["params"]} for group in muon(network, recipe.schedule).param_groups
    }
    hidden = {name for name in names.values() if ".weight" in name and (".mlp." in name or "attn." in name)}
    assert groups[True] == hidden
    assert groups[False] == set(names.values()) - hidden


def test_adamw_is_the_other_optimizer(tmp_path: Path, prose: Path) -> None:
    """`optimizer: adamw` learns too, by other weights than Muon's from the same start."""
    outs = {}
    for optimizer in ("adamw", "muon"):
        recipe = write_recipe(tmp_path, optimizer=optimizer, tokens=10 * STEP)
        result = pretrain(recipe, prose, tmp_path / optimizer)
        assert result.eval_loss < math.log(400) - 0.2
        outs[optimizer] = stored(tmp_path / optimizer)["model.layers.0.mlp.up_proj.weight"].float().numpy()
    assert not np.array_equal(outs["adamw"], outs["muon"])
