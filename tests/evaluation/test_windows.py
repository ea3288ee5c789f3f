"""Windows over a text: every token is scored once, behind as much of its document as was asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from quantlab.checkpoint import Tokenizer, load_tokenizer
from quantlab.errors import InputError
from quantlab.evaluation.windows import MAX_BATCH, MAX_LOGITS, Window, batches, scored_positions, text_windows
from quantlab.training.corpus import read_documents

SETTINGS = [(2, None), (3, None), (17, None), (128, None), (5000, None), (2, 1), (17, 1), (17, 5), (17, 16), (128, 60)]


@pytest.fixture(params=[True, False], ids=["start token", "no start token"])
def tokenizer(request: pytest.FixtureRequest, tokenizer_folder: Path) -> Tokenizer:
    """One that puts <s> before every text, as Llama's, and one that puts nothing there, as GPT-2's."""
    loaded = load_tokenizer(tokenizer_folder)
    return loaded if request.param else Tokenizer(loaded.backend, None, loaded.eos)


def text_file(folder: Path, *documents: str) -> Path:
    path = folder / "text.txt"
    path.write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    return path


# Worked examples: seven tokens t, four in a window.


def seven_tokens(tokenizer: Tokenizer) -> tuple[str, list[int]]:
    text = "zzzzzz"  # its space, and six letters
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == 7
    return text, ids


def test_windows_with_a_start_token(tokenizer_folder: Path, tmp_path: Path) -> None:
    """Each begins with it; all seven tokens are scored."""
    tokenizer = load_tokenizer(tokenizer_folder)
    text, t = seven_tokens(tokenizer)
    s = tokenizer.bos
    path = text_file(tmp_path, text)
    assert text_windows(path, tokenizer, 4) == [
        Window((s, t[0], t[1], t[2]), 3),
        Window((s, t[3], t[4], t[5]), 3),
        Window((s, t[6]), 1),
    ]
    assert text_windows(path, tokenizer, 4, stride=2) == [
        Window((s, t[0], t[1], t[2]), 3),
        Window((s, t[2], t[3], t[4]), 2),
        Window((s, t[4], t[5], t[6]), 2),
    ]


def test_windows_without_a_start_token(tokenizer_folder: Path, tmp_path: Path) -> None:
    """Each begins with a token that the window before has scored; the document's first one is never scored."""
    loaded = load_tokenizer(tokenizer_folder)
    tokenizer = Tokenizer(loaded.backend, None, loaded.eos)
    text, t = seven_tokens(tokenizer)
    path = text_file(tmp_path, text)
    assert text_windows(path, tokenizer, 4) == [
        Window((t[0], t[1], t[2], t[3]), 3),
        Window((t[3], t[4], t[5], t[6]), 3),
    ]
    assert text_windows(path, tokenizer, 4, stride=2) == [
        Window((t[0], t[1], t[2], t[3]), 3),
        Window((t[2], t[3], t[4], t[5]), 2),
        Window((t[3], t[4], t[5], t[6]), 1),
    ]


# Properties, on the project's prose.


def targets(windows: list[Window]) -> list[int]:
    return [token for window in windows for token in window.ids[len(window.ids) - window.scored :]]


@pytest.mark.parametrize(("context", "stride"), SETTINGS)
def test_every_token_is_scored_once_and_in_order(
    tokenizer: Tokenizer, prose: Path, context: int, stride: int | None
) -> None:
    """Without a start token, all but each document's first."""
    first = 0 if tokenizer.bos is not None else 1
    expected = [
        token
        for document in read_documents(prose)
        for token in tokenizer.encode(document, add_special_tokens=False)[first:]
    ]
    assert targets(text_windows(prose, tokenizer, context, stride)) == expected


@pytest.mark.parametrize(("context", "stride"), SETTINGS)
def test_a_window_is_a_piece_of_one_document(
    tokenizer: Tokenizer, prose: Path, context: int, stride: int | None
) -> None:
    """Without gaps, at most `context` long, and with at least `context - stride` tokens before each scored one."""
    windows = iter(text_windows(prose, tokenizer, context, stride))
    for document in read_documents(prose):
        text = tokenizer.encode(document)
        scored_until = 1
        while scored_until < len(text):
            window = next(windows)
            assert 1 <= window.scored < len(window.ids) <= context
            since, scored_until = scored_until, scored_until + window.scored
            begin = scored_until - len(window.ids)  # where in the text the window's first token would be
            assert list(window.ids[1:]) == text[begin + 1 : scored_until]
            assert window.ids[0] == (text[begin] if tokenizer.bos is None else tokenizer.bos)
            if stride is not None:
                assert since - begin >= min(since, context - stride)
    assert next(windows, None) is None


