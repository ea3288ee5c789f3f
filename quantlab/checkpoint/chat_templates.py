"""Chat templates between a Hugging Face folder's files and a GGUF file's metadata.

A model has one template, or several with names, of which "default" is the one. In metadata they are
`tokenizer.chat_template`, `tokenizer.chat_template.NAME`, and the list of those names in `tokenizer.chat_templates`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from quantlab.checkpoint.gguf_values import VocabularyValues
from quantlab.checkpoint.json_file import read_json
from quantlab.checkpoint.tokenizer import read_text
from quantlab.errors import InputError

TEMPLATE = "tokenizer.chat_template"
NAMES = "tokenizer.chat_templates"
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
DEFAULT = "default"
CHAT_TEMPLATE_FILE = "chat_template.jinja"


def template_metadata(folder: Path) -> dict[str, Any]:
    """The metadata of a folder's chat templates; empty if it has none.

    Raises:
        InputError: a file that may hold one is broken, or a template has no name that a key can hold.
    """
    templates = _folder_templates(folder)
    named = {name: text for name, text in templates.items() if name != DEFAULT}
    for name in named:
        if not NAME.fullmatch(name):
            raise InputError(f"{folder}: chat template {name[:40]!r}: a name is up to 64 letters, digits, - and _")
    metadata: dict[str, Any] = {f"{TEMPLATE}.{name}": text for name, text in named.items()}
    if named:
        metadata[NAMES] = list(named)
    if DEFAULT in templates:
        metadata[TEMPLATE] = templates[DEFAULT]
    return metadata


def _folder_templates(folder: Path) -> dict[str, str]:
    """By name. Files of their own win over tokenizer_config.json, as in transformers."""
    templates = {}
    if (folder / CHAT_TEMPLATE_FILE).is_file():
        templates[DEFAULT] = read_text(folder / CHAT_TEMPLATE_FILE)
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[file.stem] = read_text(file)
    for name in ("tokenizer_config.json", "chat_template.json"):
        if not templates and (folder / name).is_file():
            templates = _listed_templates(read_json(folder / name).get("chat_template"), folder / name)
    return templates


def _listed_templates(value: object, file: Path) -> dict[str, str]:
    """A JSON value: one template, or a list of objects with name and template."""
    entries = value if isinstance(value, list) else [] if value is None else [{"name": DEFAULT, "template": value}]
    templates = {}
    for entry in entries:
        name, template = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(template, str):
            raise InputError(f"{file}: chat_template is neither a text nor a list of names and templates")
        templates[name] = template
    return templates


def template_files(values: VocabularyValues, settings: dict[str, Any]) -> dict[str, bytes]:
    """`tokenizer_config.json` of `settings`, and the templates in it or beside it; nothing where there is neither.

    Raises:
        InputError: a template is no text, or its name none.
    """
    templates = {DEFAULT: values.text(TEMPLATE)} if values.has(TEMPLATE) else {}
    for name in values.names_below(f"{TEMPLATE}."):
        if not NAME.fullmatch(name):
            raise values.fault(f"{TEMPLATE}.{name[:40]}", "is no name of a chat template")
        templates[name] = values.text(f"{TEMPLATE}.{name}")
    files: dict[str, bytes] = {}
    if templates.keys() - {DEFAULT}:
        listed = [{"name": name, "template": text} for name, text in templates.items()]
        settings = {**settings, "chat_template": listed}
    elif templates:
        files[CHAT_TEMPLATE_FILE] = templates[DEFAULT].encode()
    if settings:
        files["tokenizer_config.json"] = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
    return files
