"""Where a text may be parted: behind sentences and paragraphs, before items of a list; code at blank lines."""

from __future__ import annotations

import re
from collections.abc import Iterator

# Behind each match a piece may begin.
_PROSE = re.compile(
    r"""
    \n[^\S\n]*\n\s*                                   # a blank line
    | (?<=[.!?\u2026])["'\u201d\u2019)\]*_]*\s+       # the end of a sentence
    | [\u3002\uff01\uff1f]["\u201d\u300d\u300f\uff09]*\s*   # ... where no blank follows
    | \n(?=[^\S\n]*(?:[-*+\u2022|]|\d{1,9}[.)])\s)    # an item of a list, a row of a table
    """,
    re.VERBOSE,
)
_CODE = re.compile(r"\n(?:[^\S\n]*\n)+")
_LINE = re.compile(r"\n+")
_ABBREVIATIONS = (
    "al approx ca cf ch col dept dr e.g ed eq etc fig figs gen i.e inc jr ltd mr mrs ms no nos p pp prof rev sec sen "
    "sr st tab v vol vs"
)
_LAST_WORD = re.compile(r"[^\s(\[\"']+\Z")


def sentences(text: str, start: int, end: int) -> list[int]:
    """Borders within text[start:end], ascending, `end` the last: pieces that are not blank and leave nothing out."""
    return _borders(text, start, end, (match for match in _PROSE.finditer(text, start, end) if _ends(text, match)))


def code_blocks(text: str, start: int, end: int) -> list[int]:
    """The same for source code, whose blocks are parted by blank lines."""
    return _borders(text, start, end, _CODE.finditer(text, start, end))


def lines(text: str, start: int, end: int) -> list[int]:
    """The same by line breaks."""
    return _borders(text, start, end, _LINE.finditer(text, start, end))


def words(text: str, start: int, end: int) -> list[int]:
    """The same by blanks."""
    return _borders(text, start, end, re.compile(r"\s+").finditer(text, start, end))


def _borders(text: str, start: int, end: int, matches: Iterator[re.Match[str]]) -> list[int]:
    borders: list[int] = []
    for match in matches:
        before = borders[-1] if borders else start
        if before < match.end() < end and not text[before : match.end()].isspace():
            borders.append(match.end())
    if borders and text[borders[-1] : end].isspace():
        borders.pop()
    return [*borders, end]


def _ends(text: str, match: re.Match[str]) -> bool:
    """Whether a full stop ends a sentence: that of an abbreviation or an initial, or before a small letter, is none."""
    if text[match.start() - 1 : match.start()] != "." or "\n\n" in match.group():
        return True
    if text[match.end() : match.end() + 1].islower():
        return False
    word = _LAST_WORD.search(text, max(0, match.start() - 41), match.start() - 1)
    return word is None or not (word.group().lower() in _ABBREVIATIONS.split() or re.fullmatch(r"[A-Z]", word.group()))
