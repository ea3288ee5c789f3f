"""Folders that appear whole or not at all, whatever happens to the process that writes them."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quantlab.checkpoint import atomic
from quantlab.checkpoint.atomic import atomic_folder
from quantlab.errors import InputError

# Writes the folder argv[1] again and again, every time with the same number in each of two files and in a third whose
# name is that number; says so after the first time.
WRITER = """
import itertools, sys
from pathlib import Path
from quantlab.checkpoint.atomic import atomic_folder

for number in itertools.count(int(sys.argv[2])):
    with atomic_folder(Path(sys.argv[1]), replace=True) as folder:
        (folder / "first.txt").write_text(str(number))
        (folder / "inner").mkdir()
        (folder / "inner" / "second.txt").write_text(str(number))
        (folder / str(number)).touch()
    print(number, flush=True)
"""

# Stops in the middle of writing argv[1], with half of its files there.
HALF_WRITER = """
import os, signal, sys, time
from pathlib import Path
from quantlab.checkpoint.atomic import atomic_folder

with atomic_folder(Path(sys.argv[1]), replace=True) as folder:
    (folder / "half.txt").write_text("half")
    (folder / "inner").mkdir()
    (folder / "inner" / "half.txt").write_text("half")
    print("half", flush=True)
    if sys.argv[2] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)
"""


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def write(folder: Path, content: str, *, replace: bool = False) -> None:
    with atomic_folder(folder, replace) as temporary:
        (temporary / "text.txt").write_text(content)


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_the_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    """Not before, and without a trace of how it was made."""
    destination = tmp_path / "out"
    with atomic_folder(destination, replace=False) as temporary:
        assert temporary.parent == tmp_path  # a rename never crosses file systems
        (temporary / "text.txt").write_text("complete")
        assert not destination.exists()
    assert contents(tmp_path) == {"out/text.txt": "complete"}
    assert list(tmp_path.iterdir()) == [destination]


def test_missing_parents_are_made(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b" / "out", "complete")
    assert contents(tmp_path) == {"a/b/out/text.txt": "complete"}


def test_a_relative_destination_is_taken_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the current folder changes in between."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with atomic_folder(Path("out"), replace=False) as temporary:
        (temporary / "text.txt").write_text("complete")
        os.chdir("elsewhere")
    assert contents(tmp_path) == {"out/text.txt": "complete"}


# What is killed.


def test_a_killed_writer_leaves_the_old_content_and_the_next_run_clears_up(tmp_path: Path) -> None:
    """SIGKILL in the middle of the block: no clean-up of its own could run."""
    destination = tmp_path / "out"
    write(destination, "old")
    process = start(HALF_WRITER, destination, "die")
    assert process.communicate()[0] == "half\n"
    assert process.returncode == -signal.SIGKILL
    assert contents(destination) == {"text.txt": "old"}
    assert contents(tmp_path) != {"out/text.txt": "old"}  # there is something to clear up

    write(destination, "new", replace=True)
    assert contents(tmp_path) == {"out/text.txt": "new"}
    assert list(tmp_path.iterdir()) == [destination]


def test_a_killed_writer_of_a_new_folder_leaves_none(tmp_path: Path) -> None:
    """The next run needs no permission to replace it."""
    destination = tmp_path / "out"
    start(HALF_WRITER, destination, "die").communicate()
    assert not destination.exists()
    write(destination, "new")
    assert contents(tmp_path) == {"out/text.txt": "new"}
    assert list(tmp_path.iterdir()) == [destination]


def test_no_moment_of_death_shows_half_a_folder(tmp_path: Path) -> None:
    """A process that replaces the folder without pause is killed at arbitrary moments, ten times.

    The moments are not reproducible, what is asked of them holds at every one.
    """
    destination, number = tmp_path / "out", 0
    delays = random.Random(0)
    for _ in range(10):
        process = start(WRITER, destination, number)
        process.stdout.readline()
        time.sleep(delays.uniform(0, 0.03))
        process.kill()
        process.communicate()
        seen = contents(destination)
        number = int(seen["first.txt"])
        assert seen == {"first.txt": str(number), "inner/second.txt": str(number), str(number): ""}
        number += 1
    write(destination, "last", replace=True)
    assert contents(tmp_path) == {"out/text.txt": "last"}
    assert list(tmp_path.iterdir()) == [destination]


@pytest.mark.parametrize(
    ("step", "left"),
    [
        ("_sync_entry", "old"),
        ("_sync_tree", "old"),
        ("_move_into_place", "old"),
        ("_exchange", "old"),
        ("_remove", "new"),
    ],
)
def test_an_error_at_the_end_leaves_one_of_the_two_contents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, left: str
) -> None:
    """Whichever step of the change fails, the folder is whole, and nothing lies beside it."""
    destination = tmp_path / "out"
    write(destination, "old")

    def fail(*arguments: object) -> None:
        raise OSError("the disk has gone")

    monkeypatch.setattr(atomic, step, fail)
    with pytest.raises(OSError, match="the disk has gone"):
        write(destination, "new", replace=True)
    assert contents(tmp_path) == {"out/text.txt": left}
    assert list(tmp_path.iterdir()) == [destination]


def test_systems_without_an_atomic_exchange_end_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There two renames do it; what a run leaves that was killed between them, the next one clears."""
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    destination = tmp_path / "out"
    write(destination, "old")
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "text.txt").write_text("older")
    write(destination, "new", replace=True)
    assert contents(tmp_path) == {"out/text.txt": "new"}
    assert list(tmp_path.iterdir()) == [destination]


# Two at once.


