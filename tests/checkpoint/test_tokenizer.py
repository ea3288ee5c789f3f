"""Tokenizers of model folders: the ids that SentencePiece and transformers give, and the text back unchanged."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer

from quantlab.checkpoint import Tokenizer, load_tokenizer
from quantlab.errors import InputError
from quantlab.training.corpus import read_documents

ODD_TEXTS = [
    "",
    " ",
    "   ",
    "a",
    " a leading space",
    "trailing spaces  ",
    "\n",
    "\n\nlines\nand\r\nlines\n",
    "\ttabs\tand  gaps",
    "digits 0123456789, 3.14159 and 1,000,000",
    "\U0001f600 smiles \U0001f469\u200d\U0001f680",
    "na\u00efve \u65e5\u672c\u8a9e \u0645\u0631\u062d\u0628\u0627",
    "e\u0301 is no \u00e9, \ufb01 no fi",
    "code = [x**2 for x in range(10)]  # {}",
    "zero \x00 and bell \x07",
]


def texts(prose: Path) -> list[str]:
    """Documents, their lines, and odd strings."""
    documents = read_documents(prose)
    lines = [line for document in documents for line in document.split("\n")]
    return [*documents, *lines, *ODD_TEXTS]


def sentencepiece_of(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.fixture(scope="module")
def gpt2_files(tmp_path_factory: pytest.TempPathFactory, prose: Path) -> Path:
    """A folder with GPT-2's two files, made by another library's trainer."""
    folder = tmp_path_factory.mktemp("gpt2-tokenizer")
    trained = ByteLevelBPETokenizer()
    trained.train([str(prose)], vocab_size=500, special_tokens=["<|endoftext|>"], show_progress=False)
    trained.save_model(str(folder))
    assert sorted(file.name for file in folder.iterdir()) == ["merges.txt", "vocab.json"]
    return folder


# The ids.


def test_ids_are_those_of_sentencepiece(tokenizer_folder: Path, prose: Path) -> None:
    """On the prose and on odd strings; with special tokens, after the start token."""
    tokenizer, original = load_tokenizer(tokenizer_folder), sentencepiece_of(tokenizer_folder)
    for text in texts(prose):
        ids = original.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer.encode(text) == [original.bos_id(), *ids]
    assert tokenizer.size == original.vocab_size() == 512


def test_ids_and_texts_are_those_of_transformers(tokenizer_folder: Path, prose: Path) -> None:
    """The same folder read by AutoTokenizer."""
    tokenizer, theirs = load_tokenizer(tokenizer_folder), AutoTokenizer.from_pretrained(str(tokenizer_folder))
    for text in texts(prose):
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert tokenizer.decode(ids, skip_special_tokens=False) == theirs.decode(ids, skip_special_tokens=False)
    assert {theirs.eos_token_id} == tokenizer.eos
    assert theirs.bos_token_id == tokenizer.bos


def test_decoding_gives_the_text_back(tokenizer_folder: Path, prose: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    for text in texts(prose):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581<"), max_size=40))
def test_any_text_comes_back(tokenizer_folder: Path, text: str) -> None:
    """Any characters but SentencePiece's own sign for the space; "<" is left out, as "</s>" is a token and no text."""
    tokenizer = load_tokenizer(tokenizer_folder)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids[1:] == sentencepiece_of(tokenizer_folder).encode(text)


