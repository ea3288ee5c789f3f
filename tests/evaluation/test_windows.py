"""Windows over a text: every token is scored once, behind as much of its document as was asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from quantlab.checkpoint import Tokenizer, load_tokenizer
from quantlab.documents import read_documents
from quantlab.errors import InputError
from quantlab.evaluation.windows import Window, llama_windows, text_windows, windows_of

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
        Window((s, t[0], t[1], t[2]), 3, 0, 0),
        Window((s, t[3], t[4], t[5]), 3, 0, 3),
        Window((s, t[6]), 1, 0, 6),
    ]
    assert text_windows(path, tokenizer, 4, stride=2) == [
        Window((s, t[0], t[1], t[2]), 3, 0, 0),
        Window((s, t[2], t[3], t[4]), 2, 0, 3),
        Window((s, t[4], t[5], t[6]), 2, 0, 5),
    ]


def test_windows_without_a_start_token(tokenizer_folder: Path, tmp_path: Path) -> None:
    """Each begins with a token that the window before has scored; the document's first one is never scored."""
    loaded = load_tokenizer(tokenizer_folder)
    tokenizer = Tokenizer(loaded.backend, None, loaded.eos)
    text, t = seven_tokens(tokenizer)
    path = text_file(tmp_path, text)
    assert text_windows(path, tokenizer, 4) == [
        Window((t[0], t[1], t[2], t[3]), 3, 0, 1),
        Window((t[3], t[4], t[5], t[6]), 3, 0, 4),
    ]
    assert text_windows(path, tokenizer, 4, stride=2) == [
        Window((t[0], t[1], t[2], t[3]), 3, 0, 1),
        Window((t[2], t[3], t[4], t[5]), 2, 0, 4),
        Window((t[3], t[4], t[5], t[6]), 1, 0, 6),
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
    first, second = (text_windows(text_file(tmp_path, text), tokenizer, 8) for text in (one, two))
    assert both == first + [replace(window, document=1) for window in second]


def test_places_count_the_tokens_of_a_document(tokenizer: Tokenizer, prose: Path) -> None:
    """A window's first target is the document's token of that number, the start token not counted."""
    documents = [tokenizer.encode(document, add_special_tokens=False) for document in read_documents(prose)]
    for window in text_windows(prose, tokenizer, 33, 20):
        ids = documents[window.document]
        assert tuple(ids[window.position : window.position + window.scored]) == window.targets


# As llama.cpp cuts texts.


def test_llama_windows_score_second_halves(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Worked by hand: contexts of 6 over all tokens, the start token first and in the place of each context's first
    token; the last two of each are scored (6 - 1 - 3), the incomplete context at the end is left out.
    """
    text = "The lamp was lit and nobody had the key.\n<|endoftext|>\nA pike"
    path = tmp_path / "text.txt"
    path.write_text(text + "\n")
    ids = tokenizer.encode(text)  # <|endoftext|> is none of this vocabulary's tokens
    lead = 0 if tokenizer.bos is None else 1
    windows = llama_windows(path, tokenizer, 6)
    assert len(windows) == len(ids) // 6 >= 3
    assert len(ids) % 6
    for number, window in enumerate(windows):
        piece = ids[6 * number : 6 * number + 6]
        first = piece[0] if tokenizer.bos is None else tokenizer.bos
        assert window == Window((first, *piece[1:]), 2, 0, 6 * number + 4 - lead)


def test_llama_windows_read_names_of_special_tokens_as_letters(tokenizer_folder: Path, tmp_path: Path) -> None:
    """As llama.cpp does with a text; the tokenizer is as before afterwards."""
    tokenizer = load_tokenizer(tokenizer_folder)
    path = tmp_path / "text.txt"
    path.write_text("</s>" * 20)
    special = tokenizer.backend.token_to_id("</s>")
    assert special in tokenizer.encode("</s>")
    assert not any(special in window.ids for window in llama_windows(path, tokenizer, 8))
    assert special in tokenizer.encode("</s>")


def test_a_text_of_less_than_two_llama_contexts_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = text_file(tmp_path, "The lamp was lit.")
    count = len(tokenizer.encode("The lamp was lit."))
    with pytest.raises(InputError, match=f"{path}: too short, {count} tokens; two contexts of {count} are needed"):
        llama_windows(path, tokenizer, count)
    with pytest.raises(InputError, match="context 3: at least 4 tokens are needed to score the second half"):
        llama_windows(path, tokenizer, 3)


def test_kinds_of_windows(tokenizer: Tokenizer, prose: Path) -> None:
    assert windows_of(prose, tokenizer, 33, 20) == text_windows(prose, tokenizer, 33, 20)
    assert windows_of(prose, tokenizer, 33, kind="llama") == llama_windows(prose, tokenizer, 33)
    with pytest.raises(InputError, match="llama windows have no stride; leave it out"):
        windows_of(prose, tokenizer, 33, 20, "llama")
    with pytest.raises(InputError, match="windows 'other': choose one of: documents, llama"):
        windows_of(prose, tokenizer, 33, kind="other")


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


@pytest.mark.parametrize("kind", ["documents", "llama"])
def test_zero_bytes_are_no_text(tokenizer: Tokenizer, tmp_path: Path, kind: str) -> None:
    """They are UTF-8, so nothing else would notice a binary file of many zeros."""
    path = tmp_path / "text.txt"
    path.write_bytes(b"text\0more" * 100)
    with pytest.raises(InputError, match=f"{path}: not a text file \\(it holds zero bytes\\)"):
        windows_of(path, tokenizer, 16, kind=kind)


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
