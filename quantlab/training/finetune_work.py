"""The folder beside OUT that holds a fine-tuning run until OUT is complete: whose it is, and what is left of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from quantlab.errors import InputError
from quantlab.training.checkpoints import newest_complete, remove_incomplete
from quantlab.training.failures import TrainingFailedError, disk_fault, is_out_of_memory
from quantlab.training.surroundings import is_first_process

NOTE, PARTIAL = "run.json", "run.partial"
CHECKPOINTS = "checkpoints"


def work_of(out: Path) -> Path:
    """Where the work at hand for `out` lies.

    Raises:
        InputError: `out` has no name of its own, as `.` and `..` have not.
    """
    if out.name in ("", ".."):
        raise InputError(f"{out}: is no name for a folder to make; choose another name")
    return out.with_name(out.name + ".training")


def check_folders(data: Path, out: Path, work: Path, resume: bool, overwrite: bool) -> None:
    """Refuse to write over what is there.

    Raises:
        InputError: `out` exists, or is or holds the data; `work` holds a run that is not to be resumed, or something
            else.
    """
    if out.exists() and data.resolve().is_relative_to(out.resolve()):
        raise InputError(f"{out}: is the data itself, or a folder around it; choose another name")
    if out.exists() and not overwrite:
        raise InputError(f"{out}: exists already; choose another name or pass --overwrite")
    if not work.exists() or not is_first_process():
        return
    if not work.is_dir() or (not (work / NOTE).exists() and {path.name for path in work.iterdir()} - {PARTIAL}):
        raise InputError(f"{work}: is not this program's, and the run's checkpoints would lie there; rename it")
    if not resume:
        raise InputError(f"{work}: holds an unfinished run; go on with --resume, or remove the folder")


def check_same_run(work: Path, identity: dict[str, Any]) -> None:
    """Note what the run is made of when it starts; refuse to resume it with anything else, which would change it.

    Raises:
        InputError: `work` holds another run, or cannot be written.
    """
    note = work / NOTE
    if note.exists():
        try:
            recorded = json.loads(note.read_text(encoding="utf-8"))
        except ValueError:
            recorded = {}
        if changed := [key for key, value in identity.items() if recorded.get(key) != value]:
            raise InputError(
                f"{work}: holds a run with another {', '.join(changed)}; resume with that, or remove the folder"
            )
    elif is_first_process():
        partial = work / PARTIAL
        try:
            work.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(identity), encoding="utf-8")
            partial.replace(note)
        except OSError as error:
            if disk_fault(error):
                raise
            raise InputError(f"{work}: cannot be written: {error.strerror}; choose another name") from None


def explained(error: Exception, work: Path) -> TrainingFailedError | None:
    """What to tell of a failure, if its kind is known: where it was, which checkpoint is left, and what to change."""
    good = newest_complete(work / CHECKPOINTS)
    kept = "no checkpoint was complete yet" if good is None else f"the last good checkpoint is {good}"
    if isinstance(error, TrainingFailedError):
        advice = "lower --learning-rate or --gradient-clip, and look at the rows of that step"
        return TrainingFailedError(f"{error}; {kept}; {advice}")
    if is_out_of_memory(error):
        advice = "use --gradient-checkpointing, a smaller --batch-size or --context, or another --device"
        return TrainingFailedError(f"out of memory; {kept}; {advice}")
    if fault := disk_fault(error):
        advice = "make room, and run it again" + ("" if good is None else " with --resume")
        return TrainingFailedError(f"{work.parent}: cannot be written: {fault}; {kept}; {advice}")
    return None


def tidy(work: Path) -> None:
    """After a run that did not end: drop checkpoints that are not complete, and the folder if none is."""
    if not is_first_process():
        return
    if newest_complete(work / CHECKPOINTS) is None:
        shutil.rmtree(work, ignore_errors=True)
    else:
        remove_incomplete(work / CHECKPOINTS)
