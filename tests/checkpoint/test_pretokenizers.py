"""llama.cpp's ways of cutting texts into words, told by hand."""

from __future__ import annotations

import pytest
from tiny_vocabularies import byte_level_vocabulary

from quantlab.checkpoint.gguf_tokenizer import tokenizer_from_metadata
from quantlab.checkpoint.pretokenizers import PRETOKENIZERS, PreTokenizer

CUTS = {
    "gpt-2": ("I'll  do 123 x2!?\n\n y", ["I", "'ll", " ", " do", " 123", " x", "2", "!?", "\n\n", " y"]),
    "llama-bpe": ("I'LL  do 1234 (x)!\n\n y", ["I", "'LL", " ", " do", " ", "123", "4", " (", "x", ")!\n\n", " y"]),
    "qwen2": ("a12 \n\n  b", ["a", "1", "2", " \n\n", " ", " b"]),
    "qwen35": ("e\u0301a \u0301b", ["e\u0301a", " \u0301b"]),
    "starcoder": ("x12  y", ["x", "1", "2", " ", " y"]),
    "gpt-4o": ("camelCase HTTPServer's/\n", ["camel", "Case", " HTTPServer's", "/\n"]),
    "tekken": ("camelCase's 12", ["camel", "Case", "'s", " ", "1", "2"]),
    "deepseek-v3": ("\u4e2d\u6587abc 1234,x", ["\u4e2d\u6587", "abc", " ", "123", "4", ",x"]),
    "deepseek-llm": ("caf\u00e9 \u4e2d 1234", ["caf", "\u00e9", " ", "\u4e2d", " ", "1234"]),
    "deepseek-coder": ("a = 12;\n", ["a", " = ", "1", "2", ";", "\n"]),
    "falcon": ("a1234 + b's", ["a", "123", "4", " ", "+", " b", "'", "s"]),
    "default": ("a1234 `b's", ["a", "123", "4", " `", "b", "'", "s"]),
    "bloom": ("a, b (c).", ["a", ",", " b", " (", "c", ")."]),
    "viking": ("a12 b", ["a", "1", "2", " b"]),
    "jais-2": ("a" + " " * 7 + "b", ["a", "    ", "  ", " b"]),
    "youtu": ("a\ud55c\uad6d12", ["a", "\ud55c\uad6d", "1", "2"]),
    "exaone-moe": ("go to it 12", ["go to it", " ", "1", "2"]),
    "chameleon": ("IMGIMGACZx 12\t  y", ["IMGIMGACZ", "x", " ", "1", "2", "\t", "  ", "y"]),
    "superbpe": ("n 1234567", ["n ", "1", "234", "567"]),
    "bailingmoe": ("it's \n\n12", ["it", "'s", " \n\n", "1", "2"]),
    "seed-coder": ("a!\n12", ["a", "!", "\n", "1", "2"]),
    "ufakzeka": ("a'da 12", ["a", "'da", " ", "1", "2"]),
    "afmoe": ("a  12345 \u65e5x", ["a", " ", " ", "12", "345", " ", "\u65e5", "x"]),
    "tiny_aya": ("a12345", ["a", "12", "345"]),
    "laguna": ("a \n b", ["a", " ", "\n", " b"]),
    "minicpm5": ("a12345", ["a", "123", "45"]),
    "spark2_5": ("a!\n1", ["a", "!", "\n", "1"]),
    "granite-embed-multi-97m": ("e\u0301Ab", ["e\u0301", "Ab"]),
    "gemma4": ("a b\n\nc", ["a b", "\n\n", "c"]),
}


@pytest.mark.parametrize("name", CUTS)
def test_names_stand_for_ways_of_cutting(name: str) -> None:
    text, expected = CUTS[name]
    pre = PreTokenizer(PRETOKENIZERS[name].patterns, bytewise=False).build()
    assert [piece for piece, _ in pre.pre_tokenize_str(text)] == expected


@pytest.mark.parametrize("name", sorted(PRETOKENIZERS))
def test_no_way_of_cutting_loses_text(name: str) -> None:
    """Whatever the words are, the tokens make the text again."""
    metadata = byte_level_vocabulary("", name)
    if not PRETOKENIZERS[name].bytewise:
        metadata["tokenizer.ggml.tokens"] += ["\u2581", *(f"<0x{byte:02X}>" for byte in range(256))]
        del metadata["tokenizer.ggml.token_type"]
    tokenizer = tokenizer_from_metadata(metadata, "f")
    texts = [text for text, _ in CUTS.values()]
    for text in [*texts, " ".join(texts), "\t\r\n \u3000\u00a0 \x00\U0001f469\u200d\U0001f680'S 9\u00b2\u0663"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
