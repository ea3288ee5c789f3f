"""Tensors that writers take in pieces, and work that they go on with."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from quantlab.checkpoint import open_checkpoint, open_writer
from quantlab.checkpoint.export import packed_config


def written(folder, checkpoint, name, pieces, **options):
    """A copy of a checkpoint, tensor by tensor, in `pieces` of so many bytes (None: as a whole)."""
    entries = [checkpoint.entry(tensor) for tensor in checkpoint.names]
    with open_writer(folder / name, entries, packed_config(checkpoint), companions=checkpoint, **options) as writer:
        for entry in entries:
            if pieces is None:
                writer.copy(entry.name, checkpoint)
                continue
            data = checkpoint.read_bytes(entry.name)
            with writer.pieces(entry.name) as take:
                for start in range(0, data.nbytes, pieces):
                    take(data[start : start + pieces])
    return folder / name


@pytest.mark.parametrize("name", ["out", "out.gguf"])
def test_pieces_make_the_same_files(name, float_model, tmp_path):
    """Transposed and permuted tensors too, which have to be complete before they are written."""
    checkpoint = open_checkpoint(float_model)
    (tmp_path / "whole").mkdir()
    (tmp_path / "pieces").mkdir()
    whole = written(tmp_path / "whole", checkpoint, name, None)
    pieces = written(tmp_path / "pieces", checkpoint, name, 1000)
    for file in whole.iterdir() if whole.is_dir() else [whole]:
        assert file.read_bytes() == (pieces / file.name if pieces.is_dir() else pieces).read_bytes()


class PowerCutError(BaseException):
    """Ends everything, as a kill does."""


def test_a_tensor_that_breaks_off_is_not_written(llama_model, tmp_path):
    checkpoint = open_checkpoint(llama_model)
    entries = [checkpoint.entry(name) for name in checkpoint.names]

    def break_off() -> None:
        with open_writer(tmp_path / "out", entries, packed_config(checkpoint)) as writer:
            for entry in entries[1:]:
                writer.copy(entry.name, checkpoint)
            with contextlib.suppress(PowerCutError), writer.pieces(entries[0].name) as take:
                take(np.zeros(4, np.uint8))
                raise PowerCutError

    with pytest.raises(AssertionError, match=f"planned but never written: {entries[0].name}"):
        break_off()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["out", "out.gguf"])
def test_unfinished_work_is_gone_on_with(name, llama_model, tmp_path):
    checkpoint = open_checkpoint(llama_model)
    expected = written(tmp_path, checkpoint, f"expected-{name}", None)
    entries = [checkpoint.entry(tensor) for tensor in checkpoint.names]
    unfinished, destination, recorded = tmp_path / "unfinished", tmp_path / name, {}

    def writer():
        return open_writer(
            destination, entries, packed_config(checkpoint), companions=checkpoint, unfinished=unfinished
        )

    with contextlib.suppress(PowerCutError), writer() as first:
        for entry in entries[:4]:
            first.copy(entry.name, checkpoint)
            recorded[entry.name] = first.stored_checksum(entry.name)
        raise PowerCutError
    assert unfinished.exists()
    assert not destination.exists()
    with writer() as second:
        for entry in entries:
            checksum = recorded.get(entry.name, "0" * 16)
            assert second.take_up(entry.name, checksum) == (entry.name in recorded)
            if entry.name not in recorded:
                second.copy(entry.name, checkpoint)
    assert not unfinished.exists()
    for file in expected.iterdir() if expected.is_dir() else [expected]:
        assert file.read_bytes() == (destination / file.name if destination.is_dir() else destination).read_bytes()