def test_a_second_writer_is_refused_with_one_line(tmp_path: Path) -> None:
    """Of another process; the first one is not disturbed, and when it is gone, the next may write."""
    destination = tmp_path / "out"
    process = start(HALF_WRITER, destination, "sleep")
    process.stdout.readline()
    before = contents(tmp_path)
    with pytest.raises(InputError) as caught:
        write(destination, "second", replace=True)
    assert str(caught.value) == f"{destination}: another process is writing it; wait, or choose another name"
    assert contents(tmp_path) == before
    process.kill()
    process.communicate()
    write(destination, "second")
    assert contents(tmp_path) == {"out/text.txt": "second"}


def test_a_second_writer_of_the_same_process_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    """Also at the very end, when the first is moving its folder into place."""
    destination = tmp_path / "out"
    refusals = []

    def try_second(*_: object) -> None:
        with pytest.raises(InputError, match="another process is writing it"):
            write(destination, "second", replace=True)
        refusals.append(1)

    with pytest.MonkeyPatch.context() as patch:
        for step in ("_sync_tree", "_move_into_place", "_sync_entry"):
            original = getattr(atomic, step)
            patch.setattr(atomic, step, lambda *a, original=original: (try_second(), original(*a), try_second()))
        with atomic_folder(destination, replace=True) as temporary:
            (temporary / "text.txt").write_text("first")
            try_second()
    assert len(refusals) >= 7
    assert contents(tmp_path) == {"out/text.txt": "first"}
    write(destination, "second", replace=True)
    assert contents(tmp_path) == {"out/text.txt": "second"}


def test_a_lock_that_its_holder_removes_meanwhile_guards_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer may open the lock file just before another one ends: a third would not see that it holds it."""
    destination = tmp_path / "out"
    take_lock, calls = fcntl.flock, []

    def flock(descriptor: int, operation: int) -> None:
        if not calls:
            (lock,) = tmp_path.iterdir()
            lock.unlink()
        calls.append(operation)
        take_lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with atomic_folder(destination, replace=False) as temporary:
        (temporary / "text.txt").write_text("first")
        with pytest.raises(InputError, match="another process is writing it"):
            write(destination, "second")
    assert contents(tmp_path) == {"out/text.txt": "first"}


def test_neighbours_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Two folders beside each other may be written at once."""
    with atomic_folder(tmp_path / "one", replace=False) as one, atomic_folder(tmp_path / "two", replace=False) as two:
        (one / "text.txt").write_text("1")
        (two / "text.txt").write_text("2")
    assert contents(tmp_path) == {"one/text.txt": "1", "two/text.txt": "2"}


def test_a_folder_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    """Without permission to replace, it stays, however late it came."""
    destination = tmp_path / "out"

    def write_slowly() -> None:
        with atomic_folder(destination, replace=False) as temporary:
            (temporary / "text.txt").write_text("mine")
            destination.mkdir()

    with pytest.raises(InputError, match=f"{destination}: exists already"):
        write_slowly()
    assert contents(tmp_path) == {}
    assert list(tmp_path.iterdir()) == [destination]


# What may stand at the destination.


def test_a_file_at_the_destination_is_refused_or_replaced(tmp_path: Path) -> None:
    destination = tmp_path / "out"
    destination.write_text("a file")
    with pytest.raises(InputError, match=f"{destination}: exists already; choose another name or pass --overwrite"):
        write(destination, "new")
    assert contents(tmp_path) == {"out": "a file"}
    write(destination, "new", replace=True)
    assert contents(tmp_path) == {"out/text.txt": "new"}
    assert list(tmp_path.iterdir()) == [destination]


@pytest.mark.parametrize("dangling", [False, True], ids=["link to a folder", "dangling link"])
def test_a_link_at_the_destination_is_replaced_and_not_followed(tmp_path: Path, dangling: bool) -> None:
    """What it pointed to stays as it was."""
    target, destination = tmp_path / "target", tmp_path / "out"
    write(target, "target")
    destination.symlink_to(tmp_path / "nowhere" if dangling else target)
    with pytest.raises(InputError, match=f"{destination}: exists already"):
        write(destination, "new")
    write(destination, "new", replace=True)
    assert not destination.is_symlink()
    assert contents(tmp_path) == {"out/text.txt": "new", "target/text.txt": "target"}


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("linked", [False, True])
def test_a_device_or_pipe_is_never_replaced(tmp_path: Path, replace: bool, linked: bool) -> None:
    """Root could: /dev/null would be a folder from then on."""
    pipe = tmp_path / "out"
    os.mkfifo(pipe)
    if linked:
        (tmp_path / "link").symlink_to(pipe)
    destination = tmp_path / "link" if linked else pipe
    with pytest.raises(InputError, match=f"^{destination}: is neither a file nor a folder; choose another name$"):
        write(destination, "new", replace=replace)
    assert pipe.is_fifo()
    assert destination.is_symlink() == linked
    assert len(list(tmp_path.iterdir())) == 1 + linked


def test_a_parent_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError) as caught:
        write(tmp_path / "file" / "out", "new")
    assert str(caught.value).startswith(f"{tmp_path / 'file'}: cannot be written: ")


def test_a_grandparent_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError) as caught:
        write(tmp_path / "file" / "folder" / "out", "new")
    assert str(caught.value) == f"{tmp_path / 'file' / 'folder'}: cannot be written: Not a directory"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a place where nobody can make a folder")
def test_a_parent_that_cannot_be_written_is_one_line() -> None:
    """/proc takes no folders, not even from root."""
    with pytest.raises(InputError, match=r"^/proc: cannot be written: "):
        write(Path("/proc/out"), "new")


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not count for root")
def test_a_parent_without_permission_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match=f"{tmp_path}: cannot be written: Permission denied"):
        write(tmp_path / "out", "new")
