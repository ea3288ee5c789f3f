"""The chat page as a document: whole in itself, and with a policy that lets nothing else run."""

from __future__ import annotations

import base64
import hashlib
import re

import pytest

from quantlab.serving.chat_page import chat_page


def policy() -> dict[str, list[str]]:
    directives = chat_page().headers["Content-Security-Policy"].split("; ")
    return {name: sources for name, *sources in map(str.split, directives)}


def test_it_needs_nothing_from_elsewhere() -> None:
    """No tag of the document loads anything, its own parts included, and the styles name no address."""
    document = chat_page().content.decode()
    markup = re.sub(r"<(script|style)>.*?</\1>", "", document, flags=re.DOTALL)
    assert re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', markup) == []
    assert "@import" not in document
    assert "url(" not in document


def test_the_policy_allows_its_own_scripts_and_styles_and_no_others() -> None:
    """Each is named by its hash; inline code in general, eval and other sites are not."""
    document, allowed = chat_page().content.decode(), policy()
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", document, flags=re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts]
        assert parts
        assert allowed[directive] == [f"'sha256-{digest}'" for digest in digests]
    assert allowed["default-src"] == ["'none'"]
    assert allowed["connect-src"] == ["'self'"]
    assert allowed["require-trusted-types-for"] == ["'script'"]


def test_every_script_is_strict_and_none_makes_html_of_text() -> None:
    """No part uses what would read a text as HTML or as code."""
    document = chat_page().content.decode()
    scripts = re.findall(r"<script>(.*?)</script>", document, flags=re.DOTALL)
    assert all(script.startswith('\n"use strict";\n') for script in scripts)
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "DOMParser", "eval(", "new Function"):
        assert way not in document


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.2)."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_texts_stand_out_from_what_is_behind_them(scheme: int) -> None:
    """4.5 to 1 for texts and 3 to 1 for the edges of fields, as WCAG 2.2 asks of level AA."""
    schemes = re.findall(r":root \{(.*?)\}", chat_page().content.decode(), flags=re.DOTALL)
    colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", schemes[scheme]))
    for text in ("text", "dim", "link"):
        for behind in ("page", "raised"):
            assert contrast(colours[text], colours[behind]) >= 4.5, (text, behind)
    for text, behind in (("text", "hover"), ("fault", "fault-back"), ("on-accent", "accent")):
        assert contrast(colours[text], colours[behind]) >= 4.5, (text, behind)
    assert contrast(colours["field-line"], colours["page"]) >= 3
    assert contrast(colours["accent"], colours["page"]) >= 3


def test_what_labels_and_descriptions_point_at_is_there() -> None:
    """Every id that the document names exists once, and every field has a label."""
    document = re.sub(r"<(script|style)>.*?</\1>", "", chat_page().content.decode(), flags=re.DOTALL)
    ids = re.findall(r'\bid="([^"]+)"', document)
    assert len(ids) == len(set(ids))
    named = re.findall(r'\b(?:for|aria-labelledby|aria-describedby)="([^"]+)"', document)
    named += re.findall(r'href="#([^"]+)"', document)
    assert set(named) <= set(ids)
    fields = re.findall(r"<(?:input|textarea|select)\b[^>]*>", document)
    labelled = [*re.findall(r'<label[^>]* for="([^"]+)"', document), "use-sources"]  # the label of that is around it
    assert [field for field in fields if not any(f'id="{name}"' in field for name in labelled)] == [
        field for field in fields if "aria-label=" in field
    ]
