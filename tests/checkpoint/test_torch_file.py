"""Reading legacy .bin files: plain tensors come out bit for bit, and nothing in a file is ever executed."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import subprocess
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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


# Archives made by hand.


@dataclass(frozen=True)
class Storage:
    """Stands in a pickle for a storage of the archive."""

    kind: type
    key: str
    elements: int


@dataclass(frozen=True)
class Call:
    """Stands in a pickle for what a function gives; `state` is set on it."""

    function: object
    arguments: tuple[object, ...] = ()
    state: object = None

    def __reduce__(self) -> tuple[object, ...]:
        return (self.function, self.arguments) + (() if self.state is None else (self.state,))


class Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> object:
        return ("storage", obj.kind, obj.key, "cpu", obj.elements) if isinstance(obj, Storage) else None


def view(elements: int, shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> Call:
    """A tensor over the archive's one storage, which says that it has so many elements."""
    storage = Storage(torch.FloatStorage, "0", elements)
    return Call(torch._utils._rebuild_tensor_v2, (storage, offset, shape, stride, False, OrderedDict()))


def archive(path: Path, content: object, *, compression: int = zipfile.ZIP_STORED, protocol: int = 2) -> Path:
    """An archive like torch's, with four bytes of data."""
    pickled = io.BytesIO()
    Pickler(pickled, protocol).dump(content)
    with zipfile.ZipFile(path, "w", compression) as parts:
        for name, data in (
            ("data.pkl", pickled.getvalue()),
            ("byteorder", b"little"),
            ("data/0", b"1234"),
            ("version", b"3"),
        ):
            parts.writestr(f"archive/{name}", data)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        TorchFile(path)
    assert str(caught.value).isprintable()
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


def test_the_archives_are_as_torch_has_them(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.bin", {"a": view(1, (1,), (1,))})
    assert TorchFile(path).read("a").tobytes() == b"1234"
    assert torch.load(path, weights_only=True)["a"].view(torch.uint8).tolist() == [49, 50, 51, 52]


@pytest.mark.parametrize("elements", [1000, 10**9, 10**18, -1])
def test_storages_that_are_larger_than_the_file_are_refused(tmp_path: Path, elements: int) -> None:
    shape = (max(1, elements),)
    assert refusal(archive(tmp_path / "a.bin", {"a": view(elements, shape, (1,))})).startswith("no checkpoint of plain")


@pytest.mark.parametrize("count", [1 << 20, 1 << 40, 1 << 61])
def test_one_number_that_stands_for_a_terabyte_is_refused(tmp_path: Path, count: int) -> None:
    """A stride of 0 makes a tensor of any size from four bytes."""
    path = archive(tmp_path / "a.bin", {"a": view(1, (count,), (0,))})
    size = path.stat().st_size
    assert refusal(path).startswith(f"tensor a: claims {4 * count} bytes in a file of {size}; get it, or save it again")


def test_compressed_parts_are_refused(tmp_path: Path) -> None:
    """torch writes none: as a bomb they would grow a thousandfold, and mapped they would read as other numbers."""
    path = archive(tmp_path / "a.bin", {"a": view(1, (1,), (1,))}, compression=zipfile.ZIP_DEFLATED)
    assert "its part 'archive/data.pkl' is compressed or larger than the file" in refusal(path)


def test_attributes_in_place_of_methods_do_nothing(tmp_path: Path) -> None:
    """A pickle may set them, on dictionaries and on parameters; only the types' own methods are called."""
    state = dict.fromkeys(("items", "values", "keys", "detach", "contiguous", "reshape", "is_neg", "shape_"), 1)
    parameter = Call(torch._utils._rebuild_parameter_with_state, (view(1, (1,), (1,)), False, OrderedDict(), state))
    assert TorchFile(archive(tmp_path / "a.bin", {"a": parameter})).read("a").tobytes() == b"1234"
    assert TorchFile(archive(tmp_path / "b.bin", Call(OrderedDict, (), state))).entries == {}


def test_other_pickle_protocols_warn_nobody(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """torch says on stderr that it does not expect them; the file is read or refused, and that is all."""
    assert TorchFile(archive(tmp_path / "a.bin", {"a": view(1, (1,), (1,))}, protocol=3)).read("a").size == 4
    assert "damaged" in refusal(archive(tmp_path / "b.bin", {"a": view(1, (1,), (1,))}, protocol=4))
    assert len(recwarn) == 0


def test_names_that_a_terminal_would_obey_are_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.bin", {"a\n\x1b[31m": view(1, (1,), (1,))})
    assert refusal(path) == r"tensor name 'a\n\x1b[31m' is not 1 to 1024 printable characters; damaged"


def test_views_that_need_arithmetic_are_refused(tmp_path: Path) -> None:
    """Negated when it is read; several sizes in one tensor."""
    torch.save({"a": torch._neg_view(torch.ones(3))}, tmp_path / "a.bin")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"a": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}, tmp_path / "b.bin")
    for name in ("a.bin", "b.bin"):
        assert refusal(tmp_path / name).startswith("tensor a: is sparse or has no data of its own; ")


def test_a_file_that_is_cut_while_open_is_an_error_of_the_tensor(tmp_path: Path) -> None:
    """It is mapped: touching what is no longer there would end the process."""
    path = tmp_path / "a.bin"
    torch.save(TENSORS, path)
    file = TorchFile(path)
    os.truncate(path, 100)
    with pytest.raises(InputError) as caught:
        file.read("matrix")
    assert str(caught.value) == f"{path}: was cut or removed while open, at tensor matrix"


def test_pipes_and_missing_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.bin")
    assert refusal(tmp_path / "pipe.bin") == "is a folder, pipe or device where a file should be"
    assert refusal(tmp_path / "none.bin") == "cannot be opened: No such file or directory"


@settings(derandomize=True, database=None, deadline=None, max_examples=150)
@given(
    zipped=st.booleans(),
    changes=st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4),
)
def test_bytes_that_changed(zipped: bool, changes: list[tuple[int, bytes]]) -> None:
    """Files of both kinds with other bytes in them open, or are refused in one line."""
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(6.0), "b": torch.ones(2)}, buffer, _use_new_zipfile_serialization=zipped)
    content = bytearray(buffer.getvalue())
    for place, new in changes:
        at = place % len(content)
        content[at : at + len(new)] = new
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.bin"
        path.write_bytes(content)
        try:
            file = TorchFile(path)
            for name, entry in file.entries.items():
                assert file.read(name).nbytes == entry.nbytes
            line = str(path)
        except InputError as error:
            line = str(error)
        assert line.isprintable()
        assert str(path) in line
