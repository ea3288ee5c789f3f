"""Small byte-level tokenizers, and whether two ways to them give the same ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from quantlab.checkpoint import load_tokenizer
from quantlab.checkpoint.gguf_tokenizer import tokenizer_files, tokenizer_from_metadata
from quantlab.training.corpus import read_documents

TEXTS = [
    "", " ", "a", " two  spaces\n\nlines\t", "It's 12345, 'TIS!", "na\u00efve \u65e5\u672c\u8a9e \U0001f600 e\u0301",
    "a<|im_end|>b <|x|> [y]c</s>d", "\u2581a", "<0x41> [PAD600]",
]  # fmt: skip
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


def byte_level(prose: Path, cut: pre_tokenizers.PreTokenizer, **options: Any) -> tokenizers.Tokenizer:
    """A byte-level BPE of 400 tokens, trained here; <|x|> and [y] are added."""
    made = tokenizers.Tokenizer(models.BPE(**options))
    made.pre_tokenizer, made.decoder = cut, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(read_documents(prose), trainer)
    made.add_special_tokens(["<|x|>"])
    made.add_tokens([AddedToken("[y]", normalized=False)])
    return made


def save(tokenizer: tokenizers.Tokenizer, folder: Path, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def assert_same_ids(folder: Path, metadata: dict[str, Any], back: Path) -> None:
    """As in the folder, read from the metadata and from the files made of it."""
    expected = load_tokenizer(folder)
    back.mkdir()
    for name, content in tokenizer_files(metadata, "f").items():
        (back / name).write_bytes(content)
    for tokenizer in (tokenizer_from_metadata(metadata, "f"), load_tokenizer(back)):
        assert tokenizer.bos == expected.bos
        assert tokenizer.eos >= expected.eos
        for text in TEXTS:
            ids = expected.encode(text)
            assert tokenizer.encode(text) == ids
            assert tokenizer.decode(ids) == expected.decode(ids)
