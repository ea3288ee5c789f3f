"""Tokenizers from GGUF metadata: the files of a folder made of them, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_tokens import MERGES, PIECES
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_vocabularies import (
    CONTROL,
    USER_DEFINED,
    byte_level_vocabulary,
    sentencepiece_vocabulary,
)
from transformers import AutoTokenizer

from quantlab.checkpoint import load_tokenizer
from quantlab.checkpoint.gguf_tokenizer import tokenizer_files, tokenizer_from_metadata
from quantlab.errors import InputError

# The files of a folder.

ROUND_TRIP = {
    "sentencepiece": sentencepiece_vocabulary(PIECES, {"<|im_end|>": CONTROL, "<x>": USER_DEFINED}, padding_token_id=0),
    "no space before": sentencepiece_vocabulary(PIECES, add_space_prefix=False, add_bos_token=False),
    "gpt-2": byte_level_vocabulary(MERGES, "gpt-2", {"<|x|>": CONTROL, "[y]": USER_DEFINED}, eos_token_id=267),
    "llama-bpe": byte_level_vocabulary(MERGES, "llama-bpe", {"<|x|>": CONTROL}, bos_token_id=267, eos_token_id=267),
    "adds end": byte_level_vocabulary(
        MERGES, "qwen2", {"<|x|>": CONTROL, "<|y|>": CONTROL}, bos_token_id=267, eos_token_id=268, add_bos_token=True,
        add_eos_token=True,
    ),
}  # fmt: skip
TEXTS = [
    "",
    " ",
    "a",
    " ab  hell 's\n\n12 \u00e9\U0001f600",
    "x<|x|> a</s>a<x>b<|im_end|>\n[y] c",
    "\t'S \u3000",
    "ABC  ",
]


def write_files(metadata: dict[str, Any], folder: Path) -> Path:
    for name, content in tokenizer_files(metadata, "f").items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("name", ROUND_TRIP)
def test_the_files_make_the_same_tokenizer(name: str, tmp_path: Path) -> None:
    """Here and in transformers."""
    expected = tokenizer_from_metadata(ROUND_TRIP[name], "f")
    write_files(ROUND_TRIP[name], tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(str(tmp_path))
    end = [max(expected.eos)] if name == "adds end" else []
    for text in TEXTS:
        ids = expected.encode(text)
        assert ours.encode(text) == ids
        assert theirs.encode(text) == ids + end
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == expected.decode(ids)
    assert (ours.bos, ours.eos) == (expected.bos, expected.eos)
    assert expected.bos is None or theirs.bos_token_id == expected.bos


def test_the_settings_name_the_tokens() -> None:
    settings_of = json.loads(tokenizer_files(ROUND_TRIP["sentencepiece"], "f")["tokenizer_config.json"])
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    assert {role: settings_of.get(role) for role in tokens} == tokens
    assert settings_of["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (settings_of["add_bos_token"], settings_of["add_eos_token"]) == (True, False)


def test_only_added_tokens_are_named() -> None:
    """transformers makes a special token of whatever the settings name, and finds it in texts."""
    files = tokenizer_files(byte_level_vocabulary("a b", eos_token_id=256), "f")
    assert "eos_token" not in json.loads(files["tokenizer_config.json"])


def test_several_ends_are_in_the_generation_settings() -> None:
    """config.json has room for one."""
    metadata = byte_level_vocabulary("", "gpt-2", {"<|x|>": CONTROL, "<|im_end|>": CONTROL}, eos_token_id=256)
    assert json.loads(tokenizer_files(metadata, "f")["generation_config.json"])["eos_token_id"] == [256, 257]
    assert "generation_config.json" not in tokenizer_files(SPM, "f")


def test_one_chat_template_is_a_file_of_its_own() -> None:
    template = "{% for m in messages %}\u00ab{{ m.content }}\u00bb\r\n{% endfor %}"
    files = tokenizer_files({**ROUND_TRIP["gpt-2"], "tokenizer.chat_template": template}, "f")
    assert files["chat_template.jinja"].decode() == template
    assert "chat_template" not in json.loads(files["tokenizer_config.json"])


def test_several_chat_templates_are_in_the_settings(tmp_path: Path) -> None:
    """Where transformers looks for templates with names."""
    templates = {"": "{{ a }}", ".tool_use": "{{ b }}", ".rag-2": "{{ c }}"}
    metadata = {**ROUND_TRIP["gpt-2"], **{f"tokenizer.chat_template{name}": text for name, text in templates.items()}}
    metadata["tokenizer.chat_templates"] = ["tool_use", "rag-2"]
    write_files(metadata, tmp_path)
    assert not (tmp_path / "chat_template.jinja").exists()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    found = AutoTokenizer.from_pretrained(str(tmp_path)).chat_template
    assert found == {"default": "{{ a }}", "tool_use": "{{ b }}", "rag-2": "{{ c }}"}


def test_without_vocabulary_there_are_no_files() -> None:
    assert tokenizer_files({"tokenizer.ggml.model": "no_vocab"}, "f") == {}
    assert tokenizer_files({}, "f") == {}
    with_template = tokenizer_files({"tokenizer.ggml.model": "none", "tokenizer.chat_template": "{{ a }}"}, "f")
    assert with_template == {"chat_template.jinja": b"{{ a }}"}


# What is refused.

WORD, SPM = byte_level_vocabulary(MERGES, "gpt-2", {"<|x|>": CONTROL}), sentencepiece_vocabulary(PIECES)


@pytest.mark.parametrize(
    ("metadata", "key", "problem"),
    [
        ({}, "", "holds no vocabulary"),
        ({"tokenizer.ggml.model": "no_vocab"}, "", "holds no vocabulary"),
        ({"tokenizer.ggml.model": "rwkv"}, "model", "is 'rwkv' instead of a kind that is read"),
        ({"tokenizer.ggml.model": 7}, "model", "is 7 instead of text"),
        ({"tokenizer.ggml.model": "gpt2"}, "tokens", "is missing"),
        ({**WORD, "tokenizer.ggml.tokens": []}, "tokens", "is empty"),
        ({**WORD, "tokenizer.ggml.tokens": "abc"}, "tokens", "is 'abc' instead of a list of texts"),
        ({**WORD, "tokenizer.ggml.tokens": ["a", 1]}, "tokens", "is ['a', 1] instead of a list of texts"),
        ({**WORD, "tokenizer.ggml.tokens": ["a", "b", "a"]}, "tokens", "has 'a' twice, as 0 and as 2"),
        ({**WORD, "tokenizer.ggml.tokens": ["a" * 1025]}, "tokens", "has a token of 1025 characters"),
        ({**WORD, "tokenizer.ggml.token_type": [1, 2]}, "token_type", "has 2 numbers for 268 tokens"),
        ({**WORD, "tokenizer.ggml.token_type": [1.5] * 268}, "token_type", "instead of a list of numbers"),
        ({**WORD, "tokenizer.ggml.token_type": [[1], [2, 3]]}, "token_type", "instead of a list of numbers"),
        ({**WORD, "tokenizer.ggml.token_type": "x"}, "token_type", "is 'x' instead of a list of numbers"),
        ({**WORD, "tokenizer.ggml.token_type": [10**30] * 268}, "token_type", "instead of a list of numbers"),
        ({**WORD, "tokenizer.ggml.merges": None}, "merges", "is None instead of a list of texts"),
        ({**WORD, "tokenizer.ggml.merges": ["ab"]}, "merges", "has 'ab', which is no pair of tokens"),
        ({**WORD, "tokenizer.ggml.merges": [""]}, "merges", "has '', which is no pair of tokens"),
        ({**WORD, "tokenizer.ggml.merges": ["a nowhere"]}, "merges", "nowhere"),
        ({**WORD, "tokenizer.ggml.merges": ["x y"]}, "merges", "xy"),
        ({**WORD, "tokenizer.ggml.pre": "unheard-of"}, "pre", "is 'unheard-of' instead of a name that is known"),
        ({**WORD, "tokenizer.ggml.pre": True}, "pre", "is True instead of text"),
        (
            {**WORD, "tokenizer.ggml.bos_token_id": 268},
            "bos_token_id",
            "is 268 instead of a whole number from 0 to 267",
        ),
        ({**WORD, "tokenizer.ggml.eos_token_id": -2}, "eos_token_id", "is -2 instead of"),
        ({**WORD, "tokenizer.ggml.eot_token_id": "x"}, "eot_token_id", "is 'x' instead of"),
        ({**WORD, "tokenizer.ggml.padding_token_id": True}, "padding_token_id", "is True instead of"),
        ({**WORD, "tokenizer.ggml.eos_token_id": np.zeros(3)}, "eos_token_id", "instead of a whole number"),
        ({**WORD, "tokenizer.ggml.add_bos_token": "yes"}, "add_bos_token", "is 'yes' instead of true or false"),
        ({**SPM, "tokenizer.ggml.scores": [1.0]}, "scores", "has 1 numbers for 269 tokens"),
        ({**SPM, "tokenizer.ggml.scores": [float("nan")] * 269}, "scores", "holds what is no finite number"),
        ({**SPM, "tokenizer.ggml.scores": ["x"] * 269}, "scores", "instead of a list of numbers"),
        ({**SPM, "tokenizer.ggml.add_space_prefix": 1}, "add_space_prefix", "is 1 instead of true or false"),
        ({key: value for key, value in SPM.items() if key != "tokenizer.ggml.scores"}, "scores", "is missing"),
    ],
    ids=range(33),
)
def test_broken_metadata_is_refused_in_one_line(metadata: dict[str, Any], key: str, problem: str) -> None:
    with pytest.raises(InputError) as caught:
        tokenizer_from_metadata(metadata, "dir/model.gguf")
    message = str(caught.value)
    assert message.startswith(f"dir/model.gguf: tokenizer.ggml.{key}" if key else "dir/model.gguf: ")
    assert problem in message
    assert "\n" not in message
    assert len(message) < 600


def test_pieces_of_pieces_of_pieces_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of a megabyte can hold pieces with millions of merges."""
    runs = {"a" * length: -float(length) for length in range(1, 12)}
    monkeypatch.setattr("quantlab.checkpoint.gguf_bpe.MAX_MERGES", 55)
    tokenizer_from_metadata(sentencepiece_vocabulary(runs), "f")
    with pytest.raises(
        InputError, match=r"f: tokenizer\.ggml\.tokens has pieces that others make in more than 55 ways"
    ):
        tokenizer_from_metadata(sentencepiece_vocabulary({**runs, "a" * 12: -12.0}), "f")


