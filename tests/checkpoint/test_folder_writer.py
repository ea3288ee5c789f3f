"""Writing a model folder: what lands there is what other libraries read, and it lands whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from quantlab.checkpoint import TensorEntry, open_checkpoint
from quantlab.checkpoint.folder_writer import FolderWriter
from quantlab.checkpoint.tensors import DTYPE_BYTES
from quantlab.errors import InputError
from quantlab.formats import FORMATS

LLAMA = {"model_type": "llama"}
TENSORS = {
    "flag": torch.tensor([True, False, True]),
    "scalar": torch.tensor(7.0),
    "half": torch.arange(5, dtype=torch.float16),
    "matrix": torch.arange(6.0).reshape(2, 3),
    "brain": torch.tensor([[1.5, -2.25, 3e38]], dtype=torch.bfloat16),
    "empty": torch.empty(0, 4),
    "integer": torch.tensor([1 << 40, -1]),
    "double": torch.tensor([0.1], dtype=torch.float64),
    "transposed view": torch.arange(6.0).reshape(2, 3).T,
    "byte": torch.tensor([0, 255], dtype=torch.uint8),
}
WORDS = {
    torch.bool: "BOOL", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.float64: "F64", torch.uint8: "U8",
}  # fmt: skip


def plan(tensors: dict[str, torch.Tensor]) -> list[TensorEntry]:
    return [TensorEntry(name, WORDS[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]


def write(folder: Path, tensors: dict[str, torch.Tensor], **options: object) -> None:
    with FolderWriter(folder, plan(tensors), LLAMA, **options) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert set(one) == set(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name])


def logits(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model(torch.tensor([[1, 5, 9, 300]])).logits


# What it writes.


@pytest.mark.parametrize("order", [sorted(TENSORS), sorted(TENSORS, reverse=True)], ids=["forwards", "backwards"])
def test_the_library_reads_the_tensors_whatever_the_order_of_writing(tmp_path: Path, order: list[str]) -> None:
    """Every element type, scalars, tensors without elements, and views that are not contiguous."""
    with FolderWriter(tmp_path / "out", plan(TENSORS), LLAMA) as writer:
        for name in order:
            writer.write(name, TENSORS[name])
    assert_equal(load_file(tmp_path / "out" / "model.safetensors"), TENSORS)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "checksums.json",
        "config.json",
        "model.safetensors",
    ]


def test_the_file_is_laid_out_as_the_library_does_it(tmp_path: Path) -> None:
    """Data begin at a multiple of 8 bytes, each tensor at one of its element size; the header bears torch's mark."""
    write(tmp_path / "out", TENSORS)
    path = tmp_path / "out" / "model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    assert (8 + size) % 8 == 0
    for name, field in header.items():
        if name != "__metadata__":
            assert field["data_offsets"][0] % DTYPE_BYTES[field["dtype"]] == 0
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_config_and_further_files_are_written(tmp_path: Path, llama_model: Path) -> None:
    """config.json as given; of the source's files those that belong to a model, not its code or its weights."""
    shutil.copytree(llama_model, tmp_path / "source")
    (tmp_path / "source" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "source" / "modeling_custom.py").write_text("raise SystemExit")
    config = {**LLAMA, "hidden_size": 64, "note": "caf\u00e9"}
    with FolderWriter(tmp_path / "out", [], config) as writer:
        writer.copy_companions(tmp_path / "source")
        writer.add_file("README.md", b"# A card\n")
    out = tmp_path / "out"
    assert json.loads((out / "config.json").read_text(encoding="utf-8")) == config
    assert (out / "README.md").read_bytes() == b"# A card\n"
    copied = ["chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer.model"]
    for name in [*copied, "tokenizer_config.json"]:
        assert (out / name).read_bytes() == (tmp_path / "source" / name).read_bytes()
    assert not (out / "modeling_custom.py").exists()
    assert load_file(out / "model.safetensors") == {}


