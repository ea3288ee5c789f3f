"""`verify` finds every flipped bit: by checksum alone the tensor, with the source the block."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantlab import InputError, open_checkpoint, quantize_checkpoint
from quantlab.calibration.verify import verify_checkpoint
from quantlab.checkpoint.checksums import recorded_checksums
from quantlab.checkpoint.export import export_checkpoint
from quantlab.checkpoint.gguf_architectures import head_counts
from quantlab.checkpoint.gguf_file import GgufFile
from quantlab.checkpoint.safetensors_file import SafetensorsFile

BLOCK_BYTES = {"q4_1": 20, "q8_0": 34}


@pytest.fixture(scope="module", params=["folder", "gguf"])
def packed(request, llama_model, tmp_path_factory) -> Path:
    """A quantized model in either kind of file."""
    out = tmp_path_factory.mktemp("packed") / ("model" if request.param == "folder" else "model.gguf")
    quantize_checkpoint(llama_model, out)
    return out


def copied(model: Path, folder: Path) -> Path:
    destination = folder / model.name
    shutil.copytree(model, destination) if model.is_dir() else shutil.copy(model, destination)
    return destination


def weight_file(model: Path) -> Path:
    return model / "model.safetensors" if model.is_dir() else model


def spans(model: Path) -> dict[str, tuple[int, int]]:
    """Where each stored tensor's bytes lie: (begin, end)."""
    file = weight_file(model)
    if model.is_dir():
        opened = SafetensorsFile(file)
        return {n: (opened._offsets[n], opened._offsets[n] + e.nbytes) for n, e in opened.entries.items()}
    return {name: (e.offset, e.offset + e.nbytes) for name, e in GgufFile(file).entries.items()}


def flip(model: Path, position: int, bit: int = 0) -> None:
    file = weight_file(model)
    data = bytearray(file.read_bytes())
    data[position] ^= 1 << bit
    file.write_bytes(data)


def test_a_sound_model_has_no_faults(packed, llama_model):
    report = verify_checkpoint(packed, llama_model)
    assert (report.ok, report.faults) == (True, ())
    assert report.checks == ("structure", "numbers", "source", "checksums")
    assert report.tensors == len(open_checkpoint(packed).names)


