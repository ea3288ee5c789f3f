"""The `tokenizers` form of a GGUF vocabulary, made so that it gives llama.cpp's ids."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING

import numpy as np

from quantlab.checkpoint.gguf_special_tokens import USER_DEFINED, SpecialTokens
from quantlab.checkpoint.gguf_values import VocabularyValues
from quantlab.checkpoint.pretokenizers import PreTokenizer
from quantlab.checkpoint.tokenizer import SPACE

if TYPE_CHECKING:
    import tokenizers
    from tokenizers import decoders, pre_tokenizers

MAX_MERGES = 1 << 21  # Gemma's 256 000 pieces make 580 000
BYTES_OF_NO_TEXT = {0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)}  # in no UTF-8 of an assigned character


@dataclass(frozen=True)
class Vocabulary:
    """What the metadata holds, read and checked. `index` maps tokens to ids, in the ids' order."""

    values: VocabularyValues
    index: dict[str, int]
    special: SpecialTokens

    @cached_property
    def tokens(self) -> list[str]:
        """The tokens by id."""
        return list(self.index)

    @cached_property
    def partitioning(self) -> list[int]:
        """The tokens that are looked for in a text before anything else."""
        return self.special.partitioning()


def bpe_of_scores(
    vocabulary: Vocabulary, scores: np.ndarray, bos: int | None, *, space_prefix: bool
) -> tokenizers.Tokenizer:
    """SentencePiece's BPE: pieces merge by score, what is no piece falls apart into bytes.

    Raises:
        InputError: the pieces are made of one another in too many ways to be true.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers

    merges = _merges_by_score(vocabulary.index, scores)
    if merges is None:
        problem = f"has pieces that others make in more than {MAX_MERGES} ways"
        raise vocabulary.values.fault("tokenizer.ggml.tokens", problem)
    unknown = vocabulary.special.ids.get("unk")
    model = models.BPE(
        vocabulary.index,
        merges,
        unk_token=None if unknown is None else vocabulary.tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(model)
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
    text: list[decoders.Decoder] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if space_prefix:
        spaces.insert(0, normalizers.Prepend(SPACE))
        text.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(spaces)
    backend.decoder = decoders.Sequence(text)
    return _finished(backend, vocabulary, bos)


def _merges_by_score(index: dict[str, int], scores: np.ndarray) -> list[tuple[str, str]] | None:
    """Every way to put a piece together from two others, the piece with the highest score first; None if too many.

    SentencePiece gives all ways to make one piece its rank, and takes the leftmost in the text; here each has a rank of
    its own. That is another order only where two of them compete for a piece between them, which the merges before do
    not leave in such a place: thousands of runs and repetitions, under trained and random scores, showed no difference.
    """
    merges: list[tuple[str, str]] = []
    made: list[int] = []
    for token, i in index.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in index and right in index:
                merges.append((left, right))
                made.append(i)
        if len(merges) > MAX_MERGES:
            return None
    order = np.argsort(-scores[np.array(made, dtype=np.int64)].astype(np.float64), kind="stable")
    return [merges[i] for i in order]


def bpe_of_merges(
    vocabulary: Vocabulary, merges: list[tuple[str, str]], bos: int | None, pre: PreTokenizer
) -> tokenizers.Tokenizer:
    """BPE with listed merges, on bytes or on characters.

    Raises:
        Exception: a merge of what is no token, or into none; the library raises nothing more special.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers

    model = models.BPE(vocabulary.index, merges, ignore_merges=pre.ignore_merges, byte_fallback=not pre.bytewise)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = cutting(pre, vocabulary.index)
    if pre.bytewise:
        backend.decoder = _byte_level_decoder(vocabulary)
    else:
        backend.normalizer = normalizers.Replace(" ", SPACE)
        backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return _finished(backend, vocabulary, bos)


