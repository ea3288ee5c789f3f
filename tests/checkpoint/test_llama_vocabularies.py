"""Ids as llama.cpp gives them: on its own vocabulary files where they are at hand, and by its library on small ones.

QUANTLAB_LLAMA_VOCABULARIES names a folder with llama.cpp's `models/ggml-vocab-*.gguf` and the `.inp` and `.out` files
beside them; they are too large to be kept here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_vocabularies import CONTROL, USER_DEFINED, byte_level_vocabulary, sentencepiece_vocabulary, write_vocabulary

from quantlab.checkpoint import Tokenizer, load_tokenizer
from quantlab.checkpoint.gguf_file import GgufFile
from quantlab.checkpoint.gguf_tokenizer import tokenizer_from_metadata
from quantlab.checkpoint.gguf_vocabulary import vocabulary_metadata
from quantlab.checkpoint.pretokenizers import PRETOKENIZERS
from quantlab.training.corpus import read_documents

FOLDER = os.environ.get("QUANTLAB_LLAMA_VOCABULARIES", "")
SEPARATOR = "\n__ggml_vocab_test__\n"
SHIPPED = Path(__file__).parents[2] / "models" / "fable-9m"
OTHER_KINDS = ("bert", "t5")


def vocabulary_files() -> list[Path]:
    return sorted(Path(FOLDER).glob("ggml-vocab-*.gguf")) if FOLDER else []


def cases(file: Path) -> list[tuple[str, list[int]]]:
    """Texts and their ids, from the files beside a vocabulary; none for some."""
    texts, ids = file.with_suffix(".gguf.inp"), file.with_suffix(".gguf.out")
    if not texts.exists():
        return []
    parts = texts.read_bytes().decode("utf-8").split(SEPARATOR)
    lines = ids.read_text().splitlines()
    if len(parts) == len(lines) + 1 and not parts[-1]:
        parts.pop()
    return [(text, [int(word) for word in line.split()]) for text, line in zip(parts, lines, strict=True)]


@pytest.mark.skipif(not FOLDER, reason="QUANTLAB_LLAMA_VOCABULARIES names no folder")
def test_the_folder_holds_the_five_that_matter_most() -> None:
    names = {file.name for file in vocabulary_files()}
    assert names >= {f"ggml-vocab-{name}.gguf" for name in ("gpt-2", "llama-bpe", "llama-spm", "phi-3", "qwen2")}


@pytest.mark.parametrize("file", vocabulary_files(), ids=lambda file: file.stem)
def test_every_case_of_llama_cpp_is_right(file: Path) -> None:
    metadata = GgufFile(file).metadata
    if metadata["tokenizer.ggml.model"] in OTHER_KINDS:
        pytest.skip("a kind of vocabulary that is not read")
    tokenizer = tokenizer_from_metadata(metadata, str(file))
    for text, ids in cases(file):
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer.decode(ids) == text


class Llama:
    """llama.cpp's own tokenizer for a vocabulary file."""

    def __init__(self, path: Path) -> None:
        import ctypes

        import llama_cpp

        self._library, self._ctypes = llama_cpp, ctypes
        self._silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silence, None)
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = True
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        assert self._model, f"llama.cpp does not load {path}"
        self._vocabulary = llama_cpp.llama_model_get_vocab(self._model)

    def close(self) -> None:
        self._library.llama_model_free(self._model)

    @property
    def size(self) -> int:
        return self._library.llama_vocab_n_tokens(self._vocabulary)

    def encode(self, text: str) -> list[int]:
        """With the start token where the file wants one; special tokens in the text are parsed."""
        data = text.encode()
        room = len(data) + 8
        ids = (self._library.llama_token * room)()
        count = self._library.llama_tokenize(self._vocabulary, data, len(data), ids, room, True, True)
        assert 0 <= count <= room
        return list(ids[:count])

    def text(self, ids: list[int]) -> bytes:
        """What the tokens stand for, special ones too, one after the other."""
        buffer = self._ctypes.create_string_buffer(256)
        parts = []
        for i in ids:
            length = self._library.llama_token_to_piece(self._vocabulary, i, buffer, 256, 0, True)
            parts.append(buffer.raw[:length])
        return b"".join(parts)

    def ends(self) -> set[int]:
        return {i for i in range(self.size) if self._library.llama_vocab_is_eog(self._vocabulary, i)}


def both(metadata: dict[str, Any], folder: Path) -> Iterator[tuple[Llama, Tokenizer]]:
    pytest.importorskip("llama_cpp")
    llama = Llama(write_vocabulary(metadata, folder / "vocabulary.gguf"))
    yield llama, tokenizer_from_metadata(metadata, "f")
    llama.close()


