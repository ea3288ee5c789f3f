"""`quantlab finetune`: what it prints, what it refuses, and what it leaves behind."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_processes import Run, quantlab_process
from finetune_cases import OPTIONS, names, write_rows

from quantlab.calibration.quantize import quantize_checkpoint

Refusal = Callable[..., str]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def packed(llama_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("packed")
    found = {format: folder / format for format in ("q4_1", "q8_0")}
    for format, path in found.items():
        quantize_checkpoint(llama_model, path, format=format)
    found["gguf"] = folder / "q4_1.gguf"
    quantize_checkpoint(llama_model, found["gguf"])
    return found


@pytest.fixture
def endless(packed: dict[str, Path], tmp_path: Path) -> Path:
    """A model whose tokenizer names no end token."""
    folder = Path(shutil.copytree(packed["q4_1"], tmp_path / "endless"))
    for name in ("generation_config.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    return folder


@pytest.mark.parametrize(
    ("base", "options"),
    [
        ("gguf", ("--method", "block-sum", "--gradient-checkpointing")),
        ("q8_0", ("--merge-aware", "--dtype", "bfloat16", "--packing")),
        ("float", ("--targets", "all-linear", "--rslora", "--dropout", 0.1, "--dora")),
        ("float", ("--method", "full", "--learning-rate", 1e-3)),
    ],
    ids=str,
)
def test_one_json_object_and_nothing_else(
    base: str, options: tuple[object, ...], packed, llama_model: Path, data: Path, tmp_path: Path
) -> None:
    """Not a word of transformers, peft or torch on either stream."""
    if "--packing" in options:
        pytest.importorskip("trl")
    out = tmp_path / "out"
    done = quantlab_process(
        "finetune", packed.get(base, llama_model), data, out, *OPTIONS, *options, "--json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    expected = ("note: no loss.png", "training: ")  # progress, where the machine is slow
    assert [line for line in done.stderr.splitlines() if not line.startswith(expected)] == []
    found = json.loads(done.stdout)
    assert (found["steps"], found["adapter"]) == (4, str(out))
    assert found["trainable_parameters"] > 0
    assert found["peak_rss_bytes"] > 1 << 20
    for key in ("train_loss", "eval_loss", "eval_loss_before", "tokens_per_second"):
        assert found[key] > 0
        assert math.isfinite(found[key])
    assert names(tmp_path) == ["out"]


def test_without_held_out_rows_their_loss_is_null(run: Run, packed, data: Path, tmp_path: Path) -> None:
    found = run("finetune", packed["q4_1"], data / "train.jsonl", tmp_path / "out", *OPTIONS, "--json").json
    assert (found["eval_loss"], found["eval_loss_before"]) == (None, None)


def test_what_a_person_reads(run: Run, packed, data: Path, tmp_path: Path) -> None:
    outcome = run("finetune", packed["q4_1"], data, tmp_path / "out", *OPTIONS)
    assert (outcome.status, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0] == "lora: 3.6 k of 0.1 M parameters trained (3.79 %)"
    assert lines[1].startswith("4 steps, ")
    assert " in training, held out " in lines[2]
    assert lines[-1] == f"written: {tmp_path / 'out'}"


def test_options_come_from_a_yaml_file_and_flags_win(run: Run, packed, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("rank: 2\nbatch-size: 2\ncontext: 64\nmax_steps: 9\njson: true\n")
    found = run("finetune", packed["q4_1"], data, tmp_path / "out", "--config", file, "--max-steps", 1).json
    assert (found["steps"], found["trainable_parameters"]) == (1, 2 * 896)


def test_the_adapter_names_its_base_in_any_folder(
    run: Run, packed, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(packed["q4_1"].parent)
    assert run("finetune", "q4_1", data, tmp_path / "out", *OPTIONS).status == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(packed["q4_1"])


def test_what_tensorboard_shows_outlives_the_checkpoints(packed, data: Path, tmp_path: Path) -> None:
    from quantlab.training.finetune import finetune
    from quantlab.training.finetune_settings import FinetuneSettings

    def log(done: int, total: int, note: str) -> None:
        runs = tmp_path / "out.training" / "checkpoints" / "runs"  # where transformers has tensorboard's files
        runs.mkdir(parents=True, exist_ok=True)
        (runs / "events").write_text(note)

    settings = FinetuneSettings(context=64, max_steps=1)
    finetune(str(packed["q4_1"]), str(data), str(tmp_path / "out"), settings=settings, progress=log)
    assert (tmp_path / "out" / "runs" / "events").read_text().startswith("step 1/1")


# --show-batch


def test_show_batch_writes_nothing_and_needs_no_torch(packed, data: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from quantlab.cli import _run; status = _run(); "
        "assert not {'torch', 'transformers', 'peft', 'accelerate', 'trl'} & set(sys.modules); sys.exit(status)"
    )
    command = [sys.executable, "-c", code, "finetune", packed["q4_1"], data, tmp_path / "out", "--show-batch", "-b", 2]
    command += ["--context", 64, "--threads", 1]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "[[it is 1 and 2.</s>]]" in done.stdout
    assert "train.jsonl:2: " in done.stdout
    assert "train.jsonl:3: " not in done.stdout
    assert done.stdout.splitlines()[-1].startswith("10 samples, ")
    assert names(tmp_path) == []


def test_show_batch_as_json(run: Run, packed, data: Path, tmp_path: Path) -> None:
    arguments = "finetune", packed["q4_1"], data, tmp_path / "out", "--show-batch", "-b", 1, "--context", 64, "--json"
    found = run(*arguments).json
    assert [sample["place"] for sample in found["samples"]] == ["train.jsonl:1"]
    learned = [part["text"] for part in found["samples"][0]["segments"] if part["trained"]]
    assert learned == ["it is 0 and 1.</s>"]
    assert found["totals"]["samples"] == 10


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_show_batch_is_coloured_where_that_is_wanted(
    no_color: str, coloured: bool, run: Run, packed, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", no_color)
    out = run("finetune", packed["q4_1"], data, tmp_path / "out", "--show-batch", "--context", 64).out
    assert ("\x1b[1;32mit is 0 and 1.</s>\x1b[0m" in out) is coloured
    assert ("[[it is 0 and 1.</s>]]" in out) is not coloured


# refusals


def rows_file(folder: Path, content: bytes) -> Path:
    file = folder / "rows.jsonl"
    file.write_bytes(content)
    return file


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no rows; each line must be a JSON object"),
        (b"\n \n", "holds no rows; each line must be a JSON object"),
        (b'{"text": "a"}\n{"text": \n', "1 bad row: rows.jsonl:2: no JSON"),
        (b'{"text": "a"}\n\n[1]\n', "1 bad row: rows.jsonl:3: is no JSON object"),
        (b'{"prompt": 1, "completion": "a"}\n{}\n', '2 bad rows: rows.jsonl:1: "prompt" is no text; rows.jsonl:2: has'),
        (b'{"text": "\xff"}\n', "1 bad row: rows.jsonl:1: not UTF-8 text"),
        (b'{"prompt": "a", "completion": ""}\n', '1 bad row: rows.jsonl:1: "completion" is empty'),
        (b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
         "no chat template"),
        (b'{"prompt": "a", "completion": "b"}\n' + b'{"prompt": "%s", "completion": "b"}\n' % (b"zq " * 99),
         "1 sample longer than the context of 64 tokens: rows.jsonl:2"),
    ],
    ids=range(9),
)  # fmt: skip
def test_wrong_rows(refusal: Refusal, packed, tmp_path: Path, content: bytes, message: str) -> None:
    file = rows_file(tmp_path, content)
    line = refusal("finetune", packed["q4_1"], file, tmp_path / "out", *OPTIONS)
    assert message in line
    assert names(tmp_path) == ["rows.jsonl"]


def test_wrong_places(refusal: Refusal, packed, data: Path, tmp_path: Path) -> None:
    model, out = Path(shutil.copytree(packed["q4_1"], tmp_path / "model")), tmp_path / "out"
    rows = Path(shutil.copytree(data, tmp_path / "rows"))
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for arguments, message in (
        ((tmp_path / "gone", rows, out), "gone: no such folder or file"),
        ((model, tmp_path / "gone", out), "gone: no such file or folder; give a .jsonl or .txt file"),
        ((model, model, out), "holds no train.jsonl"),
        ((model, tmp_path / "file", out), "is neither .jsonl"),
        ((model, rows, tmp_path / "folder"), "exists already; choose another name or pass --overwrite"),
        ((model, rows, model, "--overwrite"), "is the model itself, or a folder around it"),
        ((model, rows, tmp_path, "--overwrite"), "is the model itself, or a folder around it"),
        ((model, rows, model / "tuned"), "lies in the model's folder"),
        ((model, rows, rows, "--overwrite"), "is the data itself, or a folder around it"),
        ((model, rows, "."), "choose another name"),
        ((model, rows, ".."), "choose another name"),
        ((model, rows, tmp_path / "file" / "out"), "choose another name"),
    ):
        assert message in refusal("finetune", *arguments, *OPTIONS), arguments
    assert names(tmp_path) == ["file", "folder", "model", "rows"]
    assert names(rows) == names(data)


def test_a_folder_of_the_users_own_is_no_work_to_resume(refusal: Refusal, packed, data: Path, tmp_path: Path) -> None:
    """It would be removed at the end."""
    mine = tmp_path / "out.training" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    for more in ((), ("--resume",)):
        assert "out.training: is not " in refusal("finetune", packed["q4_1"], data, tmp_path / "out", *OPTIONS, *more)
    assert mine.read_text() == "mine"


def test_models_that_cannot_be_trained_so(
    refusal: Refusal, packed, llama_model: Path, data: Path, tmp_path: Path
) -> None:
    for base, more, message in (
        (packed["q8_0"], ("--method", "block-sum"), "quantize the base to q4_1 or q5_1, or use --merge-aware"),
        (llama_model, ("--merge-aware",), "quantize the model first, or train a plain LoRA"),
        (packed["gguf"], ("--method", "full"), "give the float model, or train a LoRA on this one"),
        (packed["q4_1"], ("--dora",), "leave it out, or give the float model"),
        (packed["q4_1"], ("--targets", "q_proj,wat"), "'wat' is no linear layer of"),
        (packed["q4_1"], ("--context", 999), "--context 999: the model has 128 positions"),
        (llama_model, ("--activations", "int8"), "quantize the model first"),
    ):
        assert message in refusal("finetune", base, data, tmp_path / "out", *OPTIONS, *more), more
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "options",
    [
        ("--rank", 0), ("--rank", 32769), ("--learning-rate", "nan"), ("--learning-rate", -1), ("--max-steps", -1),
        ("--batch-size", 0), ("--epochs", 0), ("--alpha", "inf"), ("--dropout", 1), ("--warmup", "nan"),
        ("--seed", 1 << 32), ("--seed", -1), ("--scheduler", "wat"), ("--report-to", "wat"), ("--device", "wat"),
        ("--threads", 0), ("--max-steps", "x"), ("--early-stopping", 0),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_values_name_their_option(refusal: Refusal, packed, data: Path, tmp_path: Path, options) -> None:
    line = refusal("finetune", packed["q4_1"], data, tmp_path / "out", *OPTIONS, *options)
    assert str(options[0]) in line
    assert str(options[1]) in line or options[1] == "x"
    assert names(tmp_path) == []


def test_early_stopping_without_held_out_rows_is_refused(refusal: Refusal, packed, data: Path, tmp_path: Path) -> None:
    arguments = "finetune", packed["q4_1"], data / "train.jsonl", tmp_path / "out", *OPTIONS
    assert "no rows are held out" in refusal(*arguments, "--early-stopping", 1)


def test_a_tokenizer_without_end_token_and_the_way_out(
    refusal: Refusal, run: Run, endless: Path, data: Path, tmp_path: Path
) -> None:
    arguments = "finetune", endless, data, tmp_path / "out", *OPTIONS
    assert refusal(*arguments).endswith("or name one of its tokens with --end-token")
    assert refusal(*arguments, "--end-token", "wat") == "end token 'wat': the tokenizer has no such token"
    assert "</s>]]" in run(*arguments, "--end-token", "</s>", "--show-batch").out
    found = run(*arguments, "--end-token", "</s>", "--json").json
    assert len(found["notes"]) == 1
    assert "does not stop there by itself" in found["notes"][0]


@pytest.mark.parametrize(
    ("module", "options", "way_out"),
    [
        ("accelerate", (), "accelerate is not installed; install it with: pip install 'quantlab[train]'"),
        ("trl", ("--packing",), "trl is not installed; install it with: pip install 'quantlab[train]'"),
        ("tensorboard", ("--report-to", "tensorboard"), "install it with: pip install tensorboard"),
        ("wandb", ("--report-to", "wandb"), "install it with: pip install wandb"),
    ],
)
def test_packages_that_are_not_installed(
    module: str, options, way_out: str, refusal: Refusal, packed, data: Path, tmp_path: Path, monkeypatch
) -> None:
    for name in (module, "tensorboardX"):
        monkeypatch.setitem(sys.modules, name, None)
    assert refusal("finetune", packed["q4_1"], data, tmp_path / "out", *OPTIONS, *options).endswith(way_out)
    assert names(tmp_path) == []