@pytest.mark.parametrize("content", ["", "{}", "no JSON", '{"model": {"type": "BPE"}}', "[" * 100_000, 5])
def test_a_broken_whole_tokenizer_is_refused(content: object) -> None:
    with pytest.raises(InputError) as caught:
        tokenizer_from_metadata({"tokenizer.huggingface.json": content}, "f")
    assert str(caught.value).startswith("f: tokenizer.huggingface.json")
    assert "\n" not in str(caught.value)


def test_a_whole_tokenizer_may_not_exceed_the_vocabulary(tokenizer_folder: Path) -> None:
    """Its ids would point behind the embedding."""
    whole = (tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8")
    with pytest.raises(InputError, match=r"f: tokenizer\.huggingface\.json has token 511, and .* 269 tokens"):
        tokenizer_from_metadata({**SPM, "tokenizer.huggingface.json": whole}, "f")


@pytest.mark.parametrize(
    "broken",
    [
        {"tokenizer.chat_template": 5},
        {"tokenizer.chat_template.rag": ["x"]},
        {"tokenizer.chat_template.": "x"},
        {"tokenizer.chat_template.../../x": "x"},
        {"tokenizer.chat_template.a\nb": "x"},
    ],
    ids=range(5),
)
def test_broken_templates_are_refused(broken: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        tokenizer_files({**WORD, **broken}, "f")
    assert str(caught.value).startswith("f: tokenizer.chat_template")
    assert "\n" not in str(caught.value)


ODD_VALUES = st.sampled_from(
    [None, True, 0, -1, 5, 2**32 - 1, 2**40, 1.5, float("nan"), "", "x", "llama", "gpt2", "gemma4", "\u2581" * 50, [],
     [""], ["a"], ["a b"], ["a", "a"], [1], [1.5], [[1], [2]], {"a": 1}, np.zeros(3), np.zeros((2, 2)), np.arange(269)]
)  # fmt: skip


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.sampled_from([WORD, SPM]), st.data())
def test_whatever_the_metadata_it_is_a_tokenizer_or_one_line(base: dict[str, Any], data: st.DataObject) -> None:
    """Two values of a good file are replaced by others."""
    keys = sorted({*base, "tokenizer.ggml.bos_token_id", "tokenizer.ggml.add_bos_token", "tokenizer.huggingface.json"})
    changed = {data.draw(st.sampled_from(keys)): data.draw(ODD_VALUES) for _ in range(2)}
    try:
        tokenizer = tokenizer_from_metadata({**base, **changed}, "f")
    except InputError as error:
        refusal = str(error)
    else:
        ids = tokenizer.encode("ab <|x|> 12 \u00e9")
        assert isinstance(tokenizer.decode(ids), str)
        assert max(ids, default=0) < 269
        return
    assert refusal.startswith("f: ")
    assert "\n" not in refusal


# What it costs.


def test_no_heavy_package_is_loaded(tmp_path: Path) -> None:
    """From metadata to ids, numpy and tokenizers do."""
    code = (
        "import json, sys; from quantlab.checkpoint.gguf_tokenizer import tokenizer_from_metadata, tokenizer_files\n"
        "metadata = json.load(open(sys.argv[1]))\n"
        "print(tokenizer_from_metadata(metadata, 'f').encode('hello we'), len(tokenizer_files(metadata, 'f')))\n"
        "heavy = ('torch', 'transformers', 'gguf', 'sentencepiece', 'jinja2', 'huggingface_hub')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    plain = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in WORD.items()}
    (tmp_path / "m.json").write_text(json.dumps(plain))
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m.json")], capture_output=True, text=True, check=True, timeout=120
    )
    ids = tokenizer_from_metadata(WORD, "f").encode("hello we")
    assert done.stdout.splitlines() == [f"{ids} 2", "[]"]
