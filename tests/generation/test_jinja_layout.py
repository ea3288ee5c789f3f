"""Users' own templates: whole texts and blocks, the sandbox, and one clear line for what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantlab.errors import InputError
from quantlab.generation.examples import Example
from quantlab.generation.jinja_layout import read_layout
from quantlab.generation.prompts import messages, plain_text
from quantlab.generation.sources import GivenSource
from quantlab.generation.templates import Asked, find_template, form_of

ASKED = Asked("What is 2 + 3?", passages=(GivenSource("a.md", "It is five."),), role="You are a clerk.")


def file_of(folder: Path, text: str) -> Path:
    path = folder / "my.jinja"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_without_blocks_is_the_whole_text(tmp_path: Path) -> None:
    """As it is in plain text, the user's message for a chat template; a name with + is still a file's."""
    listed = "{% for p in passages %}\n* {{ p.text }} ({{ p.source }})\n{% endfor %}\n"
    path = file_of(tmp_path, "{{ role }}\n" + listed + ">> {{ question }}\n")
    text = "You are a clerk.\n* It is five. (a.md)\n>> What is 2 + 3?"
    template = find_template(str(path))
    assert template.wants_passages
    assert not template.wants_examples
    form = form_of(template, ASKED)
    assert plain_text(form.prompt) == text
    assert messages(form.prompt) == [{"role": "user", "content": text}]
    assert (form.then, form.trigger) == (None, "")
    joined = path.rename(tmp_path / "a+b.jinja")
    assert find_template(str(joined)).layout == read_layout(joined)


BLOCKS = """{# reasons in two steps #}
{% block system %}
{{ role }}
{% endblock %}
{% block user %}
{% for example in examples %}{{ example.question }} {{ example.reasoning }}
{% endfor %}
Now: {{ question }}
{% endblock %}
{% block answer %}Well,{% endblock %}
{% block then %}

So it is{% endblock %}
"""


def test_blocks_are_pieces(tmp_path: Path) -> None:
    """Composed with self-consistency, its samples vote."""
    path = file_of(tmp_path, BLOCKS)
    template = find_template(f"{path}+self-consistency")
    assert (template.samples, template.temperature) == (5, 0.7)
    asked = Asked("Why?", role="You are a clerk.", examples=(Example("Who?", "me", "Because."),))
    form = form_of(template, asked)
    assert plain_text(form.prompt) == "You are a clerk.\n\nQ: Who? Because.\nNow: Why?\nA: Well,"
    assert messages(form.prompt) == [
        {"role": "system", "content": "You are a clerk."},
        {"role": "user", "content": "Who? Because.\nNow: Why?"},
    ]
    assert form.then == "\nSo it is"
    with pytest.raises(InputError, match=r"my\.jinja: shows examples; give a file of them with --examples"):
        form_of(template, ASKED)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (
            "{{ question }} {{ pasage }}{{ answer }}",
            "undefined variable answer, pasage; the variables are ",
        ),
        ("a\n{{ question", "line 2: is no template that Jinja reads: unexpected end of template"),
        ("{% for x in %}", "line 1: is no template that Jinja reads: "),
        ("{{ question | nothing }}", "line 1: is no template that Jinja reads: No filter named 'nothing'"),
        (
            "{% block user %}x{% endblock %}{% block footer %}x{% endblock %}",
            "unknown block footer; there are: ",
        ),
        ("{% block system %}x{% endblock %}", "has blocks, but none named user, which is to hold the question"),
    ],
)
def test_a_wrong_file_is_refused_before_anything_runs(tmp_path: Path, text: str, fault: str) -> None:
    path = file_of(tmp_path, text)
    with pytest.raises(InputError) as caught:
        find_template(str(path))
    assert str(caught.value).startswith(f"{path}: {fault}")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{{ passages[0].titel }}", "fails on this question: 'quantlab.generation.sources.GivenSource object' has no"),
        ("{{ passages[4].text }}", "fails on this question: "),
        ("{{ 1 / 0 }}", "fails on this question: division by zero"),
        ("{{ question + 1 }}", "fails on this question: can only concatenate str"),
        (
            "{{ ''.__class__.__mro__ }}",
            "fails on this question: access to attribute '__class__' of 'str'",
        ),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "fails on this question: maximum recursion depth"),
        ("{# nothing #}", "makes an empty prompt"),
    ],
)
def test_a_template_that_fails_says_why_and_what_there_is(tmp_path: Path, text: str, fault: str) -> None:
    path = file_of(tmp_path, text)
    with pytest.raises(InputError) as caught:
        form_of(find_template(str(path)), ASKED)
    assert str(caught.value).startswith(f"{path}: {fault}")
    assert "empty" in fault or "passages (of source and text each)" in str(caught.value)
