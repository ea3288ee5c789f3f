"""A tokenizer from the vocabulary in a GGUF file's metadata, with the ids that llama.cpp gives; and its files.

Two kinds of vocabulary are known: SentencePiece's ("llama"), where the score of a piece is its rank as a merge, and
byte-level BPE ("gpt2"; "gemma4" is the same on characters), where merges are listed and `tokenizer.ggml.pre` says how a
text is cut into words first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import islice
from typing import Any

import numpy as np

from quantlab.checkpoint.chat_templates import template_files
from quantlab.checkpoint.gguf_bpe import Vocabulary, bpe_of_merges, bpe_of_scores
from quantlab.checkpoint.gguf_special_tokens import NORMAL, UNUSED, SpecialTokens, special_tokens
from quantlab.checkpoint.gguf_values import VocabularyValues
from quantlab.checkpoint.pretokenizers import PRETOKENIZERS, PreTokenizer
from quantlab.checkpoint.tokenizer import Tokenizer, faults_reported, parse_tokenizer, start_token
from quantlab.errors import InputError

KIND = "tokenizer.ggml.model"
PRE = "tokenizer.ggml.pre"
TOKENS = "tokenizer.ggml.tokens"
TYPES = "tokenizer.ggml.token_type"
SCORES = "tokenizer.ggml.scores"
MERGES = "tokenizer.ggml.merges"
ADD_BOS = "tokenizer.ggml.add_bos_token"
ADD_EOS = "tokenizer.ggml.add_eos_token"
ADD_SPACE_PREFIX = "tokenizer.ggml.add_space_prefix"
HUGGINGFACE_JSON = "tokenizer.huggingface.json"

SENTENCEPIECE, BYTE_LEVEL, CHARACTER_LEVEL = "llama", "gpt2", "gemma4"
KINDS = (SENTENCEPIECE, BYTE_LEVEL, CHARACTER_LEVEL)
NO_VOCABULARY = ("no_vocab", "none")
ROLES = ("bos", "eos", "unk", "pad", "sep", "mask")  # of which a folder's settings speak
LONGEST_TOKEN = 1024  # characters; the longest in use are runs of 128, and a piece is cut up in every way
# The ids that a file need not state. (llama.cpp has 11 for byte-level vocabularies too, which is Falcon's alone.)
DEFAULT_IDS = {SENTENCEPIECE: {"bos": 1, "eos": 2, "unk": 0}}


def tokenizer_from_metadata(metadata: Mapping[str, Any], source: str) -> Tokenizer:
    """The tokenizer whose vocabulary `metadata` holds; `source` names the file in errors.

    Texts of special tokens are parsed where they stand in a text. A whole `tokenizer.huggingface.json` wins over the
    vocabulary.

    Raises:
        InputError: the vocabulary is of a kind that is not known here, or missing, or damaged.
    """
    values = VocabularyValues(metadata, source)
    kind = values.text(KIND, NO_VOCABULARY[0])
    whole = values.has(HUGGINGFACE_JSON)
    if not whole and kind in NO_VOCABULARY:
        raise InputError(f"{source}: holds no vocabulary; give a file that does, or a folder with a tokenizer")
    if not whole and kind not in KINDS:
        raise values.refusal(
            KIND, f"a kind that is read ({', '.join(KINDS)})", "give a folder with a tokenizer instead"
        )
    vocabulary = _read_vocabulary(values, kind)
    if whole:
        return _huggingface_tokenizer(vocabulary)
    with faults_reported(f"{source}: its vocabulary makes no tokenizer"):
        if kind == SENTENCEPIECE:
            return _sentencepiece_tokenizer(vocabulary)
        return _bpe_tokenizer(vocabulary, kind)


def tokenizer_files(metadata: Mapping[str, Any], source: str) -> dict[str, bytes]:
    """The files of a Hugging Face folder that make the same tokenizer there, by name; without a vocabulary no more than
    the chat templates. Where several tokens end a text, generation_config.json names them.

    Raises:
        InputError: as for `tokenizer_from_metadata`, or a chat template is no text.
    """
    values = VocabularyValues(metadata, source)
    kind = values.text(KIND, NO_VOCABULARY[0])
    if kind in NO_VOCABULARY and not values.has(HUGGINGFACE_JSON):
        return template_files(values, {})
    tokenizer = tokenizer_from_metadata(metadata, source)
    ids = _read_vocabulary(values, kind).special.ids
    added = tokenizer.backend.get_added_tokens_decoder()  # transformers would look for others in texts too
    settings = {
        # LlamaTokenizer and its like make normalizer and pre-tokenizer anew instead of reading tokenizer.json.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{role}_token": added[ids[role]].content for role in ROLES if ids.get(role) in added},
        "add_bos_token": tokenizer.bos is not None,
        "add_eos_token": values.flag(ADD_EOS, False),
        "clean_up_tokenization_spaces": False,
    }
    files = {"tokenizer.json": tokenizer.backend.to_str(pretty=False).encode(), **template_files(values, settings)}
    if len(tokenizer.eos) > 1:
        ends = {"bos_token_id": ids.get("bos"), "eos_token_id": sorted(tokenizer.eos), "pad_token_id": ids.get("pad")}
        files["generation_config.json"] = (json.dumps(ends) + "\n").encode()
    return files


# Reading.


def _read_vocabulary(values: VocabularyValues, kind: str) -> Vocabulary:
    tokens = values.texts(TOKENS) if kind in KINDS or values.has(TOKENS) else []
    if kind in KINDS and not tokens:
        raise values.fault(TOKENS, "is empty")
    longest = max(map(len, tokens), default=0)
    if longest > LONGEST_TOKEN:
        raise values.fault(TOKENS, f"has a token of {longest} characters")
    index = {token or f"[EMPTY_{i}]": i for i, token in enumerate(tokens)}  # as llama.cpp names them
    if len(index) < len(tokens):
        first = next(i for i, token in enumerate(tokens) if index.get(token, i) != i)
        raise values.fault(TOKENS, f"has {tokens[first][:40]!r} twice, as {first} and as {index[tokens[first]]}")
    types = np.full(len(tokens), NORMAL)
    if values.has(TYPES):
        types = values.numbers(TYPES, "iu", len(tokens))
    special = special_tokens(values, index, types, DEFAULT_IDS.get(kind, {}))
    return Vocabulary(values, _without_padding(index, special), special)


def _without_padding(index: dict[str, int], special: SpecialTokens) -> dict[str, int]:
    """Leave out what only fills the vocabulary up to the embedding's rows: unused tokens "[PADn]" at its end."""
    count, named = len(index), set(special.ids.values())
    for token, i in reversed(index.items()):
        if special.types[i] != UNUSED or token != f"[PAD{i}]" or i in named:
            break
        count -= 1
    return index if count == len(index) else dict(islice(index.items(), count))


