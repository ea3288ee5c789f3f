"""Tokenizers from GGUF metadata: ids told by hand."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from gguf_tokens import MERGES, PIECES
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_vocabularies import (
    ALPHABET,
    BYTE,
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    byte_level_vocabulary,
    sentencepiece_vocabulary,
)

from quantlab.checkpoint import load_tokenizer
from quantlab.checkpoint.gguf_bpe import byte_letters
from quantlab.checkpoint.gguf_tokenizer import tokenizer_from_metadata


def tokens_of(metadata: dict[str, Any], text: str) -> list[str]:
    """The tokens of a text, the start token left out."""
    ids = tokenizer_from_metadata(metadata, "f").encode(text, add_special_tokens=False)
    return [metadata["tokenizer.ggml.tokens"][i] for i in ids]


def decoded(metadata: dict[str, Any], text: str) -> str:
    tokenizer = tokenizer_from_metadata(metadata, "f")
    return tokenizer.decode(tokenizer.encode(text))


# SentencePiece.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("a", ["\u2581a"]),
        ("ab", ["\u2581", "ab"]),  # "ab" ranks before "_a"
        ("b", ["\u2581", "b"]),
        (" a", ["\u2581", "\u2581a"]),
        ("  a", ["\u2581\u2581", "\u2581a"]),
        ("ba", ["\u2581", "ba"]),
        ("c c", ["\u2581", "c", "\u2581", "c"]),
        ("x\n", ["\u2581", "<0x78>", "<0x0A>"]),
        ("c\u00e9", ["\u2581", "c", "<0xC3>", "<0xA9>"]),
        ("c\U0001f600", ["\u2581", "c", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]),
        ("<0x41>", ["\u2581", *(f"<0x{byte:02X}>" for byte in b"<0x41>")]),
        ("cab", ["\u2581", "c", "ab"]),
    ],
)
def test_pieces_merge_by_score(text: str, expected: list[str]) -> None:
    """The score decides, not the place in the file; what is no piece becomes bytes."""
    pieces = {piece: score for piece, score in PIECES.items() if piece not in ("aba", "\u2581ab")}
    metadata = sentencepiece_vocabulary(pieces)
    assert tokens_of(metadata, text) == expected
    assert decoded(metadata, text) == text


def test_any_two_pieces_that_make_a_piece_merge() -> None:
    """SentencePiece knows no list of merges: aba is ab + a and a + ba."""
    assert tokens_of(sentencepiece_vocabulary(PIECES), "caba") == ["\u2581", "c", "aba"]
    without_ab = {**PIECES, "ab": -100.0}
    assert tokens_of(sentencepiece_vocabulary(without_ab), "caba") == ["\u2581", "c", "aba"]
    assert tokens_of(sentencepiece_vocabulary(PIECES), "ab") == ["\u2581ab"]


@pytest.mark.parametrize("count", range(1, 9))
def test_of_equal_merges_the_leftmost_is_first(count: int) -> None:
    metadata = sentencepiece_vocabulary({"aa": -1.0, "\u2581": -2.0, "a": -3.0})
    assert tokens_of(metadata, "a" * count) == ["\u2581", *["aa"] * (count // 2), *["a"] * (count % 2)]


def test_a_file_may_want_no_space_before_a_text() -> None:
    metadata = sentencepiece_vocabulary(PIECES, add_space_prefix=False)
    assert tokens_of(metadata, "ab") == ["ab"]
    assert tokens_of(metadata, " ab") == ["\u2581ab"]
    assert [decoded(metadata, text) for text in ("ab", " ab", "  ab")] == ["ab", " ab", "  ab"]


def test_special_tokens_are_found_in_a_text_and_start_anew() -> None:
    """A space goes before what follows one, as before a text."""
    metadata = sentencepiece_vocabulary(PIECES)
    assert tokens_of(metadata, "a</s>a <unk>") == ["\u2581a", "</s>", "\u2581a", "\u2581", "<unk>"]
    tokenizer = tokenizer_from_metadata(metadata, "f")
    assert tokenizer.decode([1, *tokenizer.encode("a", add_special_tokens=False), 2]) == "a"
    assert tokenizer.decode([1, 260, 2], skip_special_tokens=False) == "<s> a</s>"


def test_the_longest_user_defined_token_wins() -> None:
    """They are text, and stay when special tokens are left out."""
    metadata = sentencepiece_vocabulary(PIECES, {"\n": USER_DEFINED, "\n\n\n": USER_DEFINED, "\n\n": USER_DEFINED})
    assert tokens_of(metadata, "\n\n\n\n\nc") == ["\n\n\n", "\n\n", "\u2581", "c"]
    assert decoded(metadata, "c\n\nc") == "c\n\n c"  # the space before a text is SentencePiece's


def test_phi_3_swallows_spaces_behind_special_tokens() -> None:
    """No key says so; llama.cpp goes by the model's name."""
    metadata = sentencepiece_vocabulary(PIECES, {"<|end|>": CONTROL, "<|x|>": USER_DEFINED, "<|endoftext|>": CONTROL})
    text = "<|end|> \n a<|x|>  a<|endoftext|> a"
    assert tokens_of({**metadata, "general.name": "Phi 3"}, text) == tokens_of(metadata, text)
    expected = ["<|end|>", "\u2581a", "<|x|>", "\u2581a", "<|endoftext|>", "\u2581", "\u2581a"]
    assert tokens_of({**metadata, "general.name": "Phi-3 mini"}, text) == expected


