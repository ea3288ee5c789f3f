"""A search that any number of processes share: an optuna study in a journal file or a database."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import re
import socket
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantlab.errors import InputError, missing_extra, one_line
from quantlab.search.genome import Gene, Values

SAMPLERS = ("cmaes", "tpe", "random")
SEPARABLE_FROM = 150  # genes: a full covariance of more fills the storage (8 bytes times their square, a generation)
PATIENCE = 60.0  # seconds that a trial of another machine may take at least, before it counts as abandoned
PATIENCE_FACTOR = 5  # times the longest finished trial
LOOK_AGAIN = 0.5  # seconds, while others score the last trials
WORKER, FAILURE = "worker", "failure"


@dataclass(frozen=True)
class Trial:
    """One set of values, drawn and maybe scored.

    Attributes:
        score: None where scoring failed, for the reason `failure`.
        seconds: that scoring took.
    """

    number: int
    values: Values
    score: float | None = None
    stderr: float | None = None
    failure: str | None = None
    seconds: float = 0.0


class Study:
    """The trials of one search, those of other processes included.

    Args:
        storage: what `open_storage` gives.
        name: processes that use the same name share the study.
        genes: what is drawn.
        sampler: "cmaes", "tpe" or "random".
        seed: what is drawn depends on it, on the trial's number, and on the trials that were finished then.
    """

    def __init__(self, storage: Any, name: str, genes: Sequence[Gene], sampler: str = "cmaes", seed: int = 0) -> None:
        import optuna

        self._storage, self._name = storage, name
        self._space = {g.name: optuna.distributions.FloatDistribution(g.low, g.high) for g in genes}
        self._study = _patiently(
            lambda: optuna.create_study(
                study_name=name,
                storage=storage,
                direction="maximize",
                load_if_exists=True,
                sampler=_sampler(sampler, seed, self._space),
            )
        )
        self._asked: dict[int, Any] = {}

    def begin_with(self, values: Values) -> None:
        """Have these values drawn first, if no process has asked for it before."""
        self._study.enqueue_trial(dict(values), skip_if_exists=True)

    def ask(self, budget: int) -> Trial | None:
        """The next values to score; None once `budget` trials are finished. Waits while others score the last ones."""
        while True:
            finished = len(self.finished())
            if finished >= budget:
                return None
            if finished + self._being_scored() < budget:
                asked = self._study.ask(self._space)
                asked.set_user_attr(WORKER, f"{socket.gethostname()}:{os.getpid()}")
                self._asked[asked.number] = asked
                return Trial(asked.number, dict(asked.params))
            time.sleep(LOOK_AGAIN)

    def tell(self, trial: Trial, score: float, **notes: Any) -> None:
        """Finish a trial; `notes` are JSON values that go with it."""
        asked = self._asked.pop(trial.number)
        for name, value in notes.items():
            asked.set_user_attr(name, value)
        self._study.tell(asked, score)

    def fail(self, trial: Trial, reason: str) -> None:
        """Finish a trial whose values cannot be scored."""
        asked = self._asked.pop(trial.number)
        asked.set_user_attr(FAILURE, one_line(reason, 500))
        self._end(asked)

    def give_up(self, trial: Trial) -> None:
        """Leave a trial unscored that was interrupted: it does not count."""
        if trial.number in self._asked:
            self._end(self._asked.pop(trial.number))

    def finished(self) -> list[Trial]:
        """All trials that were scored, or could not be, of all processes, by number."""
        import optuna

        found = []
        for each in self._study.get_trials(deepcopy=False):
            seconds = each.duration.total_seconds() if each.duration is not None else 0.0
            if each.state == optuna.trial.TrialState.COMPLETE:
                stderr = each.user_attrs.get("stderr")
                found.append(Trial(each.number, dict(each.params), float(each.value), stderr, seconds=seconds))
            elif each.state == optuna.trial.TrialState.FAIL and FAILURE in each.user_attrs:
                reason = str(each.user_attrs[FAILURE])
                found.append(Trial(each.number, dict(each.params), failure=reason, seconds=seconds))
        return found

    def best(self) -> Trial:
        """The trial of the highest score, the first among equals.

        Raises:
            InputError: none could be scored.
        """
        scored = [trial for trial in self.finished() if trial.score is not None]
        if not scored:
            reasons = [trial.failure for trial in self.finished() if trial.failure]
            raise InputError(f"no candidate could be scored: {reasons[-1] if reasons else 'there was none'}")
        return max(scored, key=lambda trial: (trial.score or 0.0, -trial.number))

    def note(self, key: str) -> Any:  # Any: JSON
        """What `set_note` has kept; None if there is nothing."""
        return self._study.user_attrs.get(key)

    def set_note(self, key: str, value: Any) -> None:
        """Keep a JSON value with the study."""
        self._study.set_user_attr(key, value)

    def agree(self, about: str, proposal: int) -> int:
        """What all processes take for `about`: what the first one proposed. A storage numbers trials one after the
        other, so a study of proposals decides who was first.
        """
        import optuna

        proposals = _patiently(
            lambda: optuna.create_study(
                study_name=f"{self._name}-{about}", storage=self._storage, load_if_exists=True, direction="maximize"
            )
        )
        if not proposals.get_trials(deepcopy=False):
            proposals.add_trial(optuna.trial.create_trial(value=0.0, user_attrs={"proposal": proposal}))
        return int(proposals.get_trials(deepcopy=False)[0].user_attrs["proposal"])

    def _end(self, asked: Any) -> None:
        import optuna

        self._study.tell(asked, state=optuna.trial.TrialState.FAIL)

    def _being_scored(self) -> int:
        """Trials that a living process is at."""
        import optuna

        running = self._study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))
        longest = max((trial.seconds for trial in self.finished()), default=0.0)
        return sum(_is_alive(each, max(PATIENCE, PATIENCE_FACTOR * longest)) for each in running)


def open_storage(where: str | Path) -> Any:  # Any: optuna's storage
    """A journal file, or a database by its URL (sqlite:///FILE, postgresql://USER:PASSWORD@HOST/DATABASE).

    Raises:
        InputError: it cannot be opened, or what it needs is not installed.
    """
    try:
        import cmaes  # noqa: F401 what optuna asks for when it draws
        import optuna
    except ImportError as error:
        raise missing_extra(error.name or "optuna", "search") from None
    shown = re.sub(r"(//[^/@:]*:)[^@]*@", r"\1***@", str(where))
    if "://" in str(where):
        from sqlalchemy.exc import SQLAlchemyError

        try:
            return _patiently(lambda: optuna.storages.RDBStorage(str(where)))
        except (ImportError, SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            reason = one_line(str(error).splitlines()[0], 300)
            raise InputError(f"--storage {shown}: cannot be opened: {reason}") from None
    path = Path(where)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    except OSError as error:
        raise InputError(f"--storage {shown}: cannot be written: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"--storage {shown}: is no journal of a search; name a new file, or a database URL") from None


@contextlib.contextmanager
def quiet_optuna() -> Iterator[None]:
    """Errors only: commands have displays of their own."""
    try:
        import optuna
    except ImportError:
        raise missing_extra("optuna", "search") from None
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def recent_mean(trials: Sequence[Trial], count: int) -> float:
    """The mean of the last scores; NaN if there are none."""
    scores = [trial.score for trial in trials if trial.score is not None][-count:]
    return math.fsum(scores) / len(scores) if scores else math.nan


def _patiently(open: Any) -> Any:
    """Call it again if processes that begin at the same moment make the same tables."""
    import optuna
    from sqlalchemy.exc import DBAPIError

    for attempt in range(4):
        try:
            return open()
        except (DBAPIError, optuna.exceptions.StorageInternalError):
            if attempt == 3:
                raise
            time.sleep(0.3 * (attempt + 1))
    return None


def _is_alive(trial: Any, patience: float) -> bool:
    """Whether the process that scores a trial is still there, as far as one can tell."""
    host, _, number = str(trial.user_attrs.get(WORKER, "")).rpartition(":")
    if host == socket.gethostname() and number.isdigit():
        return process_exists(int(number))
    if trial.datetime_start is None:
        return False
    return (datetime.datetime.now() - trial.datetime_start).total_seconds() < patience


def process_exists(number: int) -> bool:
    """Whether this machine has such a process."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def _sampler(kind: str, seed: int, space: Mapping[str, Any]) -> Any:
    """A sampler that draws by a trial's number: going on later, or elsewhere, draws what going on at once had."""
    import optuna

    def numbered(number: int) -> Any:
        drawn = (1_000_003 * seed + number) % (1 << 31)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # separable CMA-ES counts as an experiment there
            if kind == "cmaes":
                separable = len(space) >= SEPARABLE_FROM
                return optuna.samplers.CmaEsSampler(
                    seed=drawn, n_startup_trials=0, use_separable_cma=separable, warn_independent_sampling=False
                )
            if kind == "tpe":
                return optuna.samplers.TPESampler(seed=drawn, constant_liar=True)
            return optuna.samplers.RandomSampler(seed=drawn)

    class Numbered(optuna.samplers.BaseSampler):
        def before_trial(self, study: Any, trial: Any) -> None:
            self._inner = numbered(trial.number)
            self._inner.before_trial(study, trial)

        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            # CMA-ES would wait for a finished trial to learn the space from, and draw blindly until then.
            return dict(space) if kind == "cmaes" else self._inner.infer_relative_search_space(study, trial)

        def sample_relative(self, study: Any, trial: Any, search_space: dict[str, Any]) -> dict[str, Any]:
            return self._inner.sample_relative(study, trial, search_space)

        def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
            return self._inner.sample_independent(study, trial, name, distribution)

        def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
            self._inner.after_trial(study, trial, state, values)

    return Numbered()
