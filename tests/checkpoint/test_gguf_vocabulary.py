"""GGUF metadata of a folder's tokenizer: what it says, and that it makes the same ids."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from byte_level_tokenizers import GPT2, assert_same_ids, byte_level, save
from tiny_vocabularies import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from quantlab.checkpoint import load_tokenizer
from quantlab.checkpoint.gguf_tokenizer import tokenizer_from_metadata
from quantlab.checkpoint.gguf_vocabulary import vocabulary_metadata
from quantlab.errors import InputError

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SUFFIX = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*%s"
    r"|%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


# SentencePiece.


def test_a_sentencepiece_folder_needs_no_whole_tokenizer(tokenizer_folder: Path, tmp_path: Path) -> None:
    """Scores are those of tokenizer.model, types those of its pieces; the rest of the embedding is padding."""
    metadata = vocabulary_metadata(tokenizer_folder, 515)
    original = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_folder / "tokenizer.model"))
    ids = range(original.vocab_size())
    tokens = metadata.pop("tokenizer.ggml.tokens")
    assert tokens == [*map(original.id_to_piece, ids), "[PAD512]", "[PAD513]", "[PAD514]"]
    types = metadata.pop("tokenizer.ggml.token_type")
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256]
    assert types.tolist() == [*kinds, *[NORMAL] * (512 - len(kinds)), UNUSED, UNUSED, UNUSED]
    scores = metadata.pop("tokenizer.ggml.scores")
    assert scores[:512].tolist() == [original.get_score(i) for i in ids]
    assert (types.dtype, scores.dtype) == (np.int32, np.float32)
    assert metadata == {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": True,
    }
    assert_same_ids(tokenizer_folder, vocabulary_metadata(tokenizer_folder, 515), tmp_path / "back")


def test_merges_rank_pieces_where_there_is_no_sentencepiece_model(tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_folder / name, folder)
    metadata = vocabulary_metadata(folder, 512)
    assert "tokenizer.huggingface.json" not in metadata
    scores = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"].tolist(), strict=True))
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    first = "".join(merges[0])
    assert max(scores["".join(merge)] for merge in merges) == scores[first] == 0
    assert_same_ids(folder, metadata, tmp_path / "back")
    (folder / "tokenizer.model").write_text("something else")
    again = vocabulary_metadata(folder, 512)
    assert np.array_equal(again["tokenizer.ggml.scores"], metadata["tokenizer.ggml.scores"])


def test_tokenizer_model_alone_is_enough(tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(tokenizer_folder / "tokenizer.model", folder)
    metadata = vocabulary_metadata(folder, 512)
    assert "tokenizer.huggingface.json" not in metadata
    assert metadata["tokenizer.ggml.tokens"] == vocabulary_metadata(tokenizer_folder, 512)["tokenizer.ggml.tokens"]
    assert_same_ids(folder, metadata, tmp_path / "back")


def test_without_space_before_a_text(tokenizer_folder: Path, tmp_path: Path) -> None:
    """Gemma's way: only spaces become signs."""
    changed = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    changed.normalizer = normalizers.Replace(" ", "\u2581")
    changed.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    metadata = vocabulary_metadata(save(changed, tmp_path / "model"), 512)
    assert metadata["tokenizer.ggml.add_space_prefix"] is False
    assert "tokenizer.huggingface.json" not in metadata
    assert_same_ids(tmp_path / "model", metadata, tmp_path / "back")