TEXTS = [
    "", " ", "  a", "a  b\n\n\nc", "The tailor's 2 daughters, y'all: 12345!", "CamelCase HTTPServer x1y2",
    "caf\u00e9 \u65e5\u672c\u8a9e \u0416\u0438\u0437\u043d\u044c", "\t\ttabs\r\n\x0b\x07", "\u2581 <0x41>",
    "\U0001f600\U0001f469\u200d\U0001f680 e\u0301 \u00a0\u3000\u2028", "a<|x|>b <|x|> [y]  c</s> d<s>",
    "ababab" * 9, " " * 33 + "=" * 33 + "\n" * 33,
]  # fmt: skip
CHARACTERS = st.one_of(
    st.sampled_from(
        [*"ab  \n\t.,'0123=", "<|x|>", "[y]", "</s>", "'s", "'LL", "\u2581", "the ", " The", "====", "ing"]
    ),
    st.characters(exclude_categories=["Cs", "Cn", "Co"], max_codepoint=0x2FFF),
)
RANDOM_TEXT = st.lists(CHARACTERS, max_size=24).map("".join)


def assert_alike(llama: Llama, tokenizer: Tokenizer, text: str) -> None:
    ids = llama.encode(text)
    assert tokenizer.encode(text) == ids
    if llama.text(ids[tokenizer.bos is not None :]) == text.encode():
        assert tokenizer.decode(ids[tokenizer.bos is not None :], skip_special_tokens=False) == text


# A tokenizer of a folder.


@pytest.fixture(scope="module")
def sentencepiece_pair(
    tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Llama, Tokenizer]]:
    metadata = vocabulary_metadata(tokenizer_folder, 520)
    yield from both(metadata, tmp_path_factory.mktemp("sentencepiece"))


def test_a_folders_sentencepiece_model_is_llama_cpps_too(
    sentencepiece_pair: tuple[Llama, Tokenizer], prose: Path
) -> None:
    llama, tokenizer = sentencepiece_pair
    assert (llama.size, tokenizer.size) == (520, 512)
    assert llama.ends() == tokenizer.eos == {2}
    for text in [*read_documents(prose), *TEXTS]:
        assert_alike(llama, tokenizer, text)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=RANDOM_TEXT)
def test_sentencepiece_on_any_text(sentencepiece_pair: tuple[Llama, Tokenizer], text: str) -> None:
    assert_alike(*sentencepiece_pair, text)


def test_the_model_that_ships_with_the_project(prose: Path, tmp_path: Path) -> None:
    """Its vocabulary says all."""
    metadata = vocabulary_metadata(SHIPPED, 4096)
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert "tokenizer.huggingface.json" not in metadata
    own = load_tokenizer(SHIPPED)
    for llama, tokenizer in both(metadata, tmp_path):
        assert llama.size == tokenizer.size == 4096
        assert llama.ends() == tokenizer.eos
        for text in [*read_documents(prose), *TEXTS]:
            assert_alike(llama, tokenizer, text)
            assert tokenizer.encode(text) == own.encode(text)


# Vocabularies of each kind.

SPECIAL = {"<|x|>": CONTROL, "[y]": USER_DEFINED, "<|im_end|>": CONTROL}
MERGES = (
    "\u0120 t, h e, \u0120t he, i n, in g, \u0120 \u0120, \u0120\u0120 \u0120\u0120, 1 2, 12 3, \u010a \u010a, "
    "a b, ab ab, ' s, = =, == ==, \u00c3 \u00a9, a i, l o, \u010a\u010a \u010a"
)


@pytest.mark.parametrize("name", [name for name in sorted(PRETOKENIZERS) if PRETOKENIZERS[name].bytewise])
def test_byte_level_vocabularies_of_every_name(name: str, tmp_path: Path) -> None:
    metadata = byte_level_vocabulary(MERGES, name, SPECIAL, bos_token_id=256, eos_token_id=257)
    for llama, tokenizer in both(metadata, tmp_path):
        assert llama.ends() == tokenizer.eos
        for text in TEXTS:
            assert_alike(llama, tokenizer, text)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_vocabularies_made_by_hand(prefix: bool, tmp_path: Path) -> None:
    """Scores that contradict the lengths, runs, and several ways to make one piece."""
    names = [
        "aba",
        "ab",
        "==",
        "ba",
        "\u2581a",
        "\u2581\u2581",
        "\u2581\u2581\u2581\u2581",
        "====",
        "abab",
        "\u2581",
        "a",
        "b",
        "=",
    ]
    pieces = {piece: -float(rank) for rank, piece in enumerate(names)}
    metadata = sentencepiece_vocabulary(pieces, SPECIAL, add_space_prefix=prefix)
    for llama, tokenizer in both(metadata, tmp_path):
        assert llama.ends() == tokenizer.eos
        for length in range(40):
            for text in ("a" * length, " " * length + "a", "=" * length, "ab" * length, "aab" * length):
                assert_alike(llama, tokenizer, text)
        for text in TEXTS:
            assert_alike(llama, tokenizer, text)


def test_a_file_without_vocabulary_loads(tmp_path: Path) -> None:
    """Where the folder had no tokenizer; how many tokens there are is another key."""
    metadata = {**vocabulary_metadata(tmp_path, 40), "llama.vocab_size": 40}
    pytest.importorskip("llama_cpp")
    llama = Llama(write_vocabulary(metadata, tmp_path / "vocabulary.gguf"))
    assert llama.size == 40
    llama.close()
