"""Chat templates rendered as transformers renders them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from quantlab import InputError, load_tokenizer
from quantlab.checkpoint.chat_text import chat_template, render_chat
from quantlab.checkpoint.export import export_checkpoint

TEMPLATE = """{%- if messages[0].role == "system" %}
    {{- "<<" + messages[0].content | trim + ">>\\n" }}
{%- endif %}
{% for message in messages %}
    {% if loop.last %}
last: {{ message | tojson }}
    {% else %}
{{ message.role | upper }}: {{ message.content }}
    {% endif %}
{% endfor %}
{{ bos_token }}{{ eos_token }}{% if add_generation_prompt %}assistant:{% endif %}"""
MESSAGES = [
    {"role": "system", "content": "  Be brief. "},
    {"role": "user", "content": 'What is <b>"1 & 1"</b>?'},
    {"role": "assistant", "content": "1, l\u00e4ssig"},
]


@pytest.fixture(scope="module")
def chat_model(llama_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(llama_model, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


def test_the_text_is_transformers(chat_model):
    template = chat_template(chat_model)
    assert template == TEMPLATE
    expected = AutoTokenizer.from_pretrained(chat_model).apply_chat_template(MESSAGES, tokenize=False)
    assert render_chat(template, MESSAGES, load_tokenizer(chat_model), "here") == expected


def test_a_gguf_file_holds_the_template_too(chat_model, tmp_path):
    export_checkpoint(chat_model, tmp_path / "model.gguf", "gguf")
    assert chat_template(tmp_path / "model.gguf") == TEMPLATE


def test_models_without_one(llama_model):
    assert chat_template(llama_model) is None


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for", "unexpected"),
        ("{{ messages[7].content.upper() }}", "has no element 7"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_what_a_template_fails_on_is_one_line(llama_model, template, reason):
    with pytest.raises(InputError) as error:
        render_chat(template, MESSAGES, load_tokenizer(llama_model), "chat.jsonl: line 3")
    message = str(error.value)
    assert message.startswith("chat.jsonl: line 3: the model's chat template fails on these messages: ")
    assert reason in message
    assert "\n" not in message
