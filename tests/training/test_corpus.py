"""Text files become documents, documents a stream of tokens, and the stream training windows in a fixed order."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from quantlab.errors import InputError
from quantlab.training.corpus import (
    WindowSampler,
    evaluation_batches,
    open_corpus,
    read_documents,
    token_stream,
)

BOS, EOS = 1, 2


def written(folder: Path, content: str | bytes, name: str = "text.txt") -> Path:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        ("one", ["one"]),
        ("one\n<|endoftext|>\ntwo\n", ["one", "two"]),
        ("one\n<|endoftext|>\ntwo\n<|endoftext|>", ["one", "two"]),
        ("<|endoftext|>\none\n", ["one"]),
        ("one\n<|endoftext|>\n<|endoftext|>\n\n<|endoftext|>\ntwo", ["one", "two"]),
        ("\n\none\n\nstill one\n\n<|endoftext|>\n", ["one\n\nstill one"]),
        ("  indented\n<|endoftext|>\n   \n", ["  indented"]),
        ("not <|endoftext|> here\n <|endoftext|>\nnor here", ["not <|endoftext|> here\n <|endoftext|>\nnor here"]),
    ],
)
def test_a_line_that_holds_only_the_marker_parts_documents(tmp_path: Path, text: str, documents: list[str]) -> None:
    """Blank documents vanish, blank lines inside a document stay, and the marker within a line is ordinary text."""
    assert read_documents(written(tmp_path, text)) == documents


def test_prose_holds_eight_documents_and_loses_nothing(prose: Path) -> None:
    """Documents and markers put together again are the file."""
    documents = read_documents(prose)
    assert len(documents) == 8
    assert "".join(f"{document}\n<|endoftext|>\n" for document in documents) == prose.read_text(encoding="utf-8")


def test_gzip_reads_as_the_plain_file_does(tmp_path: Path, prose: Path) -> None:
    """The suffix .gz says that the file is compressed."""
    packed = written(tmp_path, gzip.compress(prose.read_bytes(), mtime=0), "prose.txt.gz")
    assert read_documents(packed) == read_documents(prose)


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("latin.txt", "caf\u00e9 au lait".encode("latin-1"), "not UTF-8 text (byte 3)"),
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n\n<|endoftext|>\n\t\n", "holds no text"),
        ("plain.txt.gz", b"not compressed at all", "cannot be read"),
        ("cut.txt.gz", gzip.compress(b"a text that was cut short" * 9, mtime=0)[:-12], "cannot be read"),
        ("damaged.txt.gz", gzip.compress(b"damaged", mtime=0)[:10] + b"\xff" * 20, "cannot be read"),
    ],
)
def test_unusable_files_are_named_with_their_fault(tmp_path: Path, name: str, content: bytes, fault: str) -> None:
    """Bad encodings, empty texts and broken gzip are input errors of one line that begins with the file."""
    file = written(tmp_path, content, name)
    with pytest.raises(InputError) as caught:
        read_documents(file)
    assert str(caught.value).startswith(f"{file}: {fault}")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """Neither a file nor a folder: the message says what to give."""
    with pytest.raises(InputError, match=r"nothing\.txt: cannot be read"):
        read_documents(tmp_path / "nothing.txt")
    with pytest.raises(InputError, match=r"nothing: no such file or folder; give a text file or a folder"):
        open_corpus(tmp_path / "nothing")


def test_a_folder_offers_its_splits_and_a_file_is_all_training(tmp_path: Path) -> None:
    """Plain or gzipped, `valid` for `validation`; the plain file wins; what is absent is None."""
    written(tmp_path, "a", "train.txt.gz")
    with_train = open_corpus(tmp_path)
    assert (with_train.train, with_train.validation, with_train.test) == (tmp_path / "train.txt.gz", None, None)
    for name in ("train.txt", "valid.txt", "test.txt.gz"):
        written(tmp_path, "a", name)
    corpus = open_corpus(tmp_path)
    assert [file and file.name for file in (corpus.train, corpus.validation, corpus.test)] == [
        "train.txt",
        "valid.txt",
        "test.txt.gz",
    ]
    alone = open_corpus(tmp_path / "valid.txt")
    assert (alone.train, alone.validation, alone.test) == (tmp_path / "valid.txt", None, None)


def test_a_folder_without_training_text_is_refused(tmp_path: Path) -> None:
    """The message names what the folder lacks."""
    written(tmp_path, "a", "test.txt")
    with pytest.raises(InputError, match=r"holds no train\.txt or train\.txt\.gz"):
        open_corpus(tmp_path)


@pytest.mark.parametrize(("size", "dtype"), [(256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.uint32)])
def test_the_stream_takes_the_smallest_type_that_holds_every_id(size: int, dtype: type) -> None:
    """Each document stands between its start and its end token; the largest id survives."""
    stream = token_stream([[5, size - 1], [], [7]], size, BOS, EOS)
    assert stream.dtype == dtype
    assert stream.tolist() == [BOS, 5, size - 1, EOS, BOS, EOS, BOS, 7, EOS]


LENGTHS = pytest.mark.parametrize(("length", "context"), [(1000, 16), (1003, 16), (64, 32), (97, 33), (500, 2)])


def sampler(length: int = 1000, context: int = 16, seed: int = 0) -> WindowSampler:
    """Windows over a stream whose tokens are their own positions, shifted past the special ids."""
    return WindowSampler(np.arange(10, 10 + length, dtype=np.uint16), context, BOS, seed)


@LENGTHS
def test_a_window_is_the_start_token_and_consecutive_tokens(length: int, context: int) -> None:
    """Every window of three epochs lies inside the stream, as int64 for the model."""
    windows = sampler(length, context)
    batch = windows.batch(0, 3 * windows.windows_per_epoch)
    assert batch.dtype == np.int64
    assert batch.shape == (3 * windows.windows_per_epoch, context)
    assert (batch[:, 0] == BOS).all()
    assert (np.diff(batch[:, 1:]) == 1).all()
    assert batch[:, 1].min() >= 10
    assert batch[:, -1].max() < 10 + length


@LENGTHS
def test_an_epoch_visits_each_of_its_windows_once(length: int, context: int) -> None:
    """Within an epoch no token appears twice, and fewer than two windows' worth of tokens are left out."""
    windows = sampler(length, context)
    for epoch in range(3):
        tokens = windows.batch(epoch * windows.windows_per_epoch, windows.windows_per_epoch)[:, 1:].ravel()
        assert len(np.unique(tokens)) == len(tokens)
        assert len(tokens) > length - 2 * (context - 1)
        ordered = np.sort(tokens)
        assert ordered[-1] - ordered[0] + 1 == len(tokens)  # what is left out lies at the ends


