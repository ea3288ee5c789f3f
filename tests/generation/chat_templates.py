"""Chat templates in the shapes that models bring them, and tokenizers that know their marks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from quantlab import load_tokenizer
from quantlab.checkpoint.tokenizer import Tokenizer

TESTS = Path(__file__).parents[1]
MARKS = ["<|end_of_text|>", "<|begin|>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>", "<turn>",
         "</turn>"]  # fmt: skip


@lru_cache
def byte_level(eos: str = "<|end_of_text|>", bos: str | None = None) -> Tokenizer:
    """GPT-2's kind of tokenizer, a few hundred tokens trained on the project's prose."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=MARKS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator((TESTS / "data" / "prose.txt").read_text(encoding="utf-8").splitlines(), trainer)
    return Tokenizer(backend, None if bos is None else backend.token_to_id(bos), frozenset({backend.token_to_id(eos)}))


@lru_cache
def sentencepiece() -> Tokenizer:
    """Llama's kind, that of the shipped model: a space before every text, <s> and </s>."""
    return load_tokenizer(TESTS.parent / "models" / "fable-9m")


def spelt(words: Tokenizer, text: str, end: str | None = None) -> list[int]:
    """A token for each letter, as no tokenizer would cut a text, and an end token."""
    pieces = {" ": ("\u0120", "\u2581"), "\n": ("\u010a", "<0x0A>")}  # byte-level, SentencePiece
    ids = []
    for letter in text:
        found = [words.backend.token_to_id(piece) for piece in pieces.get(letter, (letter,))]
        ids += [token for token in found if token is not None][:1]
    assert len(ids) == len(text)
    return [*ids, *([words.backend.token_to_id(end)] if end else [])]


# ChatML (Qwen, and many fine-tunes): a system prompt of its own where none is given.
CHATML = """\
{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}
{%- for message in messages %}{{ '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# Llama 3: headers, the content trimmed, the start token written once.
HEADERS = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|head|>' ~ message.role ~ '<|/head|>\n\n' ~ message.content | trim ~ '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"""
# Mistral: no generation prompt, no system role, turns by force in order.
BRACKETS = """\
{{- bos_token }}
{%- for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must take turns') }}{% endif %}
{%- if message.role == 'user' %}{{ '[INST] ' ~ message.content ~ ' [/INST]' }}
{%- else %}{{ ' ' ~ message.content | trim ~ eos_token }}{% endif %}
{%- endfor %}"""
# Gemma: the assistant is called model; a system prompt is refused.
TURNS = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
{{- '<turn>' ~ ('model' if message.role == 'assistant' else message.role) ~ '\n' }}
{{- message.content | trim ~ '</turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"""
# A model that reasons: the thoughts of earlier answers are not shown to it again.
THOUGHTS = """\
{%- for message in messages %}
{{- '<|im_start|>' ~ message.role ~ '\n' ~ (message.content if loop.last else message.content.split('</think>')[-1])
 ~ '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# Mistral Nemo: the system prompt moves to the last question.
MOVES_SYSTEM = """\
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- for message in messages if message.role != 'system' %}
{%- if message.role == 'user' %}{{ '<turn>' ~ (system ~ '\n\n' if loop.last else '') ~ message.content }}
{%- else %}{{ '</turn>' ~ message.content ~ eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '</turn>' }}{% endif %}"""
# Alpaca: text alone.
ALPACA = """\
{%- for message in messages %}
{%- if message.role == 'system' %}{{ message.content ~ '\n\n' }}
{%- elif message.role == 'user' %}{{ '### Instruction:\n' ~ message.content ~ '\n\n' }}
{%- else %}{{ '### Response:\n' ~ message.content ~ '\n\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"""


@dataclass(frozen=True)
class Case:
    """A template, the model's tokenizer, and the token that ends an answer."""

    template: str
    words: Callable[[], Tokenizer]
    end: str


CASES = {
    "chatml": Case(CHATML, byte_level, "<|im_end|>"),
    "headers": Case(HEADERS, partial(byte_level, bos="<|begin|>"), "<|eot|>"),
    "brackets": Case(BRACKETS, sentencepiece, "</s>"),
    "turns": Case(TURNS, partial(byte_level, "</turn>", "<|begin|>"), "</turn>"),
}
