"""Find the merge: candidates are drawn, merged and scored, until the best one is written (arXiv 2403.13187).

Every candidate is an ordinary merge config, merged as `quantlab merge` does it. Any number of processes may share a
search: each draws, merges and scores candidates of its own, and learns of the others' by the storage.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantlab.checkpoint.atomic import check_destination
from quantlab.checkpoint.byte_sizes import bytes_of
from quantlab.checkpoint.checksums import model_digest
from quantlab.errors import InputError
from quantlab.merging.card import CONFIG_FILE
from quantlab.merging.layer_path import NOTED_SHIFT, norm_shift
from quantlab.merging.references import parse_reference
from quantlab.search.evolution_file import EvolveResult, JudgedScore, history_of, result_of, write_history
from quantlab.search.evolve_config import EvolveConfig, Genome, read_evolve_config
from quantlab.search.fitness import Fitness, Score, check_disjoint, digest_of
from quantlab.search.genome import ParameterSpace, PathSpace, SearchedModel, Space, open_models
from quantlab.search.study import SAMPLERS, Study, Trial, open_storage, quiet_optuna, recent_mean
from quantlab.search.workshop import MergeOptions, Workshop

Progress = Callable[[int, int, str], None]  # (trials finished, trials in all, the scores so far)
Stage = Callable[[str, str], AbstractContextManager[Progress]]  # (label, unit) -> the progress of one stage
MOST_FAILURES = 10  # candidates without one that can be scored
RECENT = 20  # trials whose mean is shown
UNTUNED, MERGED = "untuned", "best merge"
EMBEDDING_ROWS = 1024  # that tell how small the residual stream may be


def evolve(
    config: str | Path | EvolveConfig,
    out: str | Path,
    *,
    trials: int = 100,
    storage: str | None = None,
    sampler: str = "cmaes",
    seed: int = 0,
    max_ram: int | str | None = None,
    threads: int | None = None,
    trust_code: bool = False,
    overwrite: bool = False,
    stage: Stage | None = None,
) -> EvolveResult:
    """Search for the merge that scores best, and write it.

    The same call again goes on where an interrupted one stopped, or joins one that is at work.

    Args:
        config: YAML: a file, the text, or what `read_evolve_config` gives.
        out: folder to make: the winner's model, with its merge config.
        trials: candidates to score, those of all processes together; for both spaces, in each.
        storage: a journal file or database URL that processes share; by default a journal in `OUT.evolve`.
        sampler: "cmaes", "tpe" or "random".
        seed: of what is drawn, by the sampler and by merge methods.
        max_ram: see `merge_checkpoints`.
        threads: to merge and score with, by default one a core.
        trust_code: whether Python functions that the config names may be run.
        stage: shows progress.

    Raises:
        InputError: a config, model or file that is wrong, fitness and test that have rows in common, a storage that
            cannot be opened, an `out` that exists; no candidate could be scored.
    """
    started, out = time.monotonic(), Path(out)
    if trials < 1:
        raise InputError(f"--trials {trials}: at least 1 is needed")
    if sampler not in SAMPLERS:
        raise InputError(f"--sampler {sampler}: choose one of: {', '.join(SAMPLERS)}")
    if out.suffix == ".gguf":
        raise InputError(f"{out}: a search writes a folder; export it to GGUF afterwards")
    parsed = config if isinstance(config, EvolveConfig) else read_evolve_config(config)
    check_disjoint(parsed.fitness, parsed.test)
    scorers = [Fitness(terms, threads=threads, trust_code=trust_code) if terms else None
               for terms in (parsed.fitness, parsed.test)]  # fmt: skip
    fitness, test = scorers
    assert fitness is not None
    most = bytes_of(max_ram) if isinstance(max_ram, str) else max_ram
    workshop = Workshop(work_folder_of(out), MergeOptions(most, seed, threads))
    settings = _Settings(trials, sampler, seed, out, overwrite, stage or _silent)
    with quiet_optuna():
        run = _Run(parsed, fitness, test, workshop, settings)
        with workshop.opened():
            result = run.run(open_storage(storage or workshop.folder / "study.journal"))
    return dataclasses.replace(result, seconds=time.monotonic() - started)


def work_folder_of(out: Path) -> Path:
    """Where a search for destination `out` keeps its journal, unless it has another storage, and its candidates."""
    return out.with_name(f"{out.name}.evolve")


@dataclass(frozen=True)
class _Settings:
    trials: int
    sampler: str
    seed: int
    out: Path
    overwrite: bool
    stage: Stage


@dataclass(frozen=True)
class _Found:
    """The outcome of one stage."""

    study: Study
    best: Trial
    config: str


class _Run:
    """One process's part in a search."""

    def __init__(
        self, config: EvolveConfig, fitness: Fitness, test: Fitness | None, workshop: Workshop, settings: _Settings
    ) -> None:
        self._genome, self._fitness, self._test = config.genome, fitness, test
        self._workshop, self._settings = workshop, settings
        self._models = open_models(self._genome.models)
        self._merge_place = settings.out.with_name(f"{settings.out.name}-merged")
        self._space = self._first_space()
        check_destination(settings.out, settings.overwrite)
        if self._genome.space == "both":
            PathSpace(self._genome, list(self._models.values()))  # a family that it is not for shows at once
            check_destination(self._merge_place, settings.overwrite)
        workshop.merge(self._space.config(self._space.plain), settings.out, overwrite=settings.overwrite, dry_run=True)
        self._name = f"evolve-{self._genome.space}-{_digest(self._genome, self._models, self._fitness)}"
        self._notes: list[str] = []
        self._before = history_of(settings.out)

    def run(self, storage: Any) -> EvolveResult:
        study = Study(storage, self._name, self._space.genes, self._settings.sampler, self._settings.seed)
        if begun := len(study.finished()):
            self._notes.append(f"{begun} trials were there already, of an earlier run or of other processes")
        baselines = self._baselines(study)
        found = self._search(study, self._space, "evolving")
        finished = found.study.finished()
        if self._genome.space != "both":
            return self._finish(found, baselines, {}, finished)
        agreed = study.agree("winner", found.best.number)
        winner = next(trial for trial in finished if trial.number == agreed)
        merge = self._space.config(winner.values)
        assert winner.score is not None
        with self._workshop.candidate(merge, "merged") as folder:
            partner = self._genome.partner or max(self._genome.models, key=lambda name: baselines[name])
            models = [*open_models([str(folder)]).values(), self._models[partner]]
            paths = PathSpace(self._genome, models)
            name = f"{self._name}-paths-{winner.number}-{self._genome.models.index(partner)}"
            second = Study(storage, name, paths.genes, self._settings.sampler, self._settings.seed)
            found = self._search(second, paths, "evolving paths")
        to_stay = [dataclasses.replace(models[0], name=str(self._merge_place)), models[1]]
        found = dataclasses.replace(found, config=PathSpace(self._genome, to_stay).config(found.best.values))
        baselines[MERGED] = winner.score
        return self._finish(found, baselines, {MERGED: merge}, [*finished, *second.finished()])

    def _first_space(self) -> Space:
        models = list(self._models.values())
        if self._genome.space == "layers":
            return PathSpace(self._genome, models)
        return ParameterSpace(self._genome, models)

    # -- scoring

    def _baselines(self, study: Study) -> dict[str, float]:
        """Scores of what one has without a search; a study keeps them for all processes."""
        models = [*([self._genome.base] if self._genome.base is not None else []), *self._genome.models]
        names = [*models, UNTUNED]
        kept = study.note("baselines")
        if kept is None:
            with self._settings.stage("scoring the models", "models") as say:
                kept = []
                for place, name in enumerate(names):
                    kept.append(self._baseline(name, self._fitness, {}))
                    say(place + 1, len(names), name)
            kept = [None if score is None else score.score for score in kept]
            study.set_note("baselines", kept)
        found = {name: score for name, score in zip(names, kept, strict=True) if score is not None}
        if UNTUNED not in found:
            self._notes.append("the untuned merge gives no numbers that could be scored")
        return found

    def _baseline(self, name: str, fitness: Fitness, configs: Mapping[str, str]) -> Score | None:
        """The score of a model by its name; None for an untuned merge that computes no numbers."""
        if name == UNTUNED or name in configs:
            config = configs.get(name) or self._space.config(self._space.plain)
            try:
                with self._workshop.candidate(config, "baseline") as folder:
                    return fitness.score(folder)
            except InputError:
                if name != UNTUNED:
                    raise
                return None
        reference = parse_reference(name)
        if reference.adapter is None and reference.revision is None:
            return fitness.score(name)
        alone = json.dumps({"merge_method": "passthrough", "models": [{"model": name}]})
        with self._workshop.candidate(alone, "baseline") as folder:
            return fitness.score(folder)

    def _search(self, study: Study, space: Space, label: str) -> _Found:
        study.begin_with(space.start)
        total = self._settings.trials
        with self._settings.stage(label, "trials") as say:
            _show(study, total, say)
            while (trial := study.ask(total)) is not None:
                self._score(study, trial, space)
                _show(study, total, say)
                _check_hope(study)
        best = study.best()
        if isinstance(space, PathSpace):
            self._note_shift(space, best)
        return _Found(study, best, space.config(best.values))

    def _score(self, study: Study, trial: Trial, space: Space) -> None:
        try:
            with (
                _warned_enough(),
                self._workshop.candidate(space.config(trial.values), f"candidate-{trial.number}") as folder,
            ):
                score = self._fitness.score(folder)
        except InputError as error:
            study.fail(trial, str(error))
        except BaseException:
            study.give_up(trial)
            raise
        else:
            study.tell(trial, score.score, stderr=score.stderr, terms=dict(score.terms))

    # -- the outcome

    def _finish(
        self, found: _Found, baselines: Mapping[str, float], merges: Mapping[str, str], trials: Sequence[Trial]
    ) -> EvolveResult:
        """Judge the winner, and write it, if no other process has done so."""
        out, overwrite = self._settings.out, self._settings.overwrite
        with self._workshop.alone():
            history = history_of(out)
            if history is not None and history != self._before and history["search"] == self._name:
                return result_of(history)
            for merge in merges.values():
                if not _is_merge_of(self._merge_place, merge):  # which a process that was killed may have left
                    self._workshop.merge(merge, self._merge_place, overwrite=overwrite)
            with self._workshop.candidate(found.config, "best") as folder:
                result = self._result(found, folder, baselines, merges, trials)
            self._workshop.merge(found.config, out, overwrite=overwrite)
            write_history(out, self._name, result, trials)
        return result

    def _result(
        self,
        found: _Found,
        folder: Path,
        baselines: Mapping[str, float],
        merges: Mapping[str, str],
        trials: Sequence[Trial],
    ) -> EvolveResult:
        (model,) = open_models([str(folder)]).values()
        assert found.best.score is not None
        return EvolveResult(
            best_score=found.best.score,
            best_stderr=found.best.stderr,
            baseline_scores=dict(baselines),
            trials=len(trials),
            failed=sum(trial.score is None for trial in trials),
            config=str(self._settings.out / CONFIG_FILE),
            space=self._genome.space,
            layers=model.layers,
            test_scores=None if self._test is None else self._judge(self._test, folder, baselines, merges),
            seconds=0.0,
            notes=tuple(self._notes),
        )

    def _judge(
        self, test: Fitness, folder: Path, baselines: Mapping[str, float], merges: Mapping[str, str]
    ) -> dict[str, JudgedScore]:
        """Scores of the winner and of what one has without a search, on what it has not seen."""
        scores = {"best": test.score(folder)}
        with self._settings.stage("judging", "models") as say:
            for place, name in enumerate(baselines):
                if (score := self._baseline(name, test, merges)) is not None:
                    scores[name] = score
                say(place + 1, len(baselines), name)
        return {name: JudgedScore(score.score, score.stderr) for name, score in scores.items()}

    def _note_shift(self, space: PathSpace, best: Trial) -> None:
        """Say so where folding is inexact: norms' epsilon does not scale with the stream."""
        shift = norm_shift(space.path(best.values), *_norms_of(space.models[0]))
        if shift > NOTED_SHIFT:
            self._notes.append(
                "scales are folded into the weights; the norms' epsilon, which they do not scale, counts for up to "
                f"{shift:.1g} of what a norm gives where the residual stream is as small as the embeddings"
            )