def test_documents_are_parted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Two documents in one file give the windows of each; the line that parts them is no text."""
    one, two = "The lamp was lit.", "Nobody had the key."
    both = text_windows(text_file(tmp_path, one, two), tokenizer, 8)
    apart = [window for text in (one, two) for window in text_windows(text_file(tmp_path, text), tokenizer, 8)]
    assert both == apart


# What goes through the model at once.


def test_batches_hold_windows_of_one_length_and_each_window_once(tokenizer: Tokenizer, prose: Path) -> None:
    """The longest first, so that a lack of memory shows at once."""
    windows = text_windows(prose, tokenizer, 33)
    groups = list(batches(windows, 512))
    lengths = [len(group[0].ids) for group in groups]
    assert lengths == sorted(lengths, reverse=True)
    for group in groups:
        assert len({len(window.ids) for window in group}) == 1
        assert len(group) <= MAX_BATCH
    assert sorted(w.ids for group in groups for w in group) == sorted(w.ids for w in windows)
    assert max(len(group) for group in groups) == MAX_BATCH


def test_a_batch_of_logits_keeps_within_its_limit() -> None:
    """However large the vocabulary; a single window that is larger goes alone."""
    windows = [Window((1,) * 1024, 1023)] * 5
    assert [len(group) for group in batches(windows, MAX_LOGITS // 1024 // 2)] == [2, 2, 1]
    assert [len(group) for group in batches(windows, MAX_LOGITS)] == [1] * 5


def test_scored_positions_are_those_before_the_targets() -> None:
    """Logits at a token predict the next: of five positions, 2 and 3 predict the last two tokens."""
    logits = np.arange(15.0).reshape(5, 3)
    picked, wanted = scored_positions(logits, Window((9, 8, 7, 6, 5), 2))
    assert np.array_equal(picked, logits[2:4])
    assert wanted.tolist() == [6, 5]
    picked, wanted = scored_positions(logits, Window((9, 8, 7, 6, 5), 4))
    assert np.array_equal(picked, logits[:4])
    assert wanted.tolist() == [8, 7, 6, 5]


# What is refused.


@pytest.mark.parametrize("context", [1, 0, -5])
def test_a_context_without_room_for_a_target_is_refused(tokenizer: Tokenizer, prose: Path, context: int) -> None:
    with pytest.raises(InputError, match=f"context {context}: at least 2 tokens are needed"):
        text_windows(prose, tokenizer, context)


@pytest.mark.parametrize("stride", [0, -1, 16, 100])
def test_a_stride_beyond_the_context_is_refused(tokenizer: Tokenizer, prose: Path, stride: int) -> None:
    """It would leave tokens out."""
    message = rf"stride {stride}: must be at least 1 and at most the context less one \(15\)"
    with pytest.raises(InputError, match=message):
        text_windows(prose, tokenizer, 16, stride)


@pytest.mark.parametrize("content", ["", "\n\n", "<|endoftext|>\n\n<|endoftext|>\n"])
def test_a_text_without_text_is_refused(tokenizer: Tokenizer, tmp_path: Path, content: str) -> None:
    path = tmp_path / "text.txt"
    path.write_text(content)
    with pytest.raises(InputError, match=f"{path}: holds no text"):
        text_windows(path, tokenizer, 16)


def test_a_single_token_without_anything_before_it_is_too_short(tokenizer_folder: Path, tmp_path: Path) -> None:
    loaded = load_tokenizer(tokenizer_folder)
    path = text_file(tmp_path, "a")
    assert len(loaded.encode("a", add_special_tokens=False)) == 1
    assert len(text_windows(path, loaded, 16)) == 1
    with pytest.raises(InputError, match=f"{path}: too short, no token can be scored"):
        text_windows(path, Tokenizer(loaded.backend, None, loaded.eos), 16)


def test_a_missing_text_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{tmp_path / 'none'}: cannot be read"):
        text_windows(tmp_path / "none", tokenizer, 16)
