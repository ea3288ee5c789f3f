"""Whether two tokenizers are alike: texts on which tokenizers tend to differ, and the comparison."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

from quantlab.checkpoint.tokenizer import Tokenizer
from quantlab.errors import InputError

if TYPE_CHECKING:
    from tokenizers import pre_tokenizers

PIECES_PER_TEXT = 256
# Words, cases, contractions, digits, signs, white space and scripts of all kinds, alone and side by side.
PROBES = (
    "", " ", "  ", "   ", "\t", "\n", "\n\n", " \n", "\r\n", "\t \n \n\n  x", "a", " a", "  a", "a ", "a  ",
    "a   b\n\n\n c",
    "Hello, world! It's fine; they'LL say I'm late, WE'VE won. don't 'tis y'all'd o'there 'sound",
    "CamelCase HTTPServer snake_case kebab-case x1y2z3 v1.2.3 a/b\\c",
    "0 12 345 6789 12345 1234567 3.14159 1,000,000 1e-5 0x1F \u00b2\u00bd\u2167\u0663\u096a 2024\u5e7412\u6708",
    "if (a[i] != b) {\n\treturn x**2;  // <tag attr=\"v\"> #1 $2 %3 ^4 &5 ~ ` | @\n    }\n\n\n",
    "...!!!???---===___***   ((([[[{{{<<<>>>}}}]]])))", "https://example.org/a?b=c&d=e#f user@example.org",
    "na\u00efve caf\u00e9 \u00c5ngstr\u00f6m \u00df\u1e9e \u0130\u0131 \u01c5 e\u0301 A\u030a \ufb01 \u2126 \u212b",
    "\u0416\u0438\u0437\u043d\u044c \u039b\u03cc\u03b3\u03bf\u03c2 \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3001\u4e2d\u6587\u3002 \ud55c\uad6d\uc5b4 \uff21\uff11\uff01",
    "\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22 \u0928\u092e\u0938\u094d\u0924\u0947 \u1780\u17b6\u1793\u17cb",
    "\U0001f600\U0001f469\u200d\U0001f680 \u2764\ufe0f \u20ac\u2122 \u00b0C \u2026\u2014\u201cx\u201d \u2018y\u2019",
    "a\u00a0b\u2003c\u3000d\u2028e\u0085f\u200bg\ufeffh\u0000i\u0007j\u001bk\u007fl\x0bm\x0cn",
    "\u2581 \u2581\u2581a <0x41> <0x0A> [PAD0] \U000e0041\ufffd\uffff",
    "ab" * 40, "ana" * 30, " " * 70 + "x" + "\n" * 40 + "y" + "=" * 70 + "\t" * 20 + "0" * 50,
)  # fmt: skip


def alike(one: Tokenizer, other: Tokenizer, special: Iterable[str]) -> bool:
    """Whether both give the same ids and texts on the probes, around `special` tokens, and on every piece of `one`."""
    for text in PROBES:
        ids = _ids(one, text)
        if _ids(other, text) != ids or (ids and other.decode(ids) != one.decode(ids)):
            return False
    around = (f"{token}a{token} {token} \n{token}{token}, " for token in special)
    pieces = (one.decode([i], skip_special_tokens=False) for i in range(one.size))
    return all(_ids(one, text) == _ids(other, text) for text in (*_joined(around, ""), *_joined(pieces, "\n")))


def _ids(tokenizer: Tokenizer, text: str) -> list[int] | None:
    """None where the tokenizer fails, as one without a token for what is unknown does."""
    try:
        return tokenizer.encode(text)
    except InputError:
        return None


def _joined(parts: Iterator[str], separator: str) -> Iterator[str]:
    while chunk := list(islice(parts, PIECES_PER_TEXT)):
        yield separator.join(chunk)


def cut_alike(one: pre_tokenizers.PreTokenizer, other: pre_tokenizers.PreTokenizer) -> int:
    """How many of the probes both cut into the same words."""

    def words(pre: pre_tokenizers.PreTokenizer, text: str) -> list[str]:
        return [word for word, _ in pre.pre_tokenize_str(text)]

    return sum(words(one, text) == words(other, text) for text in PROBES)