def test_shards_are_what_transformers_reads(float_model: Path, tmp_path: Path) -> None:
    """No shard is larger than asked unless one tensor is; the index names each tensor's file and the size of all."""
    source = open_checkpoint(float_model)
    entries = [source.entry(name) for name in source.names]
    with FolderWriter(tmp_path / "out", entries, source.config, max_shard_bytes=100_000) as writer:
        for name in source.names:
            writer.copy(name, source)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = {path.name: load_file(path) for path in (tmp_path / "out").glob("*.safetensors")}
    assert len(shards) > 2
    assert set(shards) == {f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)}
    assert index["metadata"]["total_size"] == source.nbytes
    assert index["weight_map"] == {name: file for file, tensors in shards.items() for name in tensors}
    for tensors in shards.values():
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 100_000
    assert torch.equal(logits(tmp_path / "out"), logits(float_model))


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    """Tensors that fill the limit exactly still go into one file."""
    tensors = {"a": torch.ones(10), "b": torch.ones(15)}
    write(tmp_path / "one", tensors, max_shard_bytes=100)
    write(tmp_path / "two", tensors, max_shard_bytes=99)
    assert sorted(f.name for f in (tmp_path / "one").iterdir()) == [
        "checksums.json",
        "config.json",
        "model.safetensors",
    ]
    assert_equal(load_file(tmp_path / "one" / "model.safetensors"), tensors)
    assert_equal(load_file(tmp_path / "two" / "model-00001-of-00002.safetensors"), {"a": tensors["a"]})
    assert_equal(load_file(tmp_path / "two" / "model-00002-of-00002.safetensors"), {"b": tensors["b"]})


def test_linear_weights_are_turned_back_for_gpt2(make_model, tmp_path: Path) -> None:
    """`write` takes them as [out, in], as `read` gives them; the file holds GPT-2's [in, out], and logits are equal."""
    source_folder = make_model(tmp_path / "source", "gpt2")
    source = open_checkpoint(source_folder)
    entries = [source.entry(name) for name in source.names]
    with FolderWriter(tmp_path / "out", entries, source.config) as writer:
        for name in source.names:
            writer.write(name, source.read(name))
    assert_equal(load_file(tmp_path / "out" / "model.safetensors"), load_file(source_folder / "model.safetensors"))
    assert torch.equal(logits(tmp_path / "out"), logits(source_folder))


def test_blocks_are_written_as_they_are(tmp_path: Path) -> None:
    """A packed tensor lies in the file as bytes [rows, row bytes], and is read back as the same blocks."""
    packed = FORMATS["q4_1"].quantize(torch.randn(4, 64, generator=torch.Generator().manual_seed(0)))
    rules = {"quant_method": "quantlab", "rules_version": 1, "rules": [["*", "q4_1"]]}
    config = {**LLAMA, "quantization_config": rules}
    with FolderWriter(tmp_path / "out", [TensorEntry("lm_head.weight", "U8", (4, 40))], config) as writer:
        writer.write_packed("lm_head.weight", packed)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"], packed.blocks)
    read = open_checkpoint(tmp_path / "out").read_packed("lm_head.weight")
    assert torch.equal(read.blocks, packed.blocks)
    assert read.format == packed.format


# What it refuses of its own callers.


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("a", torch.ones(3)), ("a", torch.ones(2, dtype=torch.float16)), ("a", torch.ones(1, 2))],
    ids=["shape", "element type", "dimensions"],
)
def test_a_tensor_that_is_not_as_planned_is_an_error(tmp_path: Path, name: str, tensor: torch.Tensor) -> None:
    with pytest.raises(AssertionError, match="a: not as planned"):
        write_one(tmp_path / "out", name, tensor)
    assert list(tmp_path.iterdir()) == []


def write_one(folder: Path, name: str, tensor: torch.Tensor, times: int = 1) -> None:
    with FolderWriter(folder, [TensorEntry("a", "F32", (2,))], LLAMA) as writer:
        for _ in range(times):
            writer.write(name, tensor)


def test_a_tensor_that_was_never_planned_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="b: not planned"):
        write_one(tmp_path / "out", "b", torch.ones(2))
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_written_twice_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="a: not planned, or written twice"):
        write_one(tmp_path / "out", "a", torch.ones(2), times=2)
    assert list(tmp_path.iterdir()) == []


def test_a_copy_of_another_size_than_planned_is_an_error(llama_model: Path, tmp_path: Path) -> None:
    """It would run into its neighbour."""
    source = open_checkpoint(llama_model)
    entries = [TensorEntry("model.norm.weight", "F32", (63,)), TensorEntry("b", "F32", (4,))]
    with (
        pytest.raises(AssertionError, match=r"model\.norm\.weight: not as planned"),
        FolderWriter(tmp_path / "out", entries, LLAMA) as writer,
    ):
        writer.copy("model.norm.weight", source)
    assert list(tmp_path.iterdir()) == []