def test_merges_that_scores_cannot_say_are_listed(tmp_path: Path) -> None:
    """Two ways to make abc, of which the tokenizer knows one: a list of merges tells them apart, scores do not."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for piece in ("<s>", "a", "b", "c", "ab", "bc", "abc", "\u2581", *"defghijklmnopqrstuvwxyz"):
        vocabulary[piece] = len(vocabulary)
    made = tokenizers.Tokenizer(models.BPE(vocabulary, [("b", "c"), ("a", "b"), ("ab", "c")], byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(["<s>"])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    folder = save(made, tmp_path / "model")
    assert load_tokenizer(folder).backend.encode("abc").tokens == ["<s>", "a", "bc"]
    metadata = vocabulary_metadata(folder, len(vocabulary))
    assert metadata["tokenizer.ggml.model"] == "gemma4"
    assert metadata["tokenizer.ggml.merges"] == ["b c", "a b", "ab c"]
    assert "tokenizer.huggingface.json" not in metadata
    assert_same_ids(folder, metadata, tmp_path / "back")


# Byte-level BPE.


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("gpt-2", GPT2),
        ("qwen2", pre_tokenizers.Sequence([split(WORDS % r"\p{N}"), BYTE_LEVEL])),
        ("starcoder", pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])),
        (
            "falcon",
            pre_tokenizers.Sequence(
                [pre_tokenizers.Punctuation("contiguous"), GPT2, pre_tokenizers.Digits(), split("[0-9][0-9][0-9]")]
            ),
        ),
    ],
)
def test_a_known_way_of_cutting_is_named(
    name: str, cut: pre_tokenizers.PreTokenizer, prose: Path, tmp_path: Path
) -> None:
    """By what it does, however it is written."""
    made = byte_level(prose, cut)
    folder = save(made, tmp_path / "model", eos_token="<|x|>")
    metadata = vocabulary_metadata(folder, 402)
    assert (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]) == ("gpt2", name)
    assert "tokenizer.huggingface.json" not in metadata
    assert metadata["tokenizer.ggml.tokens"] == [made.id_to_token(i) for i in range(402)]
    assert metadata["tokenizer.ggml.token_type"].tolist() == [*[NORMAL] * 400, CONTROL, USER_DEFINED]
    merges = json.loads(made.to_str())["model"]["merges"]
    assert metadata["tokenizer.ggml.merges"] == [f"{left} {right}" for left, right in merges]
    roles = {key: value for key, value in metadata.items() if key.endswith("_token_id")}
    assert roles == {"tokenizer.ggml.eos_token_id": 400}
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert_same_ids(folder, metadata, tmp_path / "back")


@pytest.mark.parametrize(("ignores", "name"), [(True, "llama-bpe"), (False, "dbrx")])
def test_ignoring_merges_is_part_of_the_name(ignores: bool, name: str, prose: Path, tmp_path: Path) -> None:
    cut = pre_tokenizers.Sequence([split(WORDS % r"\p{N}{1,3}"), BYTE_LEVEL])
    folder = save(byte_level(prose, cut, ignore_merges=ignores), tmp_path / "model")
    metadata = vocabulary_metadata(folder, 402)
    assert metadata["tokenizer.ggml.pre"] == name
    assert "tokenizer.huggingface.json" not in metadata
    assert_same_ids(folder, metadata, tmp_path / "back")


@pytest.mark.parametrize(
    ("name", "pattern", "ignores"),
    [("tekken", CASED % ("", "", r"\p{N}"), True), ("gpt-4o", CASED % (SUFFIX, SUFFIX, r"\p{N}{1,3}"), False)],
)
def test_a_name_stands_although_llama_cpp_is_not_exact(
    name: str, pattern: str, ignores: bool, prose: Path, tmp_path: Path
) -> None:
    """It knows the cases of ASCII only; the whole tokenizer goes along for who knows more."""
    cut = pre_tokenizers.Sequence([split(pattern), BYTE_LEVEL])
    folder = save(byte_level(prose, cut, ignore_merges=ignores), tmp_path / "model")
    metadata = vocabulary_metadata(folder, 402)
    assert metadata["tokenizer.ggml.pre"] == name
    assert_same_ids(folder, metadata, tmp_path / "back")


@pytest.mark.parametrize(
    ("normalizer", "cut", "name"),
    [
        (normalizers.NFC(), GPT2, "gpt-2"),
        (normalizers.Lowercase(), GPT2, "gpt-2"),
        (None, pre_tokenizers.ByteLevel(add_prefix_space=True), "default"),
        (None, pre_tokenizers.Sequence([split("[aeiou]"), BYTE_LEVEL]), "default"),
    ],
    ids=["composed", "lower case", "space before", "unknown"],
)
def test_what_a_vocabulary_cannot_say_takes_the_whole_tokenizer(
    normalizer: normalizers.Normalizer | None,
    cut: pre_tokenizers.PreTokenizer,
    name: str,
    prose: Path,
    tmp_path: Path,
) -> None:
    made = byte_level(prose, cut)
    if normalizer is not None:
        made.normalizer = normalizer
    folder = save(made, tmp_path / "model")
    metadata = vocabulary_metadata(folder, 402)
    assert metadata["tokenizer.ggml.pre"] == name
    assert json.loads(metadata["tokenizer.huggingface.json"]) == json.loads(made.to_str())
    assert_same_ids(folder, metadata, tmp_path / "back")


@pytest.mark.parametrize("options", [{"lstrip": True}, {"rstrip": True}, {"single_word": True}])
def test_tokens_with_habits_take_the_whole_tokenizer(options: dict[str, bool], prose: Path, tmp_path: Path) -> None:
    made = byte_level(prose, GPT2)
    made.add_special_tokens([AddedToken("<mask>", **options)])
    folder = save(made, tmp_path / "model", mask_token="<mask>")
    metadata = vocabulary_metadata(folder, 403)
    assert "tokenizer.huggingface.json" in metadata
    assert metadata["tokenizer.ggml.mask_token_id"] == 402
    assert_same_ids(folder, metadata, tmp_path / "back")


def test_vocab_and_merges_are_enough(prose: Path, tmp_path: Path) -> None:
    made = byte_level(prose, GPT2)
    (tmp_path / "model").mkdir()
    made.model.save(str(tmp_path / "model"))
    metadata = vocabulary_metadata(tmp_path / "model", 401)  # transformers' conversion adds <|endoftext|>
    assert metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert_same_ids(tmp_path / "model", metadata, tmp_path / "back")


def test_gaps_are_filled(tmp_path: Path) -> None:
    """Ids that no token has, in the middle and at the end, whatever the names of tokens are."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = tokenizers.Tokenizer(models.BPE({**vocabulary, "ab": 258, "[PAD256]": 259}, [("a", "b")]))
    made.pre_tokenizer, made.decoder = GPT2, decoders.ByteLevel()
    folder = save(made, tmp_path / "model")
    metadata = vocabulary_metadata(folder, 262)
    assert metadata["tokenizer.ggml.tokens"][256:] == [
        "[PAD256]_",
        "[PAD257]",
        "ab",
        "[PAD256]",
        "[PAD260]",
        "[PAD261]",
    ]
    assert metadata["tokenizer.ggml.token_type"].tolist()[256:] == [UNUSED, UNUSED, NORMAL, NORMAL, UNUSED, UNUSED]
    tokenizer = tokenizer_from_metadata(metadata, "f")
    assert tokenizer.encode("ab") == load_tokenizer(folder).encode("ab") == [258]


