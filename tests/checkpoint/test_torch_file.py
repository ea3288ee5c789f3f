"""Reading legacy .bin files: plain tensors come out bit for bit, and nothing in a file is ever executed."""

from __future__ import annotations

import contextlib
import pickle
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from quantlab.checkpoint.tensors import torch_tensor
from quantlab.checkpoint.torch_file import TorchFile
from quantlab.errors import InputError

TENSORS = {
    "matrix": torch.arange(6.0).reshape(2, 3),
    "half": torch.tensor([1.5, -2.25], dtype=torch.float16),
    "brain": torch.tensor([1.5, -2.25, 3e38], dtype=torch.bfloat16),
    "double": torch.tensor([[0.1]], dtype=torch.float64),
    "integers": torch.tensor([-1, 1 << 40]),
    "bytes": torch.tensor([[0, 255]], dtype=torch.uint8),
    "flags": torch.tensor([True, False]),
    "scalar": torch.tensor(7.0),
    "empty": torch.empty(0, 4),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip archive", "from before torch 1.6"])
def test_entries_and_bytes_are_those_of_the_tensors(tmp_path: Path, zipped: bool) -> None:
    """The same words and bytes that the safetensors library gives the same tensors."""
    torch.save(TENSORS, tmp_path / "model.bin", _use_new_zipfile_serialization=zipped)
    save_file(TENSORS, tmp_path / "model.safetensors")
    file = TorchFile(tmp_path / "model.bin")
    assert list(file.entries) == list(TENSORS)
    with safe_open(tmp_path / "model.safetensors", "pt") as library:
        for name, entry in file.entries.items():
            expected = library.get_slice(name)
            assert (entry.name, entry.dtype, entry.shape) == (name, expected.get_dtype(), tuple(expected.get_shape()))
            assert torch.equal(torch_tensor(file.read(name), entry), TENSORS[name])


def test_views_read_as_what_they_show(tmp_path: Path) -> None:
    """Transposed, strided and expanded tensors and parameters are stored with their base; the bytes are row-major."""
    base = torch.arange(12.0).reshape(3, 4)
    views = {
        "transposed": base.T,
        "strided": base[:, ::2],
        "tail": base[2:],
        "expanded": torch.tensor([3.0]).expand(4),
        "parameter": torch.nn.Parameter(base),
    }
    torch.save(views, tmp_path / "model.bin")
    file = TorchFile(tmp_path / "model.bin")
    for name, view in views.items():
        assert torch.equal(torch_tensor(file.read(name), file.entries[name]), view)


def test_a_read_is_a_fresh_array(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(4, dtype=torch.uint8)}, tmp_path / "model.bin")
    file = TorchFile(tmp_path / "model.bin")
    file.read("a")[:] = 9
    assert file.read("a").tolist() == [0, 1, 2, 3]


class Payload:
    """Unpickled as code, it makes a file: what an attacker's checkpoint would do."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[list[str]]]:
        return subprocess.check_call, (["touch", str(self.target)],)


@pytest.mark.parametrize("form", ["plain pickle", "zip archive", "from before torch 1.6"])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path: Path, form: str) -> None:
    """The line does not repeat torch's advice to load the file anyway."""
    target, path = tmp_path / "executed", tmp_path / "pytorch_model.bin"
    content = {"weight": torch.ones(2), "payload": Payload(target)}
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip archive")
    with pytest.raises(InputError) as caught:
        TorchFile(path)
    assert str(caught.value) == (
        f"{path}: damaged, or holds more than tensors, which could run code; get it, or save it again, as safetensors"
    )
    assert not target.exists()

    with contextlib.suppress(RuntimeError):  # the plain pickle is no checkpoint, which torch notices too late
        torch.load(path, weights_only=False)
    assert target.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "holds something else than named tensors"),
        (torch.ones(2), "holds something else than named tensors"),
        ({"model": {"weight": torch.ones(2)}}, "holds something else than named tensors"),
        ({"weight": torch.ones(2), "step": 3}, "holds something else than named tensors"),
        ({0: torch.ones(2)}, "a tensor is named 0, which is no text"),
        ({"a": torch.eye(3).to_sparse()}, "tensor a: is sparse or has no data"),
        ({"a": torch.empty(3, device="meta")}, "tensor a: is sparse or has no data"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "tensor a: element type torch.complex64 is not supported"),
        ({"a": torch.ones(2).to(torch.float8_e4m3fn)}, "tensor a: element type torch.float8_e4m3fn is not supported"),
    ],
    ids=["list", "tensor", "nested", "number", "number as name", "sparse", "no data", "complex", "8-bit float"],
)
def test_anything_but_named_plain_tensors_is_refused(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(content, path)
    with pytest.raises(InputError) as caught:
        TorchFile(path)
    assert str(caught.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99])
def test_a_file_cut_short_is_refused_in_one_line(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(TENSORS, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(InputError) as caught:
        TorchFile(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