def _norms_of(model: SearchedModel) -> tuple[float, float]:
    """The norms' epsilon, and the mean square of the embeddings."""
    config, name = model.source.config, model.family.embedding
    keys = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps")
    epsilon = next((float(config[key]) for key in keys if key in config), 1e-5)
    rows = model.source.rows(name, 0, min(EMBEDDING_ROWS, model.source.shape(name)[0]))
    return epsilon, float(rows.double().square().mean())


def _digest(genome: Genome, models: Mapping[str, SearchedModel], fitness: Fitness) -> str:
    """Of what decides which values mean what, and how good they are. Names of files do not: they differ by machine."""
    decisive = dataclasses.asdict(genome)
    decisive["models"] = [_identity(name, model) for name, model in models.items()]
    if genome.base is not None:
        (base,) = open_models([genome.base]).values()
        decisive["base"] = _identity(genome.base, base)
    decisive["partner"] = None if genome.partner is None else genome.models.index(genome.partner)
    decisive["fitness"] = digest_of(fitness.terms)
    return hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _identity(name: str, model: SearchedModel) -> list[str | None]:
    return [model_digest(model.source.checkpoint), parse_reference(name).adapter]


def _is_merge_of(folder: Path, config: str) -> bool:
    try:
        return (folder / CONFIG_FILE).read_text(encoding="utf-8") == config
    except OSError:
        return False


def _check_hope(study: Study) -> None:
    """Give up where no candidate can be scored.

    Raises:
        InputError: the reason of the last one.
    """
    finished = study.finished()
    if len(finished) >= MOST_FAILURES and all(trial.score is None for trial in finished):
        study.best()


def _show(study: Study, total: int, say: Progress) -> None:
    finished = study.finished()
    scores = [trial.score for trial in finished if trial.score is not None]
    note = f"best {max(scores):.4f}, mean {recent_mean(finished, RECENT):.4f}" if scores else ""
    say(len(finished), total, note)


@contextlib.contextmanager
def _warned_enough() -> Iterator[None]:
    """What there is to warn of, such as the engine that runs, was said of the models already."""
    logger = logging.getLogger("quantlab")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def _silent(label: str, unit: str) -> Iterator[Progress]:
    yield lambda done, total, note: None