# Other kinds, or none.


@pytest.mark.parametrize("kind", ["unigram", "words"])
def test_other_kinds_are_no_vocabulary_for_llama_cpp(kind: str, tmp_path: Path) -> None:
    """It would make other ids of it; the whole tokenizer is there for us."""
    model = (
        models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0), ("ab", -1.5)], 0)
        if kind == "unigram"
        else models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]")
    )
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = save(made, tmp_path / "model")
    metadata = vocabulary_metadata(folder, 9)
    assert metadata["tokenizer.ggml.model"] == "none"
    assert len(metadata["tokenizer.ggml.tokens"]) == 9
    assert_same_ids(folder, metadata, tmp_path / "back")


def test_a_tokenizer_that_fails_on_most_texts_goes_along(tmp_path: Path) -> None:
    """Words, and nothing for what is no such word."""
    made = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    metadata = vocabulary_metadata(save(made, tmp_path / "model"), 3)
    tokenizer = tokenizer_from_metadata(metadata, "f")
    assert tokenizer.encode("b a") == [1, 0]
    with pytest.raises(InputError, match="the model's tokenizer fails on this text: WordLevel error"):
        tokenizer.encode("c")


def test_a_folder_without_tokenizer_has_no_vocabulary(tmp_path: Path) -> None:
    assert vocabulary_metadata(tmp_path, 100) == {"tokenizer.ggml.model": "no_vocab"}
    (tmp_path / "chat_template.jinja").write_text("{{ a }}")
    assert vocabulary_metadata(tmp_path, 100)["tokenizer.chat_template"] == "{{ a }}"
