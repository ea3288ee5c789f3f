"""The vocabulary metadata of a GGUF file, from the tokenizer of a Hugging Face folder.

What a vocabulary cannot say (a normalizer, another way of cutting words, tokens that swallow spaces) shows when the
tokenizer is built again from the metadata and compared; then the whole tokenizer.json goes along, for readers that know
the key. llama.cpp does not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from quantlab.checkpoint.chat_templates import template_metadata
from quantlab.checkpoint.gguf_bpe import cutting
from quantlab.checkpoint.gguf_special_tokens import (
    BYTE,
    CONTROL,
    END_SPELLINGS,
    ID_KEYS,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)
from quantlab.checkpoint.gguf_tokenizer import (
    ADD_BOS,
    ADD_EOS,
    ADD_SPACE_PREFIX,
    BYTE_LEVEL,
    CHARACTER_LEVEL,
    HUGGINGFACE_JSON,
    KIND,
    MERGES,
    NO_VOCABULARY,
    PRE,
    ROLES,
    SCORES,
    SENTENCEPIECE,
    TOKENS,
    TYPES,
    tokenizer_from_metadata,
)
from quantlab.checkpoint.json_file import read_json
from quantlab.checkpoint.pretokenizers import ROWS, PreTokenizer
from quantlab.checkpoint.tokenizer import SPACE, Tokenizer, faults_reported, folder_tokenizer, holds_tokenizer
from quantlab.checkpoint.tokenizer_probes import PROBES, alike, cut_alike
from quantlab.errors import InputError

UNKNOWN_PRE = "default"
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
ADDED_SCORE = -1000.0  # of tokens that are no pieces


def vocabulary_metadata(folder: Path, rows: int) -> dict[str, Any]:
    """The keys `tokenizer.*` for the tokenizer and the chat templates of `folder`; `rows` is the embedding's.

    Types are the writer's: bool, int (uint32), str, lists of str, int32 and float32 arrays. Tokens are filled up to
    `rows` with unused ones. `tokenizer.huggingface.json` is there where the other keys alone make other ids. A folder
    without tokenizer has the kind "no_vocab", one with a tokenizer that is no BPE the kind "none".

    Raises:
        InputError: the tokenizer or a template is broken, or has more tokens than `rows`.
    """
    templates = template_metadata(folder)
    if not holds_tokenizer(folder):
        return {KIND: NO_VOCABULARY[0], **templates}
    tokenizer = folder_tokenizer(folder)
    with faults_reported(f"{folder}: its tokenizer cannot be exported"):
        return {**_vocabulary(_Source(folder, tokenizer, rows)), **templates}


class _Source:
    """A folder's tokenizer, taken apart; `tokens` and their `types` are by id."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, rows: int) -> None:
        self.folder, self.tokenizer, self.backend = folder, tokenizer, tokenizer.backend
        self.json = self.backend.to_str(pretty=False)
        description = json.loads(self.json)
        self.model: dict[str, Any] = description["model"]
        self.is_bpe = self.model["type"] == "BPE"
        self.is_byte_level = self.is_bpe and '"ByteLevel"' in json.dumps(description["pre_tokenizer"])
        self.falls_back_to_bytes = self.is_bpe and bool(self.model.get("byte_fallback"))
        self.ids: dict[str, int] = self.backend.get_vocab(with_added_tokens=True)
        highest = max(self.ids.values(), default=-1)
        if highest >= rows:
            problem = f"its tokenizer has token {highest}, the model's embedding {rows} rows"
            raise InputError(f"{folder}: {problem}; the tokenizer is another model's")
        self.roles = _roles(folder, tokenizer)
        self._name_tokens(rows)
        self._mark_tokens()

    def _name_tokens(self, rows: int) -> None:
        """An id without a token gets an unused one, named as other programs do."""
        self.tokens = [f"[PAD{i}]" for i in range(rows)]
        self.types = np.full(rows, UNUSED, dtype=np.int32)
        for token, i in sorted(self.ids.items(), reverse=True):
            self.tokens[i], self.types[i] = token, NORMAL
        for i in np.flatnonzero(self.types == UNUSED).tolist():
            while self.tokens[i] in self.ids:
                self.tokens[i] += "_"

    def _mark_tokens(self) -> None:
        if self.falls_back_to_bytes:
            self.types[[self.ids[token] for token in BYTE_TOKENS if token in self.ids]] = BYTE
        for i, added in self.backend.get_added_tokens_decoder().items():
            self.types[i] = CONTROL if added.special else USER_DEFINED
        if self.falls_back_to_bytes and "unk" in self.roles:
            self.types[self.roles["unk"]] = UNKNOWN

    @property
    def special(self) -> list[str]:
        """Tokens that are looked for in a text before anything else."""
        return [added.content for added in self.backend.get_added_tokens_decoder().values()]

    def merges(self) -> list[tuple[str, str]]:
        """Pairs of tokens, the first merge first."""
        pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in self.model["merges"])
        return [(left, right) for left, right in pairs]


# The tokens that play a part.


