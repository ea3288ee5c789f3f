"""What a user types as MODEL: a folder, or a hub id, which is taken from the cache when the network is off."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import quantlab
from quantlab.checkpoint.source import local_model
from quantlab.errors import InputError


def refusal(model: str | Path) -> str:
    with pytest.raises(InputError) as caught:
        local_model(model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As path or text, absolute, relative, or from the home folder; also one that looks like a hub id."""
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_model(tmp_path) == local_model(str(tmp_path)) == tmp_path
    assert local_model("org/name") == Path("org/name")
    assert local_model("org/name/") == Path("org/name")
    assert local_model("~/org/name") == tmp_path / "org" / "name"


@pytest.mark.parametrize("model", ["none", "./org/name", "/nowhere/model", "a/b/c", "org/", "~nobody-of-that-name/x"])
def test_what_is_neither_folder_nor_hub_id_is_no_such_folder(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(model) == f"{model}: no such folder or file"


def test_an_empty_name_is_refused() -> None:
    """To the system it is the current folder, to us a variable of the shell that was not set."""
    assert refusal("") == "the model's name is empty; give a folder, a GGUF file or a hub id"


def test_a_file_is_refused_with_the_way_out(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    way_out = "give one, or the folder with config.json and the safetensors files"
    assert refusal(file) == f"{file}: is no GGUF file; {way_out}"


@pytest.mark.parametrize(
    "model", ["nobody/has-cached-this", "nobody/double--dash", "nobody/two..dots", f"a/{'x' * 99}"]
)
def test_a_hub_id_that_is_not_cached_is_one_line_offline(model: str, tmp_path: Path) -> None:
    """So is a name that the hub does not allow."""
    message = refusal(model)
    assert message.startswith(f"{model}: no such folder here, and the hub did not give it: ")
    assert len(message) > len(f"{model}: no such folder here, and the hub did not give it: ")


USE_CACHE = """
import json
import quantlab

params = quantlab.SamplingParams(temperature=0)
completion = quantlab.generate("org/tiny", "The lamp", max_tokens=8, params=params)
paths = {name: str(quantlab.open_checkpoint(name).path) for name in ("org/tiny", "org/legacy")}
print(json.dumps({"token_ids": completion.token_ids, "paths": paths}))
"""


def test_cached_models_work_offline(llama_model: Path, tmp_path: Path) -> None:
    """The hub's cache laid out by hand: an id names the same model that its folder does, in safetensors or legacy."""
    snapshots = {}
    for name in ("tiny", "legacy"):
        cached = tmp_path / "hub" / f"models--org--{name}"
        snapshots[f"org/{name}"] = cached / "snapshots" / ("0123456789" * 4)
        shutil.copytree(llama_model, snapshots[f"org/{name}"])
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("0123456789" * 4)
    weights = snapshots["org/legacy"] / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()

    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-c", USE_CACHE]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout)
    assert seen["paths"] == {name: str(snapshot) for name, snapshot in snapshots.items()}
    params = quantlab.SamplingParams(temperature=0)
    expected = quantlab.generate(llama_model, "The lamp", max_tokens=8, params=params)
    assert tuple(seen["token_ids"]) == expected.token_ids


def test_what_lies_in_a_folder_that_is_closed_to_us_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exists(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", exists)  # root may look everywhere
    with pytest.raises(InputError, match=f"^{tmp_path / 'model'}: cannot be read: Permission denied$"):
        local_model(tmp_path / "model")