def test_byte_tokens_make_characters_again() -> None:
    tokenizer = tokenizer_from_metadata(sentencepiece_vocabulary(PIECES), "f")
    smile = [3 + byte for byte in "\U0001f600".encode()]
    assert tokenizer.decode([*smile, 3 + 0x41]) == "\U0001f600A"
    assert tokenizer.decode(smile[:2]) == "\ufffd\ufffd"


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text("ab c\u2581\n\u00e9<>0xF", max_size=30))
def test_merging_is_sentencepieces_rule(text: str) -> None:
    """Spelt out: of all neighbours that make a piece, those with the best score merge, the leftmost of equals."""
    metadata = sentencepiece_vocabulary(PIECES)
    scores = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"].tolist(), strict=True))
    symbols = list(f"\u2581{text}".replace(" ", "\u2581")) if text else []
    while True:
        joined = [(-scores[a + b], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in scores]
        if not joined:
            break
        _, at = min(joined)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    expected = []
    for symbol in symbols:
        expected += [symbol] if symbol in scores else [f"<0x{byte:02X}>" for byte in symbol.encode()]
    assert tokens_of(metadata, text) == expected


# Byte-level BPE.


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("gpt-2", "hello  we's", ["hell", "o", "\u0120", "\u0120w", "e", "'s"]),
        ("gpt-2", "abc bc", ["ab", "c", "\u0120", "bc"]),  # ab is merged before bc, wherever it stands
        ("gpt-2", "1234\n\n", ["123", "4", "\u010a\u010a"]),
        ("llama-bpe", "1212123", ["12", "1", "2", "12", "3"]),  # 121 212 3
        ("qwen2", "1234", ["1", "2", "3", "4"]),
        ("starcoder", "12 12", ["1", "2", "\u0120", "1", "2"]),
        ("gpt-2", "hell\u00e9", ["hell", "\u00c3", "\u00a9"]),
        ("default", "1234", ["123", "4"]),
        (None, "1234", ["123", "4"]),
    ],
)
def test_words_are_cut_before_merges(pre: str | None, text: str, expected: list[str]) -> None:
    metadata = byte_level_vocabulary(MERGES, pre)
    assert tokens_of(metadata, text) == expected
    assert decoded(metadata, text) == text


@pytest.mark.parametrize(("pre", "expected"), [("llama-bpe", ["abc"]), ("dbrx", ["ab", "c"])])
def test_some_kinds_take_a_word_that_is_a_token_whole(pre: str, expected: list[str]) -> None:
    """Both cut alike; llama-bpe ignores merges there."""
    metadata = byte_level_vocabulary("a b, b c, a bc", pre)
    assert tokens_of(metadata, "abc") == expected


def test_bytes_are_written_in_gpt2s_letters() -> None:
    """The library's own alphabet, in the order of bytes: decoding a letter gives the byte."""
    assert sorted(byte_letters()) == ALPHABET
    metadata = byte_level_vocabulary("")
    for text in ("\x00", " ", "~", "\u00ad", "\u00e9", "\u20ac"):
        assert tokens_of(metadata, text) == [byte_letters()[byte] for byte in text.encode()]


