"""Chat templates rendered as transformers renders them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from quantlab import InputError, load_tokenizer
from quantlab.checkpoint.chat_text import (
    chat_ids,
    chat_template,
    check_template,
    read_template,
    render_chat,
    render_marked_chat,
)
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


TOOLS = [{"type": "function", "function": {"name": "now", "description": "Caf\u00e9 <time>"}}]
MARKED = """{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}:{% continue %}{% endif %}
{% generation %}{{ m.content }}!{% endgeneration %}
{% endfor %}{% if tools %}{{ tools | tojson(indent=1) }}{% endif %}{% if tools is none %}no tools{% endif %}"""


DATED = """{{ strftime_now('%Y') }} {{ messages[0] | tojson(ensure_ascii=true, separators=(',', ':'), sort_keys=true) }}
{% if strftime_now is defined %}{{ strftime_now('%B') }}{% endif %}"""


@pytest.mark.parametrize("options", [{"generation_prompt": True}, {"tools": TOOLS}])
@pytest.mark.parametrize("template", [TEMPLATE, MARKED, DATED])
def test_a_request_is_transformers_too(llama_model, template, options):
    theirs = {"add_generation_prompt": options.get("generation_prompt", False), "tools": options.get("tools")}
    tokenizer = AutoTokenizer.from_pretrained(llama_model)
    expected = tokenizer.apply_chat_template(MESSAGES[:2], chat_template=template, tokenize=False, **theirs)
    assert render_chat(template, MESSAGES[:2], load_tokenizer(llama_model), "here", **options) == expected


def test_generation_marks_are_spans_of_the_text(llama_model):
    texts = ["why", "so", "how", "thus"]
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    tokenizer = load_tokenizer(llama_model)
    text, spans = render_marked_chat(MARKED, messages, tokenizer, "here")
    assert text == render_chat(MARKED, messages, tokenizer, "here")
    assert [text[start:end] for start, end in spans] == ["so!", "thus!"]
    assert render_marked_chat(TEMPLATE, messages, tokenizer, "here")[1] == []
    with pytest.raises(InputError, match=r"here: holds U\+FDD0"):
        render_marked_chat(MARKED, [{"role": "user", "content": "\ufdd0"}], tokenizer, "here")


def test_ids_have_one_start_token(llama_model):
    tokenizer = load_tokenizer(llama_model)
    assert chat_ids("<s>a", tokenizer) == chat_ids("a", tokenizer) == tokenizer.encode("a")
    assert chat_ids("", tokenizer) == [tokenizer.bos]


def test_a_template_from_a_file(tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text(TEMPLATE, encoding="utf-8")
    assert read_template(file) == TEMPLATE
    file.write_text("{% if %}", encoding="utf-8")
    with pytest.raises(InputError, match=r"chat.jinja: is no template that Jinja reads"):
        read_template(file)
    with pytest.raises(InputError, match="the model's chat template: is no template"):
        check_template("{{")


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
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for i in range(1000000000) %}{% endfor %}", "Range too big"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
    ],
)
def test_what_a_template_fails_on_is_one_line(llama_model, template, reason):
    with pytest.raises(InputError) as error:
        render_chat(template, MESSAGES, load_tokenizer(llama_model), "chat.jsonl: line 3")
    message = str(error.value)
    assert message.startswith("chat.jsonl: line 3: the model's chat template fails on these messages: ")
    assert reason in message
    assert "\n" not in message
