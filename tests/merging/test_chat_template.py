"""The chat template of the output."""

import json
from types import SimpleNamespace

import pytest
from merge_models import LETTERS, llama, planned

from quantlab.checkpoint.chat_text import render_chat
from quantlab.merging.chat_template import TEMPLATES, missing_tokens
from quantlab.merging.faults import MergeError

TALK = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
)
RENDERED = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Be brief.\n\nHi [/INST] Hello</s>[INST] Bye [/INST]",
    "alpaca": "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello</s>\n\n"
    "### Instruction:\nBye\n\n### Response:\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n[|assistant|]Hello[|endofturn|]\n"
    "[|user|]Bye\n[|assistant|]",
}


class Pieces:
    bos, eos = 0, frozenset([1])
    backend = SimpleNamespace(id_to_token=lambda number: LETTERS[number])


@pytest.mark.parametrize("name", TEMPLATES)
def test_named_templates(name):
    assert render_chat(TEMPLATES[name], TALK, Pieces(), name, generation_prompt=True) == RENDERED[name]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    one, two = "{{ 'one' }}", "{{ 'two' }}"
    settings = {"chat_template": two, "tokenizer_class": "X"}
    return {
        "none": llama(root / "none"),
        "file": llama(root / "file", files={"chat_template.jinja": one}),
        "settings": llama(root / "settings", files={"tokenizer_config.json": settings}),
        "same": llama(root / "same", files={"chat_template.jinja": two}),
    }


def config(folders, *names, template=None):
    listed = "".join(f"- model: {folders[name]}\n" for name in names)
    setting = "" if template is None else f"chat_template: {json.dumps(template)}\n"
    return f"models:\n{listed}merge_method: linear\nparameters: {{weight: 1}}\n{setting}"


def test_auto_takes_the_most_common_one(folders):
    plan = planned(config(folders, "file", "settings", "same", template="auto"))
    assert plan.files == {"chat_template.jinja": b"{{ 'two' }}"}
    assert planned(config(folders, "file", "settings", template="auto")).files["chat_template.jinja"] == b"{{ 'one' }}"


def test_auto_with_nothing_to_take(folders):
    plan = planned(config(folders, "none", template="auto"))
    assert (plan.files, plan.notes) == ({}, ("chat_template: auto: none of the models has one",))


def test_a_template_of_ones_own_replaces_the_one_in_the_settings(folders):
    plan = planned(config(folders, "settings", template="{{ messages[0] }}"))
    assert plan.files["chat_template.jinja"] == b"{{ messages[0] }}"
    assert json.loads(plan.files["tokenizer_config.json"]) == {"tokenizer_class": "X"}


def test_a_named_template_whose_tokens_are_missing_is_noted(folders):
    plan = planned(config(folders, "none", template="chatml"))
    assert plan.files == {"chat_template.jinja": TEMPLATES["chatml"].encode()}
    assert plan.notes == ("the chat template writes <|im_end|>, <|im_start|>, no tokens of the output's",)
    assert missing_tokens(TEMPLATES["chatml"], {"<|im_end|>": 1}) == ["<|im_start|>"]
    assert missing_tokens(TEMPLATES["chatml"], None) == []


def test_nothing_said(folders):
    assert planned(config(folders, "file", "none")).files == {}
    assert planned(config(folders, "file", "none")).notes == ()
    plan = planned(config(folders, "none", "file"))
    assert plan.notes == ("the output has no chat template, others of the models have: chat_template: auto",)


def test_broken_jinja_in_a_config(folders):
    with pytest.raises(MergeError, match="line 5: chat_template: is no template that Jinja reads"):
        planned(config(folders, "none", template="{% for %}"))