def test_a_byte_without_token_is_dropped_and_parts_its_neighbours() -> None:
    """Falcon's vocabulary lacks control characters, for one."""
    metadata = byte_level_vocabulary("= =", "gpt-2")
    for name in ("tokens", "token_type"):
        values = metadata[f"tokenizer.ggml.{name}"]
        at = ALPHABET.index(byte_letters()[0x01])
        metadata[f"tokenizer.ggml.{name}"] = [value for i, value in enumerate(values) if i != at]
    assert tokens_of(metadata, "==\x01") == ["=="]
    assert tokens_of(metadata, "=\x01=") == ["=", "="]


def test_added_letters_are_text_and_no_bytes() -> None:
    """DeepSeek lists the letters of bytes that no text has, as tokens of their own."""
    metadata = byte_level_vocabulary("")
    at = ALPHABET.index("\u00f5")
    metadata["tokenizer.ggml.token_type"][at] = USER_DEFINED
    tokenizer = tokenizer_from_metadata(metadata, "f")
    assert tokenizer.encode("a\u00f5a") == [ALPHABET.index("a"), at, ALPHABET.index("a")]
    assert decoded(metadata, "a\u00f5\u00e9 \u00f5") == "a\u00f5\u00e9 \u00f5"


def test_a_merge_that_is_listed_twice_counts_at_its_first_place() -> None:
    metadata = byte_level_vocabulary("a b, b c")
    metadata["tokenizer.ggml.merges"] = ["a b", "b c", "a b"]
    assert tokens_of(metadata, "abc") == ["ab", "c"]


def test_characters_can_be_merged_instead_of_bytes() -> None:
    """Gemma 4's kind: spaces are signs, unknown characters fall apart into bytes, lines are cut, and <bos> is added."""
    merges = ["\u2581 \u2581", "a b", "\n \n"]
    tokens = ["<pad>", "<bos>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\n"]
    tokens += [merge.replace(" ", "") for merge in merges]
    metadata = {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * 7],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert tokens_of(metadata, "ab  a\n\n\n\u00e9") == ["ab", "\u2581\u2581", "a", "\n\n", "\n", "<0xC3>", "<0xA9>"]
    assert tokenizer_from_metadata(metadata, "f").bos == 1
    assert decoded(metadata, " ab  a\n\n\n\u00e9") == " ab  a\n\n\n\u00e9"


# Start, end, and what is no text.


@pytest.mark.parametrize(
    ("metadata", "bos"),
    [
        (sentencepiece_vocabulary(PIECES), 1),
        (sentencepiece_vocabulary(PIECES, add_bos_token=False), None),
        (sentencepiece_vocabulary(PIECES, bos_token_id=2), 2),
        (byte_level_vocabulary("", "gpt-2", {"<s>": CONTROL}, bos_token_id=256), None),
        (byte_level_vocabulary("", "gpt-2", {"<s>": CONTROL}, bos_token_id=256, add_bos_token=True), 256),
        (byte_level_vocabulary("", "llama-bpe", {"<s>": CONTROL}, bos_token_id=256), 256),
        (byte_level_vocabulary("", "llama-bpe", {"<s>": CONTROL}, bos_token_id=256, add_bos_token=False), None),
        (byte_level_vocabulary("", "llama-bpe", {"$a:b": CONTROL}, bos_token_id=256), 256),
        (byte_level_vocabulary("", "llama-bpe", bos_token_id=2**32 - 1), None),
        (byte_level_vocabulary("", "llama-bpe"), None),
    ],
    ids=range(10),
)
def test_the_start_token_is_the_files_choice_or_the_kinds(metadata: dict[str, Any], bos: int | None) -> None:
    tokenizer = tokenizer_from_metadata(metadata, "f")
    ids = tokenizer.encode("c", add_special_tokens=False)
    assert tokenizer.bos == bos
    assert tokenizer.encode("c") == ([] if bos is None else [bos]) + ids
    assert tokenizer.backend.encode("c").ids == tokenizer.encode("c")  # what a tokenizer.json of it will do