def _roles(folder: Path, tokenizer: Tokenizer) -> dict[str, int]:
    """Ids by name ("bos", "eos" and so on), from the folder's settings; ends beyond the first are "eot" and "eom"."""
    settings, config = (
        read_json(folder / name) if (folder / name).is_file() else {}
        for name in ("tokenizer_config.json", "config.json")
    )
    ids = {}
    for role in ROLES:
        token = settings.get(f"{role}_token")
        content = token.get("content") if isinstance(token, dict) else token
        found = tokenizer.backend.token_to_id(content) if isinstance(content, str) else None
        found = _stated_id(config.get(f"{role}_token_id"), tokenizer) if found is None else found
        if found is not None:
            ids[role] = found
    if tokenizer.bos is not None:
        ids["bos"] = tokenizer.bos
    ends = sorted(i for i in tokenizer.eos if tokenizer.backend.id_to_token(i) is not None)
    if ends:
        ids.setdefault("eos", ends[0])
    unsaid = [i for i in ends if i != ids["eos"] and tokenizer.backend.id_to_token(i) not in END_SPELLINGS]
    return {**ids, **dict(zip(("eot", "eom"), unsaid, strict=False))}


def _stated_id(value: object, tokenizer: Tokenizer) -> int | None:
    first = value[0] if isinstance(value, list) and value else value
    known = type(first) is int and 0 <= first < 1 << 32 and tokenizer.backend.id_to_token(first) is not None
    return first if known else None  # type: ignore[return-value]


def _adds_end(tokenizer: Tokenizer, eos: int | None) -> bool:
    """Whether the tokenizer's own post-processor puts the end token behind a text."""
    with_special = tokenizer.backend.encode("a").ids
    without = tokenizer.backend.encode("a", add_special_tokens=False).ids
    return eos is not None and with_special == [*([] if tokenizer.bos is None else [tokenizer.bos]), *without, eos]


# The kinds of vocabulary.


def _vocabulary(source: _Source) -> dict[str, Any]:
    """The metadata of the first kind that makes the same ids; of the likeliest, with the tokenizer whole, if none."""
    common: dict[str, Any] = {TOKENS: source.tokens, TYPES: source.types}
    common |= {ID_KEYS[role]: i for role, i in source.roles.items()}
    common[ADD_BOS] = source.tokenizer.bos is not None
    common[ADD_EOS] = _adds_end(source.tokenizer, source.roles.get("eos"))
    kinds = list(_kinds(source))
    for kind in kinds:
        metadata = {**kind, **common}
        if _rebuilds(metadata, source):
            return metadata
    metadata = {**kinds[0], **common, HUGGINGFACE_JSON: source.json}
    if not _rebuilds(metadata, source):
        raise InputError(f"{source.folder}: its tokenizer is another one once it is written and read; mend it")
    return metadata


def _rebuilds(metadata: Mapping[str, Any], source: _Source) -> bool:
    try:
        rebuilt = tokenizer_from_metadata(metadata, str(source.folder))
    except InputError:
        return False
    return alike(source.tokenizer, rebuilt, source.special)


def _kinds(source: _Source) -> Iterator[dict[str, Any]]:
    if source.is_byte_level:
        merges = [f"{left} {right}" for left, right in source.merges()]
        yield {KIND: BYTE_LEVEL, PRE: _name_of_cutting(source), MERGES: merges}
    elif source.falls_back_to_bytes:
        prefix = "".join(source.backend.encode("a", add_special_tokens=False).tokens).startswith(SPACE)
        yield {KIND: SENTENCEPIECE, PRE: UNKNOWN_PRE, SCORES: _scores(source), ADD_SPACE_PREFIX: prefix}
        if not prefix:
            merges = [f"{left} {right}" for left, right in source.merges()]
            scores = np.full(len(source.tokens), ADDED_SCORE, dtype=np.float32)
            yield {KIND: CHARACTER_LEVEL, SCORES: scores, MERGES: merges, ADD_SPACE_PREFIX: False}
    else:
        yield {KIND: NO_VOCABULARY[1]}


def _name_of_cutting(source: _Source) -> str:
    """llama.cpp's name for the way, or else the nearest way, in which the tokenizer cuts texts into words."""
    theirs, ignores = source.backend.pre_tokenizer, bool(source.model.get("ignore_merges"))

    def likeness(pre: PreTokenizer) -> tuple[int, bool]:
        ways = [pre, *(replace(pre, patterns=patterns) for patterns in pre.originals)]
        built = chain.from_iterable((way.build(), cutting(way, source.ids)) for way in ways)
        return max(cut_alike(theirs, ours) for ours in built), pre.ignore_merges == ignores

    found = {names[0]: likeness(pre) for names, pre in ROWS if pre.bytewise}
    best = max(found, key=lambda name: found[name])
    return best if found[best][0] > len(PROBES) // 2 else UNKNOWN_PRE


def _scores(source: _Source) -> np.ndarray:
    """A score for each token, float32: that of `tokenizer.model`, or else minus the rank of the first merge into it."""
    scores = np.full(len(source.tokens), ADDED_SCORE, dtype=np.float32)
    pieces = _sentencepiece_scores(source)
    if pieces is not None:
        scores[: len(pieces)] = pieces
        return scores
    ranks: dict[str, int] = {}
    for left, right in source.merges():
        ranks.setdefault(left + right, len(ranks))
    for i, token in enumerate(source.tokens):
        if source.types[i] == NORMAL:
            scores[i] = -float(ranks.get(token, len(ranks)))
    return scores


def _sentencepiece_scores(source: _Source) -> list[float] | None:
    """None without `tokenizer.model`, or with one of other pieces."""
    file = source.folder / "tokenizer.model"
    if not file.is_file():
        return None
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except Exception:  # another program's file under that name; the merges tell as much
        return None
    count = model.vocab_size()
    if [model.id_to_piece(i) for i in range(count)] != source.tokens[:count]:
        return None
    return [model.get_score(i) for i in range(count)]