def test_decoding_leaves_special_tokens_out_unless_asked(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    ids = [1, *tokenizer.encode("a house", add_special_tokens=False), 2]
    assert tokenizer.decode(ids) == "a house"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s> a house</s>"


def test_no_id_is_no_text(tokenizer_folder: Path) -> None:
    assert load_tokenizer(tokenizer_folder).decode([]) == ""


def test_settings_of_somebodys_training_are_not_applied(tokenizer_folder: Path, tmp_path: Path) -> None:
    """A tokenizer.json may say that texts are cut or filled up to a length, which would change ids silently."""
    data = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    data["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    data["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<unk>",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    text = "a sentence of more than five tokens and fewer than sixty"
    plain, changed = load_tokenizer(tokenizer_folder), load_tokenizer(tmp_path)
    assert changed.encode(text) == plain.encode(text)
    assert changed.bos == plain.bos


# Start and end.


def test_start_and_end_tokens_of_a_model(llama_model: Path) -> None:
    """Llama's: <s> is put before every text, </s> ends one."""
    tokenizer = load_tokenizer(llama_model)
    assert (tokenizer.bos, tokenizer.eos) == (1, frozenset({2}))


def test_a_tokenizer_that_puts_nothing_before_a_text_has_no_start_token(gpt2_files: Path, tmp_path: Path) -> None:
    """GPT-2's, even where config.json names a bos_token_id."""
    shutil.copytree(gpt2_files, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "gpt2", "bos_token_id": 0}))
    tokenizer = load_tokenizer(tmp_path / "model")
    assert tokenizer.bos is None
    assert tokenizer.encode("a house") == tokenizer.encode("a house", add_special_tokens=False)


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({}, set()),
        ({"config.json": {"eos_token_id": 2}}, {2}),
        ({"config.json": {"eos_token_id": 2}, "generation_config.json": {"eos_token_id": [7, 9]}}, {2, 7, 9}),
        ({"config.json": {"eos_token_id": None}, "tokenizer_config.json": {"eos_token": "</s>"}}, {2}),
        ({"tokenizer_config.json": {"eos_token": {"content": "</s>", "lstrip": False}}}, {2}),
        ({"config.json": {"eos_token_id": "two"}, "tokenizer_config.json": {"eos_token": "<none>"}}, set()),
    ],
    ids=range(6),
)
def test_every_end_token_that_a_folder_names_ends_a_text(
    tokenizer_folder: Path, tmp_path: Path, files: dict[str, object], ends: set[int]
) -> None:
    """Chat models name one in each file, and mean them all."""
    shutil.copy(tokenizer_folder / "tokenizer.json", tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert load_tokenizer(tmp_path).eos == ends


# What has no tokenizer.json.


def test_tokenizer_model_alone_gives_sentencepieces_ids(tokenizer_folder: Path, prose: Path, tmp_path: Path) -> None:
    """Converted, a leading space included, and with Llama's start token."""
    shutil.copy(tokenizer_folder / "tokenizer.model", tmp_path)
    tokenizer, original = load_tokenizer(tmp_path), sentencepiece_of(tokenizer_folder)
    assert tokenizer.bos == original.bos_id()
    for text in texts(prose):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == original.encode(text)
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(("setting", "bos"), [({"add_bos_token": True}, 1), ({"add_bos_token": False}, None), ({}, 1)])
def test_tokenizer_config_decides_on_the_start_token(
    tokenizer_folder: Path, tmp_path: Path, setting: dict[str, bool], bos: int | None
) -> None:
    shutil.copy(tokenizer_folder / "tokenizer.model", tmp_path)
    content = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", **setting}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos, tokenizer.eos) == (bos, {2})


def test_a_sentencepiece_model_of_another_kind_is_refused(prose: Path, tmp_path: Path) -> None:
    """A unigram model, read as BPE, would give other ids without a word."""
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(prose.read_text(encoding="utf-8").split("\n")),
        model_writer=buffer,
        model_type="unigram",
        vocab_size=200,
        num_threads=1,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(buffer.getvalue())
    with pytest.raises(InputError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: its tokenizer cannot be converted: ")


@pytest.mark.parametrize("config", [None, {"model_type": "gpt2", "eos_token_id": 0}], ids=["alone", "with config.json"])
def test_vocab_and_merges_give_gpt2s_ids(
    gpt2_files: Path, prose: Path, tmp_path: Path, config: dict[str, object] | None
) -> None:
    """Those of the library that made the files, and of transformers where it can read them."""
    folder = shutil.copytree(gpt2_files, tmp_path / "model")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    original = ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer = load_tokenizer(folder)
    theirs = None if config is None else AutoTokenizer.from_pretrained(str(folder))
    for text in texts(prose):
        ids = tokenizer.encode(text)
        assert ids == original.encode(text).ids
        assert tokenizer.decode(ids) == text
        assert theirs is None or ids == theirs.encode(text)
    assert tokenizer.size == 500
    assert tokenizer.eos == (set() if config is None else {0})


# What is refused.


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("files", [[], ["vocab.json"], ["merges.txt"], ["config.json"]])
def test_a_folder_without_tokenizer_is_refused(tmp_path: Path, files: list[str]) -> None:
    """Half of GPT-2's pair is none."""
    for name in files:
        (tmp_path / name).write_text("{}")
    way_out = "copy it from the original model" if "config.json" in files else "is this a model folder?"
    assert refusal(tmp_path) == (
        f"{tmp_path}: holds no tokenizer (tokenizer.json, tokenizer.model, or vocab.json and merges.txt); {way_out}"
    )


@pytest.mark.parametrize("content", ["", "{}", "no JSON", '{"model": {"type": "BPE"}}'])
def test_a_broken_tokenizer_json_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    assert refusal(tmp_path).startswith(f"{tmp_path / 'tokenizer.json'}: cannot be read: ")


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"[" * 100_000, b'{"a": "\\ud800"}'], ids=range(3))
def test_bytes_that_are_no_json_text_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    assert refusal(tmp_path).startswith(f"{tmp_path / 'tokenizer.json'}: cannot be read: ")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json", "generation_config.json"])
def test_bytes_that_are_no_text_beside_a_tokenizer_are_refused(
    tokenizer_folder: Path, tmp_path: Path, name: str
) -> None:
    shutil.copy(tokenizer_folder / "tokenizer.json", tmp_path)
    (tmp_path / name).write_bytes(b'{"a": "\xff"}')
    assert refusal(tmp_path) == f"{tmp_path / name}: not valid JSON; download it again"


