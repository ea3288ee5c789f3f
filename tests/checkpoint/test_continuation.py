"""Tokenizers that put nothing before a text."""

from __future__ import annotations

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from quantlab import load_tokenizer
from quantlab.checkpoint.continuation import continuing
from quantlab.checkpoint.tokenizer import Tokenizer


def test_sentencepiece_without_its_space(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    plain = continuing(tokenizer)
    assert (plain.bos, plain.eos) == (tokenizer.bos, tokenizer.eos)
    for text in ("was", "  was\nb", "\u00e9"):
        assert plain.encode(" " + text) == tokenizer.encode(text)
    assert plain.backend.id_to_token(plain.encode("was", add_special_tokens=False)[0])[0] != "\u2581"


def letters(normalizer=None, pre_tokenizer=None) -> Tokenizer:
    """A token for every letter and both signs for a space."""
    backend = tokenizers.Tokenizer(models.BPE({c: n for n, c in enumerate("\u2581\u0120ab")}, []))
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend, None, frozenset())


@pytest.mark.parametrize(
    ("steps", "before"),
    [
        ({"normalizer": normalizers.Prepend("\u2581")}, [0]),
        ({"normalizer": normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.NFC()])}, [0]),
        ({"pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="first")}, [0]),
        ({"pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="always")}, [0]),
        ({"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}, [1]),
        (
            {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.Metaspace()])},
            [0],
        ),
    ],
)
def test_every_step_that_puts_a_space_before_a_text(steps, before):
    tokenizer = letters(**steps)
    assert tokenizer.encode("ab") == [*before, 2, 3]
    assert continuing(tokenizer).encode("ab") == [2, 3]


def test_nothing_to_leave_out():
    tokenizer = letters(normalizers.NFC(), pre_tokenizers.ByteLevel(add_prefix_space=False))
    assert continuing(tokenizer) is tokenizer
