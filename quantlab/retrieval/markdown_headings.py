"""The headings of a Markdown text, as CommonMark has them: a line of # in a fenced block is none."""

from __future__ import annotations

import re
from itertools import pairwise

from quantlab.errors import missing_extra

_FRONT_MATTER = re.compile(r"---[ \t]*\n.*?\n(?:---|\.\.\.)[ \t]*\n", re.DOTALL)  # YAML that site builders put first


def markdown_headings(text: str) -> list[tuple[int, int, str]]:
    """(first character of its line, level from 1, title) of every heading, in order."""
    try:
        from markdown_it import MarkdownIt
    except ImportError:
        raise missing_extra("markdown-it-py", "retrieval") from None

    front = _FRONT_MATTER.match(text)
    skipped = front.end() if front else 0
    starts = [skipped]
    for line in text[skipped:].split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    # Emphasis and links within a title stay as they are written, so blocks are all that is parsed.
    tokens = MarkdownIt("commonmark").disable("inline").parse(text[skipped:])
    return [
        (starts[token.map[0]], int(token.tag[1:]), title.content.strip())
        for token, title in pairwise(tokens)
        if token.type == "heading_open" and token.map is not None and title.content.strip()
    ]