@pytest.mark.parametrize(
    ("part", "value"),
    [("special_tokens", {}), ("single", [{"SpecialToken": {"id": "<none>", "type_id": 0}}])],
    ids=["no special tokens", "another token"],
)
def test_a_template_of_missing_tokens_is_refused(
    tokenizer_folder: Path, tmp_path: Path, part: str, value: object
) -> None:
    """The library finds out as late as at the first text, and panics."""
    data = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    data["post_processor"][part] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert refusal(tmp_path).startswith(f"{tmp_path / 'tokenizer.json'}: cannot be read: ")


def test_a_text_that_the_vocabulary_cannot_say_is_refused(tmp_path: Path) -> None:
    """A vocabulary of words has no token for others, unless it says so."""
    words = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "[UNK]"}
    content = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": words}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("b a") == [1, 0]
    with pytest.raises(InputError, match="the model's tokenizer fails on this text: "):
        tokenizer.encode("b c")


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.model": ""},
        {"tokenizer.model": "no model"},
        {"vocab.json": "no JSON", "merges.txt": ""},
        {"vocab.json": "[1]", "merges.txt": "a b"},
        {"vocab.json": '{"a": 0}', "merges.txt": "#version: 0.2\nx y\n"},
    ],
    ids=range(5),
)
def test_broken_files_of_other_kinds_are_refused(tmp_path: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert refusal(tmp_path).startswith(f"{tmp_path}: its tokenizer cannot be converted: ")


def test_a_broken_config_beside_a_tokenizer_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    shutil.copy(tokenizer_folder / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    assert refusal(tmp_path) == f"{tmp_path / 'tokenizer_config.json'}: not a JSON object"


def test_a_tokenizer_can_be_made_of_its_parts(tokenizer_folder: Path) -> None:
    """Start and end tokens are the maker's choice."""
    backend = load_tokenizer(tokenizer_folder).backend
    assert Tokenizer(backend, None, frozenset({5})).encode("a") == Tokenizer(backend, 9, frozenset()).encode("a")[1:]