def cutting(pre: PreTokenizer, index: Mapping[str, int]) -> pre_tokenizers.PreTokenizer:
    """How texts are cut into words for a vocabulary.

    Bytes that it has no token for are dropped, and what stands on both sides of them must not be merged.
    """
    from tokenizers import Regex, pre_tokenizers

    letters = enumerate(byte_letters())
    missing = "".join(letter for byte, letter in letters if byte not in BYTES_OF_NO_TEXT and letter not in index)
    if not pre.bytewise or not missing:
        return pre.build()
    return pre_tokenizers.Sequence([pre.build(), pre_tokenizers.Split(Regex(f"[{re.escape(missing)}]"), "removed")])


@cache
def byte_letters() -> tuple[str, ...]:
    """The letter that stands for each byte in a byte-level vocabulary, as GPT-2 has them.

    A byte that is a printing character of Latin-1 stands for itself; the others follow from U+0100 on.
    """
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in printing else next(others)) for byte in range(256))


def _byte_level_decoder(vocabulary: Vocabulary) -> decoders.Decoder:
    """The library takes every letter of a token for a byte, those of added tokens too, which are plain text."""
    from tokenizers import Regex, decoders

    letters = byte_letters()
    alphabet = set(letters)
    steps: list[decoders.Decoder] = []
    for token in (vocabulary.tokens[i] for i in vocabulary.partitioning):
        if not token.isascii() and alphabet.issuperset(token):
            as_bytes = "".join(letters[byte] for byte in token.encode())
            steps.append(decoders.Replace(Regex(rf"\A{re.escape(token)}\z"), as_bytes))
    return decoders.Sequence([*steps, decoders.ByteLevel()]) if steps else decoders.ByteLevel()


def _finished(backend: tokenizers.Tokenizer, vocabulary: Vocabulary, bos: int | None) -> tokenizers.Tokenizer:
    """Add the special tokens, and the start token before every text."""
    from tokenizers import processors

    backend.add_tokens(_added_tokens(vocabulary))
    adds_end = vocabulary.values.flag("tokenizer.ggml.add_eos_token", False)
    around = {"bos": bos, "eos": vocabulary.special.ids.get("eos") if adds_end else None}
    ids = {name: i for name, i in around.items() if i is not None}
    if ids:
        tokens = {name: vocabulary.tokens[i] for name, i in ids.items()}
        # In a template ":" and "$" mean something.
        names = {name: name if ":" in token or "$" in token else token for name, token in tokens.items()}
        start, end = ([names[name]] if name in names else [] for name in around)
        backend.post_processor = processors.TemplateProcessing(
            single=[*start, "$A", *end],
            pair=[*start, "$A", *end, *(f"{name}:1" for name in start), "$B:1", *(f"{name}:1" for name in end)],
            special_tokens=[{"id": names[name], "ids": [i], "tokens": [tokens[name]]} for name, i in ids.items()],
        )
    return backend


def _added_tokens(vocabulary: Vocabulary) -> list[tokenizers.AddedToken]:
    from tokenizers import AddedToken

    tokens, types = vocabulary.tokens, vocabulary.special.types
    strip_left, strip_right = _stripping(vocabulary)
    return [
        AddedToken(
            tokens[i],
            special=bool(types[i] != USER_DEFINED),
            normalized=False,
            lstrip=tokens[i] in strip_left,
            rstrip=tokens[i] in strip_right,
        )
        for i in vocabulary.partitioning
    ]


def _stripping(vocabulary: Vocabulary) -> tuple[set[str], set[str]]:
    """The tokens that swallow spaces on their left and on their right: no key tells, llama.cpp goes by names."""
    if vocabulary.values.text("tokenizer.ggml.pre", "") in ("jina-v2-de", "jina-v2-es", "jina-v2-code"):
        return {"<mask>"}, set()
    name = vocabulary.values.text("general.name", "").lower()
    if "phi-3" in name or "phi3" in name:
        return set(), {vocabulary.tokens[i] for i in vocabulary.partitioning} - {"<unk>", "<s>", "<|endoftext|>"}
    return set(), set()
