"""Train a SentencePiece BPE vocabulary and convert it to a `tokenizer.json` that gives the same ids."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from quantlab.checkpoint.tokenizer import convert_sentencepiece
from quantlab.errors import InputError

if TYPE_CHECKING:
    import sentencepiece

UNK, BOS, EOS = 0, 1, 2  # Llama's order of special pieces


def train_sentencepiece(documents: list[str], vocabulary_size: int, folder: Path, threads: int) -> None:
    """Write `tokenizer.model`, `tokenizer.json` and `tokenizer_config.json` into `folder`.

    The model is a BPE with byte fallback and no text normalization (Llama's settings): decode(encode(text)) is the
    text itself. Digits are single tokens.

    Raises:
        InputError: the text is too small for the vocabulary, or the two tokenizers disagree on it.
    """
    import sentencepiece

    buffer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=_lines(documents),
            model_writer=buffer,
            model_type="bpe",
            vocab_size=vocabulary_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.9995,
            max_sentence_length=1 << 16,
            unk_id=UNK,
            bos_id=BOS,
            eos_id=EOS,
            pad_id=-1,
            num_threads=threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise InputError(f"no vocabulary of {vocabulary_size} pieces can be trained on this text: {error}") from None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(buffer.getvalue())
    _convert(folder)
    _check_same_ids(folder, documents)


def _lines(documents: list[str]) -> Iterator[str]:
    for document in documents:
        yield from (line for line in document.split("\n") if line)


def _convert(folder: Path) -> None:
    """Add the `tokenizers` form of `tokenizer.model`; the start token is part of it, as in Llama 2."""
    tokenizer = convert_sentencepiece(folder, add_bos=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _check_same_ids(folder: Path, documents: list[str]) -> None:
    from tokenizers import Tokenizer

    processor = load_sentencepiece(folder)
    converted = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for document in documents[:: max(1, len(documents) // 64)]:
        excerpt = document[:4000]
        if converted.encode(excerpt, add_special_tokens=False).ids != processor.encode(excerpt):
            raise InputError(f"{folder}: tokenizer.json and tokenizer.model disagree on {excerpt[:60]!r}")


def load_sentencepiece(folder: Path) -> sentencepiece.SentencePieceProcessor:
    """The SentencePiece processor of `folder/tokenizer.model`."""
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