def test_a_planned_tensor_that_is_missing_is_an_error(tmp_path: Path) -> None:
    """All of them are named, and no folder appears that lacks them."""
    entries = [TensorEntry(name, "F32", (2,)) for name in ("a", "b", "c")]
    with (
        pytest.raises(AssertionError, match="planned but never written: b, c"),
        FolderWriter(tmp_path / "out", entries, LLAMA) as writer,
    ):
        writer.write("a", torch.ones(2))
    assert list(tmp_path.iterdir()) == []


# Whole or not at all.


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt(), SystemExit(3)])
def test_an_exception_leaves_the_old_folder_and_nothing_beside_it(tmp_path: Path, error: BaseException) -> None:
    """Whatever the exception; it comes out unchanged."""
    write(tmp_path / "out", {"a": torch.ones(4)})
    before = contents(tmp_path)

    def write_and_fail() -> None:
        with FolderWriter(tmp_path / "out", plan(TENSORS), LLAMA, replace=True) as writer:
            writer.write("matrix", TENSORS["matrix"])
            raise error

    with pytest.raises(type(error)) as caught:
        write_and_fail()
    assert caught.value is error
    assert contents(tmp_path) == before


def test_the_old_folder_stays_until_the_block_ends(tmp_path: Path) -> None:
    """Readers see the old content, then the new one."""
    write(tmp_path / "out", {"a": torch.ones(4)})
    before = contents(tmp_path / "out")
    with FolderWriter(tmp_path / "out", plan({"b": torch.ones(2)}), LLAMA, replace=True) as writer:
        writer.write("b", torch.ones(2))
        assert contents(tmp_path / "out") == before
    assert_equal(load_file(tmp_path / "out" / "model.safetensors"), {"b": torch.ones(2)})


def test_replace_swaps_whole_folders(tmp_path: Path) -> None:
    """No shard, index or other file of the old folder is left among the new ones."""
    write(tmp_path / "out", {"a": torch.ones(4), "b": torch.ones(4)}, max_shard_bytes=16)
    (tmp_path / "out" / "old").mkdir()
    (tmp_path / "out" / "old" / "notes.txt").write_text("old")
    write(tmp_path / "out", {"c": torch.ones(4)}, replace=True)
    assert set(contents(tmp_path)) == {"out/checksums.json", "out/config.json", "out/model.safetensors"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "checksums.json",
        "config.json",
        "model.safetensors",
    ]


def test_an_existing_folder_is_refused_without_replace(tmp_path: Path) -> None:
    write(tmp_path / "out", {"a": torch.ones(4)})
    before = contents(tmp_path)
    with pytest.raises(InputError, match=f"{tmp_path / 'out'}: exists already; choose another name"):
        write(tmp_path / "out", {"b": torch.ones(4)})
    assert contents(tmp_path) == before


def test_more_than_the_disk_holds_is_refused_at_the_start(tmp_path: Path) -> None:
    """One line that says how much is needed and how much there is."""
    entries = [TensorEntry("a", "F32", (1 << 60,))]
    message = f"{tmp_path / 'out'}: needs 4611686018\\.43 GB, and the disk has [0-9.]+ GB free"
    with pytest.raises(InputError, match=message), FolderWriter(tmp_path / "out", entries, LLAMA):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("full_after", [0, 1, 3], ids=lambda count: f"{count} writes")
def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_after: int) -> None:
    """While the header is written or a tensor: the system's own error comes out, and the disk has its room back."""
    write_to_disk, calls = os.pwrite, []

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        calls.append(offset)
        if len(calls) > full_after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_to_disk(descriptor, data, offset)

    write(tmp_path / "old", {"a": torch.ones(4)})
    before = contents(tmp_path)
    monkeypatch.setattr(os, "pwrite", pwrite)
    for name in ("old", "new"):
        calls.clear()
        with pytest.raises(OSError, match="No space left on device") as caught:
            write(tmp_path / name, TENSORS, replace=True)
        assert caught.value.errno == errno.ENOSPC
        assert contents(tmp_path) == before


def test_a_write_that_the_system_cuts_short_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux writes at most 2 GiB at a time, and less when it likes."""
    write_to_disk = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: write_to_disk(descriptor, data[:7], offset))
    write(tmp_path / "out", TENSORS)
    assert_equal(load_file(tmp_path / "out" / "model.safetensors"), TENSORS)


def test_an_unknown_family_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="model_type 'bert' is not supported"):
        FolderWriter(tmp_path / "out", [], {"model_type": "bert"})
    assert list(tmp_path.iterdir()) == []
