"""A size or a divergence as the target: bits go where a measurement says that they are worth most."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from quantlab.calibration.calibrated import CalibrationOptions, usable_threads
from quantlab.calibration.learned import LearnSettings
from quantlab.calibration.quantize import QuantizeReport, is_own_output, quantize_checkpoint
from quantlab.calibration.samples import CalibrationRequest, open_calibration
from quantlab.checkpoint import open_checkpoint
from quantlab.errors import InputError
from quantlab.formats import format_named
from quantlab.search.candidates import CANDIDATES, Candidates
from quantlab.search.frontier import smallest_that_meets
from quantlab.search.knapsack import Choice, Knapsack
from quantlab.search.measuring import Divergence, Meter
from quantlab.search.plan_file import Plan, check_plan_path, plan_path_of, plan_text, write_plan
from quantlab.search.plan_work import PlanWork, open_plan_work, plan_work_of
from quantlab.search.request import Stage, TargetRequest
from quantlab.search.sensitivities import Prober, Sensitivities
from quantlab.search.statistics import float_statistics

ROUNDS = 8  # of solving and measuring what the solution rests on
PROBE = format_named("q4_1")  # measured for every tensor, whatever the target, so that targets share the figures


@dataclass(frozen=True)
class PlannedReport(QuantizeReport):
    """Also what the plan promised and what came of it. `kld` is the mean KL divergence from the float model on held-out
    windows and `kld_upper` its one-sided 95 % bound; `kld_joint` is the same on the windows that the sensitivities were
    measured on, to be set against `kld_sum_of_parts`. All but the last are None in a dry run for a size.
    """

    plan: str | None = None
    plan_text: str = ""
    target_bpw: float | None = None
    max_kld: float | None = None
    kld: float | None = None
    kld_stderr: float | None = None
    kld_upper: float | None = None
    kld_joint: float | None = None
    kld_sum_of_parts: float | None = None
    measurements: int = 0


@contextlib.contextmanager
def _silent(label: str, unit: str) -> Any:
    yield lambda done, total, note: None


def quantize_to_target(
    model: str | Path,
    out: Path,
    *,
    target_bpw: float | None = None,
    max_kld: float | None = None,
    method: str = "rtn",
    calibration: CalibrationOptions | None = None,
    learning: LearnSettings | None = None,
    plan: Path | None = None,
    plan_work: Path | None = None,
    measurements: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    threads: int | None = None,
    stage: Stage = _silent,
) -> PlannedReport:
    """Choose one of Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 for every linear weight, embedding and head, and quantize so.

    What each choice costs is measured: one tensor is changed, the others stay float, and the KL divergence from the
    float model is taken on windows of the calibration text. Figures are kept in `OUT.planning` until OUT is written, or
    in `plan_work` for good; a run that finds them there goes on.

    Args:
        model: folder, GGUF file or hub id of a float model.
        out: folder to make, or GGUF file if it ends in `.gguf`.
        target_bpw: the most bits per weight over all parameters, as reports count them; of all mixes within them the
            one with the least predicted divergence is chosen.
        max_kld: the mean KL divergence in nats per token that the upper 95 % bound on held-out windows must not exceed;
            of the mixes that meet it the smallest is chosen.
        method: as `quantize_checkpoint` has it.
        calibration: its `request` names the text to measure on, and also to calibrate with where the method does.
        learning: how `learned` trains; sensitivities are those of `gptq`, from which it starts.
        plan: the plan's file, by default `OUT.plan.yaml`; a dry run writes none unless it is given.
        plan_work: a folder to keep figures in, for other targets.
        measurements: the most tensors to change, one at a time; what is left is estimated. By default as many as it
            takes to bear out 95 % of the predicted divergence.
        stage: opens the progress of one stage.

    Raises:
        InputError: no target, two, or one that no mix can meet; text too short to measure on; whatever
            `quantize_checkpoint` refuses.
    """
    started = time.monotonic()
    _check_targets(target_bpw, max_kld)
    if measurements is not None and measurements < 1:
        raise InputError(f"--measurements {measurements}: at least 1 is needed")
    options = calibration or CalibrationOptions()
    if options.statistics is not None or options.statistics_out is not None:
        raise InputError("--statistics and --statistics-out do not go with a target, which needs text to measure on")
    # Whatever is wrong with the request is found by a dry run, before anything is measured.
    checked = CalibrationOptions() if method == "rtn" else options
    checkpoint = open_checkpoint(model)
    first = quantize_checkpoint(model, out, method=method, calibration=checked, dry_run=True, threads=threads)
    if not dry_run and os.path.lexists(out) and not (overwrite or is_own_output(out)):
        raise InputError(f"{out}: exists already; choose another name or pass --overwrite")
    if plan is not None or not dry_run:
        check_plan_path(plan or plan_path_of(out), overwrite)
    job = TargetRequest(
        checkpoint,
        out,
        method,
        checked,
        options.request or CalibrationRequest(),
        threads,
        stage,
        plan,
        measurements,
        learning,
    )
    job.check_reachable(target_bpw)
    discard = overwrite and plan_work is None  # what was kept for good is not thrown away in passing
    with open_plan_work(plan_work or plan_work_of(out), job.deciding_options(), discard=discard) as work:
        search = _Search(job, work)
        if plan_work is None and dry_run:
            search.notes.append(f"measurements are kept in {work.path}, for the run without --dry-run")
        chosen = search.for_size(target_bpw) if target_bpw is not None else search.for_divergence(max_kld or 0.0)
        report = search.finish(chosen, first, overwrite=overwrite, dry_run=dry_run)
        if plan_work is None and not dry_run:
            shutil.rmtree(work.path)
    seconds = time.monotonic() - started
    return replace(report, seconds=seconds, target_bpw=target_bpw, max_kld=max_kld)


def _check_targets(target_bpw: float | None, max_kld: float | None) -> None:
    if (target_bpw is None) == (max_kld is None):
        raise InputError("give one target: --target-bpw or --max-kld")
    for option, value in (("--target-bpw", target_bpw), ("--max-kld", max_kld)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise InputError(f"{option} {value}: must be a positive number")


class _Search:
    """Measures and chooses."""

    def __init__(self, job: TargetRequest, work: PlanWork) -> None:
        self.job, self.work, self.budget = job, work, job.budget
        self.notes: list[str] = list(job.text.notes)
        if work.found:
            self.notes.append(f"{work.found} figures that were measured before are taken from {work.path}")
        self._tried: dict[str, Divergence] = {}

    @cached_property
    def candidates(self) -> Candidates:
        """All tensors in all formats."""
        job, threads = self.job, usable_threads(self.job.threads)
        request = job.text.calibration
        windows = job.text.sensitivity if request is None else open_calibration(job.checkpoint, request).windows
        with job.stage("reading inputs", "blocks") as progress:
            statistics = float_statistics(job.checkpoint, windows, self.work.path, job.digest, threads, progress)
        return Candidates(job.checkpoint, statistics, job.method, job.options.method_options, threads)

    @cached_property
    def meter(self) -> Meter:
        """On the windows that decide."""
        text = self.job.text
        longest = max(map(len, (*text.sensitivity, *text.held_out)))
        return Meter(self.job.checkpoint, text.sensitivity, self.job.threads, longest)

    @cached_property
    def judge(self) -> Meter:
        """On held-out windows."""
        return self.meter.beside(self.job.text.held_out)

    @cached_property
    def prober(self) -> Prober:
        """With an empty table over the prior."""
        family, names, prior = self.job.checkpoint.family, self.budget.names, {}
        with self.job.stage("rounding", "tensors") as progress:
            for number, name in enumerate(names):
                progress(number, len(names), name)
                for format in CANDIDATES:
                    prior[name, format.name] = self.candidates.error_share(name, format)
        kinds = {name: re.sub(r"^blk\.\d+\.", "", family.gguf_name(name) or name) for name in names}
        return Prober(self.job.checkpoint, self.candidates, self.meter, self.work, Sensitivities(prior, kinds))

    def for_size(self, target_bpw: float) -> Plan:
        """The best mix within a size."""
        target = self.budget.bytes_at(target_bpw)
        self._probe_all()
        return self._settled(lambda knapsack: knapsack.solve(target - self.budget.bytes_of({})))

    def for_divergence(self, max_kld: float) -> Plan:
        """The smallest mix whose bound on held-out windows meets a divergence."""
        self._probe_all()
        self._settled(lambda knapsack: _first_within(knapsack, max_kld))
        plans = [self._plan(chosen) for chosen in self._knapsack().frontier()]
        tried = smallest_that_meets(plans, max_kld, self._try)
        self._tried[tried.plan.digest] = tried.found
        if tried.found.upper_bound() > max_kld:
            raise InputError(
                f"--max-kld {max_kld:g}: no mix meets it with method {self.job.method}; the best found, at "
                f"{tried.plan.bits_per_weight:.3f} bits per weight, has a KL divergence of {tried.found.kld:.3g} and "
                f"an upper 95 % bound of {tried.found.upper_bound():.3g}; allow that much, or keep the original"
            )
        return tried.plan

    def _probe_all(self) -> None:
        """Every tensor in one format; those of which most is expected first, should measurements be rationed."""
        with self.job.stage("measuring", "tokens") as progress:
            names = self.prober.table.by_weight(self.budget.names, PROBE.name)
            wanted = [(name, PROBE) for name in names]
            self.prober.probe(wanted[: self._rest()], progress)

    def _rest(self) -> int | None:
        """How many measurements may still be made."""
        most = self.job.most_measurements
        return None if most is None else max(0, most - self.prober.table.measured)

    def _settled(self, solve: Callable[[Knapsack], tuple[int, ...]]) -> Plan:
        """Solve, measure what the solution rests on, and again, until there is little left to measure."""
        plan = self._plan(solve(self._knapsack()))
        for _ in range(ROUNDS):
            missing = self.prober.missing(plan.formats)[: self._rest()]
            if not missing:
                break
            with self.job.stage("refining", "tokens") as progress:
                self.prober.probe(missing, progress)
            plan = self._plan(solve(self._knapsack()))
        return plan

    def _knapsack(self) -> Knapsack:
        table = self.prober.table
        return Knapsack(
            [
                [Choice(self.budget.tensor_bytes(name, f), table.figure(name, f.name).kld) for f in CANDIDATES]
                for name in self.budget.names
            ]
        )

    def _plan(self, chosen: tuple[int, ...]) -> Plan:
        formats = {name: CANDIDATES[index] for name, index in zip(self.budget.names, chosen, strict=True)}
        total = self.budget.bytes_of(formats)
        cost = math.fsum(self.prober.table.figure(name, format.name).kld for name, format in formats.items())
        return Plan(formats, total, self.budget.bits_per_weight(total), cost)

    def _try(self, plan: Plan) -> Divergence:
        """Quantize to a plan in the work folder and measure it on held-out windows."""
        key = f"plan {plan.digest}"
        found = self.work.get(key)
        if found is None:
            folder = self.work.path / "candidate"
            rules = self.work.path / "candidate.yaml"
            write_plan(rules, self._text(plan, ()))
            self._quantize(folder, rules, plan, overwrite=True, resume=False)
            found = self._judged(self.judge, folder, plan)
            shutil.rmtree(folder)
            self.work.add(key, found)
        self._tried[plan.digest] = found
        return found

    def _quantize(self, out: Path, rules: Path, plan: Plan, *, overwrite: bool, resume: bool) -> QuantizeReport:
        job = self.job
        with job.stage(f"quantizing to {plan.bits_per_weight:.3f} bits", "weights") as progress:
            return quantize_checkpoint(
                job.checkpoint.path,
                out,
                recipe=str(rules),
                method=job.method,
                calibration=replace(job.quantize_options, resume=resume),
                learning=job.learning,
                overwrite=overwrite,
                threads=job.threads,
                progress=progress,
            )

    def _judged(self, meter: Meter, path: Path, plan: Plan) -> Divergence:
        with self.job.stage("judging", "tokens") as progress:
            return meter.measure(path, lambda done: progress(done, meter.tokens, f"{plan.bits_per_weight:.3f} bits"))

    def finish(self, plan: Plan, first: QuantizeReport, *, overwrite: bool, dry_run: bool) -> PlannedReport:
        """Write the plan and the model, measure it, and report."""
        path = self.job.plan or (None if dry_run else plan_path_of(self.job.out))
        if dry_run:
            report, measured = self._dry(plan, first), self._tried.get(plan.digest)
            joint = None
        else:
            assert path is not None
            write_plan(path, self._text(plan, ()))
            report = self._quantize(self.job.out, path, plan, overwrite=overwrite, resume=self.job.options.resume)
            joint = self._judged(self.meter, self.job.out, plan)
            measured = self._tried.get(plan.digest) or self._judged(self.judge, self.job.out, plan)
        text = self._text(plan, _outcome(measured, joint))
        if path is not None:
            write_plan(path, text)
        own = {field.name: getattr(report, field.name) for field in fields(QuantizeReport)}
        own["notes"] = (*self.notes, *report.notes)
        return PlannedReport(
            **own,
            plan=None if path is None else str(path),
            plan_text=text,
            kld=None if measured is None else measured.kld,
            kld_stderr=None if measured is None else measured.stderr,
            kld_upper=None if measured is None else measured.upper_bound(),
            kld_joint=None if joint is None else joint.kld,
            kld_sum_of_parts=plan.sum_of_parts,
            measurements=self.prober.table.measured,
        )

    def _dry(self, plan: Plan, first: QuantizeReport) -> QuantizeReport:
        """The report of a dry run with the plan's formats and sizes."""
        tensors = tuple(
            replace(t, format=plan.formats[t.name].name) if t.name in plan.formats else t for t in first.tensors
        )
        return replace(first, bytes=plan.bytes, bits_per_weight=plan.bits_per_weight, tensors=tensors, file_bytes=None)

    def _text(self, plan: Plan, outcome: tuple[str, ...]) -> str:
        sizes: Mapping[str, int] = {n: self.budget.tensor_bytes(n, f) for n, f in plan.formats.items()}
        facts = (f"model {self.job.digest}, method {self.job.method}", *outcome)
        return plan_text(plan, self.prober.table, sizes, facts)


def _outcome(held_out: Divergence | None, joint: Divergence | None) -> tuple[str, ...]:
    lines = []
    if held_out is not None:
        bound = held_out.upper_bound()
        lines.append(
            f"KL divergence on held-out windows {held_out.kld:.6f} +- {held_out.stderr:.6f} (bound {bound:.6f})"
        )
    if joint is not None:
        lines.append(f"and {joint.kld:.6f} +- {joint.stderr:.6f} on the windows that the parts were measured on")
    return tuple(lines)


def _first_within(knapsack: Knapsack, cost: float) -> tuple[int, ...]:
    """The smallest choice that is predicted to cost no more; the best there is if none is."""
    chosen: tuple[int, ...] = ()
    for chosen in knapsack.frontier():
        if knapsack.cost_of(chosen) <= cost:
            break
    return chosen