def _start(vocabulary: Vocabulary, usually: bool, always: bool = False) -> int | None:
    """The token to put before every text."""
    adds = always or vocabulary.values.flag(ADD_BOS, usually)
    return vocabulary.special.ids.get("bos") if adds else None


# Building.


def _huggingface_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    values, rows = vocabulary.values, len(vocabulary.special.types)
    where = f"{values.source}: {HUGGINGFACE_JSON}"
    backend = parse_tokenizer(values.text(HUGGINGFACE_JSON), where)
    highest = max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
    if rows and highest >= rows:
        raise InputError(f"{where} has token {highest}, and the file's vocabulary {rows} tokens; {values.way_out}")
    bos = start_token(backend)
    if values.has(ADD_BOS) and "bos" in vocabulary.special.ids:
        bos = _start(vocabulary, usually=False)
    return Tokenizer(backend, bos, vocabulary.special.ends)


def _sentencepiece_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    values = vocabulary.values
    scores = values.numbers(SCORES, "iuf", len(vocabulary.special.types))
    if not np.isfinite(scores).all():
        raise values.fault(SCORES, "holds what is no finite number")
    bos = _start(vocabulary, usually=True)
    backend = bpe_of_scores(vocabulary, scores, bos, space_prefix=values.flag(ADD_SPACE_PREFIX, True))
    return Tokenizer(backend, bos, vocabulary.special.ends)


def _bpe_tokenizer(vocabulary: Vocabulary, kind: str) -> Tokenizer:
    pre = _pretokenizer(vocabulary.values, kind)
    bos = _start(vocabulary, pre.adds_bos, always=kind == CHARACTER_LEVEL)
    with faults_reported(f"{vocabulary.values.source}: {MERGES}"):
        backend = bpe_of_merges(vocabulary, _read_merges(vocabulary.values), bos, pre)
    return Tokenizer(backend, bos, vocabulary.special.ends)


def _pretokenizer(values: VocabularyValues, kind: str) -> PreTokenizer:
    name = "gemma4" if kind == CHARACTER_LEVEL else values.text(PRE, "default")
    if name not in PRETOKENIZERS:
        raise values.refusal(PRE, "a name that is known", "the file may be newer than this program")
    return PRETOKENIZERS[name]


def _read_merges(values: VocabularyValues) -> list[tuple[str, str]]:
    """Pairs of tokens, of equal ones the first; each is written with a space between, and may begin with one."""
    merges = []
    for line in dict.fromkeys(values.texts(MERGES)):
        at = line.find(" ", 1)
        if at < 0:
            raise values.fault(MERGES, f"has {line[:40]!r}, which is no pair of tokens")
        merges.append((line[:at], line[at + 1 :]))
    return merges
