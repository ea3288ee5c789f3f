"""Folders of unfinished work: one process at a time, the same options alone, and nothing thrown away unasked."""

from __future__ import annotations

import pytest

from quantlab.checkpoint import unfinished
from quantlab.errors import InputError

OPTIONS = {"model": "abc", "levels": [16, 8]}


def work_of(tmp_path, options=OPTIONS):
    folder = tmp_path / "out.work"
    folder.mkdir()
    unfinished.write_options(folder, options)
    (folder / "done").write_text("so far")
    return folder


def test_one_at_a_time(tmp_path):
    folder = tmp_path / "out.work"
    with (
        unfinished.locked(folder),
        pytest.raises(InputError, match="another process is at work there; wait, or sing"),
        unfinished.locked(folder, "sing"),
    ):
        pass
    with unfinished.locked(folder):
        pass


def test_what_fails_inside_is_not_taken_for_the_lock(tmp_path):
    with pytest.raises(BlockingIOError), unfinished.locked(tmp_path / "out.work"):
        raise BlockingIOError


def test_a_file_in_its_place(tmp_path):
    (tmp_path / "out.work").write_text("mine")
    with pytest.raises(InputError, match="cannot be written"), unfinished.locked(tmp_path / "out.work"):
        pass


def test_work_goes_on_with_the_same_options(tmp_path):
    folder = work_of(tmp_path)
    assert unfinished.begin(folder, OPTIONS, begun=True, resume=True, discard=False)
    assert (folder / "done").read_text() == "so far"
    with pytest.raises(InputError, match=r'begun with model "abc", now it is "x"; give the same options'):
        unfinished.begin(folder, OPTIONS | {"model": "x"}, begun=True, resume=True, discard=True)
    assert (folder / "done").exists()


def test_unasked_nothing_is_thrown_away(tmp_path):
    folder = work_of(tmp_path)
    with pytest.raises(InputError, match="holds unfinished work; pass --resume"):
        unfinished.begin(folder, OPTIONS, begun=True, resume=False, discard=False)
    assert (folder / "done").exists()
    assert not unfinished.begin(folder, {"model": "x"}, begun=True, resume=False, discard=True)
    assert list(folder.iterdir()) == [folder / unfinished.OPTIONS]
    assert unfinished.difference(folder, OPTIONS) == ("levels", "null", "[16, 8]")


def test_nothing_to_resume_is_said(tmp_path):
    folder, said = work_of(tmp_path), []
    assert not unfinished.begin(folder, OPTIONS, begun=False, resume=True, discard=False, say=said)
    assert said == [f"nothing to resume: {folder} holds no unfinished work; began anew"]