@pytest.mark.parametrize(
    ("others", "settings", "ends"),
    [
        ({}, {}, set()),
        ({"<|x|>": CONTROL}, {"eos_token_id": 256}, {"<|x|>"}),
        ({"<|x|>": CONTROL, "<|y|>": CONTROL}, {"eos_token_id": 256, "eot_token_id": 257}, {"<|x|>", "<|y|>"}),
        ({"<|x|>": CONTROL, "<|y|>": CONTROL}, {"eom_token_id": 257}, {"<|y|>"}),
        ({"<|im_end|>": CONTROL, "<|eot_id|>": NORMAL}, {}, {"<|im_end|>", "<|eot_id|>"}),
        (
            {"<|fim_pad|>": CONTROL, "<|file_sep|>": CONTROL, "<|fim_prefix|>": CONTROL},
            {},
            {"<|fim_pad|>", "<|file_sep|>"},
        ),
        ({"<|end|>": CONTROL, "<|return|>": CONTROL, "<|call|>": CONTROL}, {}, {"<|return|>", "<|call|>"}),
        ({"<|end|>": CONTROL, "<|return|>": CONTROL}, {}, {"<|end|>", "<|return|>"}),
        ({"</s>": CONTROL}, {}, {"</s>"}),
        ({"</s>": CONTROL, "<|tool_response>": CONTROL}, {}, {"<|tool_response>"}),
    ],
    ids=range(10),
)
def test_ends_are_stated_by_id_or_known_by_spelling(
    others: dict[str, int], settings: dict[str, int], ends: set[str]
) -> None:
    metadata = byte_level_vocabulary("", "gpt-2", others, **settings)
    tokenizer = tokenizer_from_metadata(metadata, "f")
    assert {metadata["tokenizer.ggml.tokens"][i] for i in tokenizer.eos} == ends


def test_a_known_spelling_is_special_whatever_its_type() -> None:
    """Some converters wrote such tokens as normal ones."""
    metadata = byte_level_vocabulary("", "gpt-2", {"<|endoftext|>": NORMAL, "<|fim_middle|>": NORMAL, "<|z|>": NORMAL})
    assert tokens_of(metadata, "<|endoftext|><|fim_middle|>") == ["<|endoftext|>", "<|fim_middle|>"]
    assert len(tokens_of(metadata, "<|z|>")) == 5
    assert decoded(metadata, "a<|endoftext|>b") == "ab"


def test_padding_at_the_end_is_no_part_of_the_tokenizer() -> None:
    """An embedding has rows for it, a text never."""
    metadata = byte_level_vocabulary(
        "", "gpt-2", {"[PAD256]": UNUSED, "<|x|>": CONTROL, "[PAD258]": UNUSED, "[PAD259]": UNUSED}
    )
    assert tokenizer_from_metadata(metadata, "f").size == 258
    assert tokenizer_from_metadata({**metadata, "tokenizer.ggml.padding_token_id": 258}, "f").size == 259
    in_use = [*metadata["tokenizer.ggml.token_type"][:-1].tolist(), NORMAL]
    assert tokenizer_from_metadata({**metadata, "tokenizer.ggml.token_type": in_use}, "f").size == 260


def test_an_empty_token_is_named_by_its_id() -> None:
    """As llama.cpp names it; two of them are no duplicates."""
    metadata = byte_level_vocabulary("", "gpt-2", {"": NORMAL, "x": NORMAL})
    metadata["tokenizer.ggml.tokens"][-1] = ""
    tokenizer = tokenizer_from_metadata(metadata, "f")
    assert [tokenizer.backend.id_to_token(i) for i in (256, 257)] == ["[EMPTY_256]", "[EMPTY_257]"]


def test_a_whole_tokenizer_wins_over_the_vocabulary(tokenizer_folder: Path) -> None:
    """The key is GGUF's own, for a whole tokenizer.json."""
    metadata = byte_level_vocabulary("", "gpt-2", {f"x{n}": NORMAL for n in range(300)}, eos_token_id=2)
    whole = {
        **metadata,
        "tokenizer.huggingface.json": (tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"),
    }
    expected = load_tokenizer(tokenizer_folder)
    tokenizer = tokenizer_from_metadata(whole, "f")
    assert tokenizer.encode("A house, 12 cats\n") == expected.encode("A house, 12 cats\n")
    assert (tokenizer.bos, tokenizer.eos) == (1, {2})
    without_start = {**whole, "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.add_bos_token": False}
    assert tokenizer_from_metadata(without_start, "f").bos is None
    alone = {"tokenizer.huggingface.json": whole["tokenizer.huggingface.json"]}
    assert tokenizer_from_metadata(alone, "f").encode("a") == expected.encode("a")
