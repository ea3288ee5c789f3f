"""Measurements that outlive a run."""

from __future__ import annotations

import pytest

from quantlab import InputError
from quantlab.search.measuring import Divergence
from quantlab.search.plan_work import open_plan_work

OPTIONS = {"model": "abc", "method": "rtn"}


def test_figures_come_back_to_the_last_bit(tmp_path):
    figure = Divergence(0.1 + 0.2, 1e-17 / 3, 16)
    with open_plan_work(tmp_path / "work", OPTIONS, discard=False) as work:
        work.add("a q4_0", figure)
        assert work.found == 0
    with open_plan_work(tmp_path / "work", OPTIONS, discard=False) as work:
        assert work.found == 1
        assert work.get("a q4_0") == figure
        assert work.get("a q4_1") is None


@pytest.mark.parametrize("cut", [1, 10, 30])
def test_a_line_that_was_cut_off_is_measured_again(tmp_path, cut):
    with open_plan_work(tmp_path / "work", OPTIONS, discard=False) as work:
        work.add("a", Divergence(1.0, 0.1, 16))
        work.add("b", Divergence(2.0, 0.2, 16))
    file = tmp_path / "work" / "figures.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    with open_plan_work(tmp_path / "work", OPTIONS, discard=False) as work:
        assert work.get("a") == Divergence(1.0, 0.1, 16)
        assert work.get("b") is None
        work.add("b", Divergence(3.0, 0.3, 16))
    with open_plan_work(tmp_path / "work", OPTIONS, discard=False) as work:
        assert work.get("b") == Divergence(3.0, 0.3, 16)


def test_figures_of_other_options_are_refused_or_discarded(tmp_path):
    with open_plan_work(tmp_path / "work", OPTIONS, discard=False) as work:
        work.add("a", Divergence(1.0, 0.1, 16))
    other = {**OPTIONS, "method": "gptq"}
    with pytest.raises(InputError, match='measured with another method \\("rtn", now "gptq"\\); delete it'):
        open_plan_work(tmp_path / "work", other, discard=False).__enter__()
    with open_plan_work(tmp_path / "work", other, discard=True) as work:
        assert work.found == 0


def test_a_folder_of_something_else_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is a folder of something else"):
        open_plan_work(tmp_path, OPTIONS, discard=True).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_two_at_a_time_are_refused(tmp_path):
    with (
        open_plan_work(tmp_path / "work", OPTIONS, discard=False),
        pytest.raises(InputError, match="another process is at work there"),
    ):
        open_plan_work(tmp_path / "work", OPTIONS, discard=False).__enter__()


def test_a_damaged_line_is_named(tmp_path):
    with open_plan_work(tmp_path / "work", OPTIONS, discard=False) as work:
        work.add("a", Divergence(1.0, 0.1, 16))
    file = tmp_path / "work" / "figures.jsonl"
    file.write_bytes(b'{"key": 1}\n' + file.read_bytes())
    with pytest.raises(InputError, match="line 1 is damaged"):
        open_plan_work(tmp_path / "work", OPTIONS, discard=False).__enter__()