@given(data=st.data())
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_bit_is_found_with_its_block(packed, llama_model, tmp_path_factory, data):
    name, (begin, end) = data.draw(st.sampled_from(sorted(spans(packed).items())))
    position, bit = data.draw(st.integers(begin, end - 1)), data.draw(st.integers(0, 7))
    damaged = copied(packed, tmp_path_factory.mktemp("flipped"))
    flip(damaged, position, bit)
    full_name = open_checkpoint(packed).full_name(name)
    alone = verify_checkpoint(damaged)
    assert not alone.ok
    assert {fault.tensor for fault in alone.faults} == {full_name}
    against_source = verify_checkpoint(damaged, llama_model)
    format = open_checkpoint(packed).format(full_name)
    if format is not None:
        rows, columns = open_checkpoint(packed).shape(full_name)
        row, byte = divmod(position - begin, format.row_bytes(columns))
        blocks = [f.block for f in against_source.faults if f.block is not None and "rounding the source" in f.problem]
        assert blocks == [ours(packed, full_name, row, rows) * (columns // 32) + byte // format.block_bytes]
    else:
        assert any("differ from the source" in f.problem or "NaN" in f.problem for f in against_source.faults)


def ours(packed: Path, name: str, stored_row: int, rows: int) -> int:
    """The row that lies at `stored_row` of the file."""
    checkpoint = open_checkpoint(packed)
    order = (
        checkpoint.family.gguf_rows(name, rows, head_counts(checkpoint.config, ""))
        if packed.suffix == ".gguf"
        else None
    )
    return stored_row if order is None else int(order[stored_row])


def forget_checksums(model: Path) -> None:
    if model.is_dir():
        (model / "checksums.json").unlink()
    else:
        model.write_bytes(model.read_bytes().replace(b"quantlab.checksums", b"quantlab.checksumz"))


def test_files_of_other_programs_have_no_checksums(packed, llama_model, tmp_path):
    model = copied(packed, tmp_path)
    forget_checksums(model)
    assert verify_checkpoint(model).checks == ("structure", "numbers")
    begin, _ = spans(model)["model.layers.0.mlp.up_proj.weight" if model.is_dir() else "blk.0.ffn_up.weight"]
    flip(model, begin + 10)
    assert verify_checkpoint(model).ok
    faults = verify_checkpoint(model, llama_model).faults
    assert [(f.tensor, f.block) for f in faults] == [("model.layers.0.mlp.up_proj.weight", 0)]


def test_a_scale_that_is_no_number_is_named_with_its_block(packed, tmp_path):
    model = copied(packed, tmp_path)
    stored = "model.layers.1.mlp.down_proj.weight" if model.is_dir() else "blk.1.ffn_down.weight"
    begin, _ = spans(model)[stored]
    file = weight_file(model)
    data = bytearray(file.read_bytes())
    data[begin + 40 : begin + 42] = np.float16("nan").tobytes()
    file.write_bytes(data)
    faults = verify_checkpoint(model).faults
    assert ("model.layers.1.mlp.down_proj.weight", 2, "its scale is NaN or infinite") in [
        (f.tensor, f.block, f.problem) for f in faults
    ]


def test_a_broken_file_is_a_fault_and_a_missing_one_an_error(packed, tmp_path):
    model = copied(packed, tmp_path)
    file = weight_file(model)
    file.write_bytes(file.read_bytes()[:-7])
    report = verify_checkpoint(model)
    assert (report.ok, report.checks) == (False, ("structure",))
    assert [(f.tensor, f.block) for f in report.faults] == [(None, None)]
    assert str(file) in report.faults[0].problem
    with pytest.raises(InputError, match="no such folder or file"):
        verify_checkpoint(tmp_path / "nothing")


def test_a_record_that_does_not_fit_is_a_fault(packed, tmp_path):
    if packed.is_dir():
        model = copied(packed, tmp_path)
        (model / "checksums.json").write_text('{"model.norm.wight": "0"}')
        report = verify_checkpoint(model)
        assert not report.ok
        assert "records model.norm.wight, which is in no file" in report.faults[0].problem
    else:
        checkpoint = open_checkpoint(packed)
        checkpoint.metadata["quantlab.checksums"] += "0"
        with pytest.raises(InputError, match=r"'quantlab\.checksums' does not fit its \d+ tensors"):
            recorded_checksums(checkpoint)


def test_a_folder_with_tensors_missing_is_a_fault(llama_model, tmp_path):
    from safetensors.torch import load_file, save_file

    model = copied(llama_model, tmp_path)
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, model / "model.safetensors")
    faults = verify_checkpoint(model).faults
    assert [(f.tensor, f.problem) for f in faults] == [("model.layers.1.mlp.up_proj.weight", "is missing")]


def test_the_source_must_be_a_float_model_of_the_same_kind(packed, llama_model, make_model, tmp_path):
    with pytest.raises(InputError, match="is quantized itself"):
        verify_checkpoint(packed, packed)
    other = make_model(tmp_path / "gpt2", "gpt2")
    with pytest.raises(InputError, match="is a gpt2 model"):
        verify_checkpoint(packed, other)
    different = make_model(tmp_path / "other", "llama", seed=1)
    report = verify_checkpoint(packed, different)
    assert not report.ok
    assert any("more blocks" in fault.problem for fault in report.faults)


def test_float_exports_verify_against_their_source(llama_model, tmp_path):
    export_checkpoint(llama_model, tmp_path / "float.gguf", "gguf")
    assert verify_checkpoint(tmp_path / "float.gguf", llama_model).ok


def test_calibrated_blocks_need_only_be_near_the_source(llama_model, make_model, prose, tmp_path):
    """They cannot be derived again; another model's are far away all the same. Through both kinds of file."""
    from quantlab.calibration.calibrated import CalibrationOptions
    from quantlab.calibration.samples import CalibrationRequest

    options = CalibrationOptions(request=CalibrationRequest(prose, samples=16, length=64))
    quantize_checkpoint(llama_model, tmp_path / "out", method="search", calibration=options)
    export_checkpoint(tmp_path / "out", tmp_path / "out.gguf", "gguf")
    export_checkpoint(tmp_path / "out.gguf", tmp_path / "back", "hf")
    other = make_model(tmp_path / "other", "llama", seed=1)
    for made in ("out", "out.gguf", "back"):
        assert verify_checkpoint(tmp_path / made, llama_model).ok
        faults = verify_checkpoint(tmp_path / made, other).faults
        assert any(
            "is not the source's tensor quantized: its relative error is 1." in fault.problem for fault in faults
        )
    records = [open_checkpoint(tmp_path / made).sidecar("calibration") for made in ("out", "out.gguf", "back")]
    assert records[0] == records[1] == records[2]
    assert records[0]["tokens"] > 512
