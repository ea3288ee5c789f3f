"""--show-batch on a terminal and without one."""

from __future__ import annotations

import pytest
from quantlab.cli.batch_view import print_batch, show_batch

from quantlab import load_tokenizer
from quantlab.training.sample import sample_of
from quantlab.training.show_batch import BatchTotals, SampleView, Segment

ASKED, ANSWER = Segment("Hi [/b]\n\x1b[31m", 5, trained=False), Segment("Yes.</s>", 2, trained=True)
VIEWS = [
    SampleView("d.jsonl:1", (ASKED, ANSWER), 7, 2, ends=True, as_served=True),
    SampleView("d.jsonl:2", (ASKED,), 5, 0, ends=False, as_served=None),
]
TOTALS = BatchTotals(samples=9, tokens=90, trained_tokens=30, longest=12)
PLAIN = r"""tokens [[with loss]], without

d.jsonl:1: 2 of 7 tokens with loss; end token trained; same ids as serving
Hi [/b]
\x1b[31m[[Yes.</s>]]

d.jsonl:2: 0 of 5 tokens with loss; end token NOT trained; no prompt
Hi [/b]
\x1b[31m

9 samples, 90 tokens, 30 of them with loss; the longest has 12
"""


def test_brackets_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Control codes of the data are written out."""
    show_batch(VIEWS, TOTALS)
    assert capsys.readouterr().out == PLAIN


def test_brackets_where_no_colours_are_wanted(capsys, monkeypatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    show_batch(VIEWS, TOTALS)
    assert capsys.readouterr().out == PLAIN


def test_colours_on_a_terminal(capsys, monkeypatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    show_batch(VIEWS, TOTALS)
    out = capsys.readouterr().out
    assert "\x1b[1;32mYes.</s>\x1b[0m" in out
    assert "\x1b[2m\\x1b[31m\x1b[0m" in out
    assert "[[" not in out


def test_the_first_samples_and_the_totals_of_all(capsys, tokenizer_folder) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    ids = [*tokenizer.encode("the rain"), 2]
    print_batch([sample_of(ids, [(1, len(ids))], f"d.jsonl:{n}", None) for n in range(1, 4)], tokenizer, 2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[3] == "<s>[[ the rain</s>]]"
    assert [line.split(":")[1] for line in lines if line.startswith("d.jsonl")] == ["1", "2"]
    assert lines[-1].startswith(f"3 samples, {3 * len(ids)} tokens, {3 * len(ids) - 3} of them with loss; ")
