"""The files of a tokenizer that is no model's own."""

from __future__ import annotations

import json
from typing import Any

from quantlab.checkpoint.checkpoint import Checkpoint
from quantlab.checkpoint.json_file import read_json
from quantlab.merging.plan_types import MergedVocabulary

SETTINGS = "tokenizer_config.json"
# What would make the first model's tokenizer again, beside tokenizer.json.
_OTHER_FORMS = ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json")
_OF_THE_FIRST = ("added_tokens_decoder", "extra_special_tokens", "auto_map", "tokenizer_file")


def united_files(vocabulary: MergedVocabulary, companion: Checkpoint) -> dict[str, bytes | None]:
    """tokenizer.json and its settings, and which of the companion's files (None) do not go along."""
    settings: dict[str, Any] = {}
    if (companion.path / SETTINGS).is_file():
        settings = read_json(companion.path / SETTINGS)
    elif not companion.path.is_dir():
        settings = _settings_of_gguf(companion)
    kept = {key: value for key, value in settings.items() if key not in _OF_THE_FIRST}
    # Classes of a family make normalizer and pre-tokenizer anew instead of reading tokenizer.json.
    kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    files: dict[str, bytes | None] = dict.fromkeys(_OTHER_FORMS)
    files["tokenizer.json"] = vocabulary.tokenizer.encode()
    files[SETTINGS] = (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def _settings_of_gguf(companion: Checkpoint) -> dict[str, Any]:
    from quantlab.checkpoint.gguf_file import GgufFile
    from quantlab.checkpoint.gguf_tokenizer import tokenizer_files

    content = tokenizer_files(GgufFile(companion.path).metadata, str(companion.path)).get(SETTINGS, b"{}")
    settings: dict[str, Any] = json.loads(content)
    return settings
