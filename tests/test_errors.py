"""The one exception for wrong input: its message is one line that any terminal can show."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.errors import MOST_CHARACTERS, InputError, missing_extra, one_line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a/b.gguf: tensor x: damaged", "a/b.gguf: tensor x: damaged"),
        ("two  spaces", "two  spaces"),
        ("Gr\u00fc\u00dfe \u4f60\u597d \U0001f600", "Gr\u00fc\u00dfe \u4f60\u597d \U0001f600"),
        ("a\nb\r\nc\td", r"a\nb\r\nc\td"),
        ("\x1b[31mred\x07\x00\x7f", r"\x1b[31mred\x07\x00\x7f"),
        ("\x9b2J", r"\x9b2J"),  # one byte that some terminals take for the beginning of a command
        ("\u2028\u2029\x85", r"\u2028\u2029\x85"),  # line breaks, to some
        ("gguf.\u202etxt", r"gguf.\u202etxt"),  # turns what follows around
        ("a\u200bb\ufeff\U000e0041", r"a\u200bb\ufeff\U000e0041"),  # nothing to see
        ("caf\udce9", r"caf\udce9"),  # a byte of a path that is no UTF-8
        ("'quoted' \"twice\" \\n", "'quoted' \"twice\" \\n"),
    ],
    ids=range(11),
)
def test_a_message_is_one_printable_line(text: str, expected: str) -> None:
    assert str(InputError(text)) == one_line(text) == expected


@settings(derandomize=True, database=None, deadline=None)
@given(st.text(st.characters() | st.characters(categories=["Cc", "Cf", "Cs", "Zl", "Zp"])))
def test_any_text_is_one_printable_line(text: str) -> None:
    """Done twice, it is what it was."""
    shown = one_line(text)
    assert shown.isprintable()
    assert shown.encode().decode() == one_line(shown) == shown


def test_a_message_without_end_keeps_both_ends() -> None:
    """The file's name stands at the beginning, the fault at the end."""
    message = str(InputError(f"model.gguf: tensor {'x' * 10**6} is damaged"))
    assert len(message) < 2 * MOST_CHARACTERS
    assert message.startswith("model.gguf: tensor xxx")
    assert message.endswith("xxx is damaged")


def test_errors_cross_processes() -> None:
    error = pickle.loads(pickle.dumps(InputError("a\nb")))
    assert (type(error), str(error)) == (InputError, r"a\nb")


def test_a_missing_extra_names_the_command_that_installs_it() -> None:
    assert str(missing_extra("matplotlib", "plot")) == (
        "matplotlib is not installed; install it with: pip install 'quantlab[plot]'"
    )
