"""GGUF metadata of a folder's tokenizer: ends, chat templates, the way back to a folder, and what is refused."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from byte_level_tokenizers import GPT2, assert_same_ids, byte_level, save
from tokenizers import processors

from quantlab.checkpoint.gguf_tokenizer import tokenizer_files, tokenizer_from_metadata
from quantlab.checkpoint.gguf_vocabulary import vocabulary_metadata
from quantlab.errors import InputError

# Start and ends.


def test_every_end_is_kept(prose: Path, tmp_path: Path) -> None:
    """Those beyond the first as the end of a turn and of a message, unless their spelling says enough."""
    made = byte_level(prose, GPT2)
    made.add_special_tokens(["<|a|>", "<|b|>", "<|im_end|>"])
    folder = save(made, tmp_path / "model", eos_token={"content": "<|b|>"}, pad_token="<|x|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [402, 404, 403, 400, 9999]}))
    metadata = vocabulary_metadata(folder, 405)
    roles = {key: value for key, value in metadata.items() if key.endswith("_token_id")}
    assert roles == {
        "tokenizer.ggml.eos_token_id": 403,
        "tokenizer.ggml.eot_token_id": 400,
        "tokenizer.ggml.eom_token_id": 402,
        "tokenizer.ggml.padding_token_id": 400,
    }
    assert tokenizer_from_metadata(metadata, "f").eos == {400, 402, 403, 404}


def test_config_names_tokens_that_the_settings_do_not(prose: Path, tmp_path: Path) -> None:
    """Ids of no token are not repeated."""
    folder = save(byte_level(prose, GPT2), tmp_path / "model")
    config = {"bos_token_id": 400, "eos_token_id": [401, 400], "pad_token_id": 402, "unk_token_id": -1}
    (folder / "config.json").write_text(json.dumps(config))
    metadata = vocabulary_metadata(folder, 410)
    roles = {key: value for key, value in metadata.items() if key.endswith("_token_id")}
    assert roles == {
        "tokenizer.ggml.bos_token_id": 400,
        "tokenizer.ggml.eos_token_id": 401,
        "tokenizer.ggml.eot_token_id": 400,
    }
    assert metadata["tokenizer.ggml.add_bos_token"] is False


def test_ends_that_only_the_generation_settings_name(prose: Path, tmp_path: Path) -> None:
    folder = save(byte_level(prose, GPT2), tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [401, 400]}))
    metadata = vocabulary_metadata(folder, 402)
    roles = {key: value for key, value in metadata.items() if key.endswith("_token_id")}
    assert roles == {"tokenizer.ggml.eos_token_id": 400, "tokenizer.ggml.eot_token_id": 401}


def test_start_and_end_that_the_tokenizer_adds(prose: Path, tmp_path: Path) -> None:
    made = byte_level(prose, GPT2)
    made.post_processor = processors.TemplateProcessing(
        single="<|x|> $A [y]", special_tokens=[("<|x|>", 400), ("[y]", 401)]
    )
    folder = save(made, tmp_path / "model", bos_token="[y]", eos_token="[y]")
    metadata = vocabulary_metadata(folder, 402)
    assert metadata["tokenizer.ggml.bos_token_id"] == 400  # what is added, not what is named
    assert (metadata["tokenizer.ggml.add_bos_token"], metadata["tokenizer.ggml.add_eos_token"]) == (True, True)
    assert_same_ids(folder, metadata, tmp_path / "back")
    back = tokenizers.Tokenizer.from_file(str(tmp_path / "back" / "tokenizer.json"))
    assert back.encode("a house").ids == made.encode("a house").ids


# Chat templates.


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"chat_template.jinja": "{{ \u00e9 }}\r\n"}, {"": "{{ \u00e9 }}\r\n"}),
        ({"tokenizer_config.json": '{"chat_template": "{{ b }}"}'}, {"": "{{ b }}"}),
        ({"chat_template.jinja": "a", "tokenizer_config.json": '{"chat_template": "b"}'}, {"": "a"}),
        ({"chat_template.json": '{"chat_template": "c"}'}, {"": "c"}),
        ({"tokenizer_config.json": '{"chat_template": null}'}, {}),
        (
            {"tokenizer_config.json": json.dumps({"chat_template": [
                {"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]})},
            {"": "a", ".tool_use": "b", "s": ["tool_use"]},
        ),
        (
            {"tokenizer_config.json": '{"chat_template": [{"name": "rag", "template": "b"}]}'},
            {".rag": "b", "s": ["rag"]},
        ),
        (
            {"chat_template.jinja": "a", "additional_chat_templates/rag-1.jinja": "b"},
            {"": "a", ".rag-1": "b", "s": ["rag-1"]},
        ),
    ],
    ids=range(8),
)  # fmt: skip
def test_chat_templates_go_along(files: dict[str, str], expected: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "additional_chat_templates").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.encode())
    metadata = vocabulary_metadata(tmp_path, 10)
    del metadata["tokenizer.ggml.model"]
    assert metadata == {f"tokenizer.chat_template{name}": value for name, value in expected.items()}


def test_chat_templates_come_back(tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tokenizer_folder, tmp_path / "model")
    (folder / "chat_template.jinja").write_bytes("{% for m in messages %}\r\n\u00e9{% endfor %}\n\n".encode())
    files = tokenizer_files(vocabulary_metadata(folder, 512), "f")
    assert files["chat_template.jinja"] == (folder / "chat_template.jinja").read_bytes()


# What is refused.


def refusal(folder: Path, rows: int = 512) -> str:
    with pytest.raises(InputError) as caught:
        vocabulary_metadata(folder, rows)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_more_tokens_than_rows_are_refused(tokenizer_folder: Path) -> None:
    problem = "its tokenizer has token 511, the model's embedding 511 rows; the tokenizer is another model's"
    assert refusal(tokenizer_folder, 511) == f"{tokenizer_folder}: {problem}"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", b"\xff\xfe"),
        ("chat_template.json", b"[]"),
        ("tokenizer_config.json", b"\xff"),
        ("tokenizer_config.json", b"[" * 100_000),
        ("tokenizer_config.json", b'{"chat_template": 5}'),
        ("tokenizer_config.json", b'{"chat_template": [5]}'),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "x"}]}'),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "../x", "template": "a"}]}'),
        ("tokenizer.json", b"\xff"),
        ("tokenizer.json", b"{}"),
        ("config.json", b"nothing"),
        ("generation_config.json", b"[]"),
    ],
    ids=range(12),
)
def test_broken_files_are_refused(name: str, content: bytes, tokenizer_folder: Path, tmp_path: Path) -> None:
    shutil.copy(tokenizer_folder / "tokenizer.json", tmp_path)
    (tmp_path / name).write_bytes(content)
    assert refusal(tmp_path).startswith(f"{tmp_path}")


def test_two_tokens_with_one_id_are_refused(prose: Path, tmp_path: Path) -> None:
    """The library reads such a file, and writes another."""
    folder = save(byte_level(prose, GPT2), tmp_path / "model")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["H"] = content["model"]["vocab"]["!"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert refusal(folder) == f"{folder}: its tokenizer is another one once it is written and read; mend it"


def test_the_unigram_model_of_sentencepiece_is_refused(prose: Path, tmp_path: Path) -> None:
    """Without tokenizer.json there is nothing that reads it rightly."""
    buffer = io.BytesIO()
    lines = iter(prose.read_text(encoding="utf-8").split("\n"))
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=lines, model_writer=buffer, model_type="unigram", vocab_size=200, num_threads=1, minloglevel=2
    )
    (tmp_path / "tokenizer.model").write_bytes(buffer.getvalue())
    assert refusal(tmp_path).startswith(f"{tmp_path}: its tokenizer cannot be converted: ")
