"""The trained vocabulary: `tokenizer.json` gives SentencePiece's ids, and decoding gives the text back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer

from quantlab.errors import InputError
from quantlab.training.corpus import read_documents
from quantlab.training.vocabulary import BOS, EOS, UNK, train_sentencepiece

ODD_TEXTS = [
    "",
    " ",
    "a",
    " leading and trailing ",
    "two  spaces,   three, \t a tab",
    "line\nbreaks\n\n\nand\r\nreturns",
    "digits 0123456789 and 3.14159e-10",
    "na\u00efve caf\u00e9 \u2014 \u201cquoted\u201d\u2026",
    "e\u0301 is not \u00e9, \ufb01 is not fi",  # a normalizing tokenizer would change both
    "\u65e5\u672c\u8a9e \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "\U0001f600 \U0001f469\u200d\U0001f4bb \U0001f1e9\U0001f1ea",
    "\u00a0\u2003\u200b\ufeff odd spaces",
    "\x01\x02\x7f controls",
    "{'code': [x**2 for x in range(10)]}  # comment",
    "UPPER lower MiXeD",
    "a" * 300,
    "\u2581 is SentencePiece's own space",
]


def both(folder: Path) -> tuple[Tokenizer, sentencepiece.SentencePieceProcessor]:
    converted = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return converted, sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def test_ids_are_sentencepieces_on_the_prose(tokenizer_folder: Path, prose: Path) -> None:
    """Each whole document, and each line of it, gives the same ids in both libraries."""
    converted, original = both(tokenizer_folder)
    for document in read_documents(prose):
        for text in (document, *document.split("\n")):
            assert converted.encode(text, add_special_tokens=False).ids == original.encode(text)


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_ids_are_sentencepieces_on_odd_texts(tokenizer_folder: Path, text: str) -> None:
    """Spaces, controls, unseen scripts and emoji too: bytes stand in for characters that have no piece."""
    converted, original = both(tokenizer_folder)
    ids = converted.encode(text, add_special_tokens=False).ids
    assert ids == original.encode(text)
    assert UNK not in ids


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_decoding_gives_the_text_back(tokenizer_folder: Path, text: str) -> None:
    """No text is lost or normalized, in either library; only SentencePiece's own sign becomes the space it means."""
    converted, original = both(tokenizer_folder)
    ids = converted.encode(text, add_special_tokens=False).ids
    assert converted.decode(ids) == original.decode(ids) == text.replace("\u2581", " ")


def test_the_prose_survives_whole(tokenizer_folder: Path, prose: Path) -> None:
    """Decode(encode(text)) is the text, for whole documents."""
    converted, _ = both(tokenizer_folder)
    for document in read_documents(prose):
        assert converted.decode(converted.encode(document).ids) == document


def test_the_start_token_is_part_of_the_tokenizer(tokenizer_folder: Path) -> None:
    """As in Llama 2: encoding puts <s> first and no </s> last, and ids 0, 1, 2 are unknown, start and end."""
    converted, original = both(tokenizer_folder)
    assert converted.encode("a").ids == [BOS, *original.encode("a")]
    assert [converted.id_to_token(i) for i in (UNK, BOS, EOS)] == ["<unk>", "<s>", "</s>"]
    settings = json.loads((tokenizer_folder / "tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"]) == ("<s>", "</s>")


def test_the_vocabulary_has_the_size_asked_for(tokenizer_folder: Path) -> None:
    """Exactly 512 pieces, the 256 bytes among them, in both files."""
    converted, original = both(tokenizer_folder)
    assert converted.get_vocab_size(with_added_tokens=True) == original.get_piece_size() == 512
    assert sum(original.is_byte(i) for i in range(512)) == 256


def test_digits_are_single_tokens(tokenizer_folder: Path) -> None:
    """A number is read digit by digit, however often it occurs in the text."""
    _, original = both(tokenizer_folder)
    pieces = [original.id_to_piece(i).strip("\u2581") for i in range(512) if not original.is_byte(i)]
    assert not [piece for piece in pieces if len(piece) > 1 and any(letter.isdigit() for letter in piece)]


def test_transformers_reads_the_folder(tokenizer_folder: Path) -> None:
    """AutoTokenizer gives the ids that the folder's own files give."""
    from transformers import AutoTokenizer

    converted, _ = both(tokenizer_folder)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    for text in ("Once upon a time, there was a mill.", "  na\u00efve \U0001f600\n  42"):
        assert tokenizer(text).input_ids == converted.encode(text).ids
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BOS, EOS)


def test_training_is_reproducible(tokenizer_folder: Path, prose: Path, tmp_path: Path) -> None:
    """The same text gives the same files, byte for byte."""
    train_sentencepiece(read_documents(prose), 512, tmp_path / "again", threads=1)
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tokenizer_folder / name).read_bytes()


@pytest.mark.parametrize("size", [100_000, 100, 0])
def test_a_size_that_the_text_cannot_fill_is_refused(prose: Path, tmp_path: Path, size: int) -> None:
    """Too small a text for the vocabulary, or too small a vocabulary for its byte pieces: one line, and no files."""
    with pytest.raises(InputError, match=f"no vocabulary of {size} pieces") as caught:
        train_sentencepiece(read_documents(prose), size, tmp_path / "none", threads=1)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "none").exists()