def test_epochs_differ_in_grid_and_order() -> None:
    """Another epoch is another shift and another permutation, so the model does not see the same windows again."""
    windows = sampler()
    per_epoch = windows.windows_per_epoch
    starts = windows.batch(0, 6 * per_epoch)[:, 1].reshape(6, per_epoch)
    assert len({tuple(epoch) for epoch in starts}) == 6
    assert len({int(epoch[0] - 10) % 15 for epoch in starts}) > 1
    assert not any((np.diff(epoch) == 15).all() for epoch in starts)


def test_a_batch_is_a_pure_function_of_its_index() -> None:
    """A sampler asked for one late batch gives what another gives after all the batches before: resuming is exact."""
    walked, fresh = sampler(), sampler()
    count = 4 * walked.windows_per_epoch // 7
    batches = [walked.batch(7 * index, 7) for index in range(count)]
    for index in (count - 1, 0, count // 2, 1):
        assert np.array_equal(fresh.batch(7 * index, 7), batches[index])
    assert np.array_equal(fresh.batch(0, 7 * count), np.concatenate(batches))


def test_another_seed_is_another_order() -> None:
    """The order comes from the seed; the same seed gives the same order again."""
    first = sampler(seed=0).batch(0, 40)
    assert np.array_equal(first, sampler(seed=0).batch(0, 40))
    assert not np.array_equal(first, sampler(seed=1).batch(0, 40))


def test_a_stream_shorter_than_two_contexts_is_refused() -> None:
    """The message gives the number of tokens there are and the number needed; that number is enough."""
    assert sampler(length=32, context=16).batch(0, 5).shape == (5, 16)
    with pytest.raises(InputError, match="has 31 tokens; at least 32 are needed"):
        sampler(length=31, context=16)


def test_evaluation_windows_are_consecutive_and_complete() -> None:
    """By hand: 23 tokens make three windows of seven after the start token; the last two tokens are left out."""
    batches = evaluation_batches(np.arange(100, 123, dtype=np.uint8), 8, 2, BOS)
    expected = [[BOS, *range(100, 107)], [BOS, *range(107, 114)], [BOS, *range(114, 121)]]
    assert [batch.tolist() for batch in batches] == [expected[:2], expected[2:]]
