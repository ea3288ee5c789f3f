"""The chat template of a merged model: the most common one of its models, one by name, or the config's own text."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Container, Iterable

from quantlab.checkpoint.chat_text import chat_template
from quantlab.checkpoint.checkpoint import Checkpoint
from quantlab.checkpoint.json_file import read_json

AUTO = "auto"
FILE = "chat_template.jinja"
_OTHER_PLACES = ("tokenizer_config.json", "chat_template.json")  # where a folder may keep one instead
_SPELLED_TOKEN = re.compile(r"<\|[^|<>\s]+\|>|\[\|[^|\[\]\s]+\|\]|\[/?INST\]")

# What these formats put around a conversation; "system" messages come first where a format has no place for them.
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
        "{{ message['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% set kept = namespace(system='') %}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{% set kept.system = message['content'] + '\\n\\n' %}"
        "{% elif message['role'] == 'user' %}"
        "{{ '[INST] ' + kept.system + message['content'] + ' [/INST]' }}{% set kept.system = '' %}"
        "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    "alpaca": (
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
        "{% else %}{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
    ),
    "exaone": (
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ '[|user|]' + message['content'] + '\\n' }}"
        "{% else %}{{ '[|' + message['role'] + '|]' + message['content'] + '[|endofturn|]\\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"
    ),
}


def is_template(text: str) -> bool:
    """Whether a text is written in Jinja, rather than a name."""
    return "{{" in text or "{%" in text


def chosen_template(setting: str, models: Iterable[Checkpoint]) -> str | None:
    """The template that `setting` asks for: a name of `TEMPLATES`, Jinja text, or "auto", which is the one that most
    of the models have, the first of equals; None where none has one.

    Raises:
        InputError: a model's own cannot be read.
    """
    if setting in TEMPLATES:
        return TEMPLATES[setting]
    if setting != AUTO:
        return setting
    found = Counter(template for model in models if (template := chat_template(model.path)) is not None)
    return found.most_common(1)[0][0] if found else None  # of equals, Counter gives the one that came first


def template_files(template: str, companion: Checkpoint, settings: bytes | None = None) -> dict[str, bytes | None]:
    """The files that give a folder with the companion's files this template; None: the companion's is left out.

    Args:
        settings: the tokenizer_config.json that replaces the companion's, if any does.
    """
    files: dict[str, bytes | None] = {FILE: template.encode()}
    for name in _OTHER_PLACES:
        path = companion.path / name
        if settings is not None and name == _OTHER_PLACES[0]:
            content = json.loads(settings)
        elif companion.path.is_dir() and path.is_file():
            content = read_json(path)
        else:
            continue
        if content.pop("chat_template", None) is not None:
            files[name] = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode() if content else None
    return files


def missing_tokens(template: str, known: Container[str] | None) -> list[str]:
    """What the template spells like a special token, and the vocabulary (None: nobody knows it) does not have."""
    if known is None:
        return []
    return sorted({token for token in _SPELLED_TOKEN.findall(template) if token not in known})
