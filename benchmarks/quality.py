"""What each method of `quantlab quantize` is worth at the same bytes, against its gate and llama.cpp's own files.

    python benchmarks/quality.py MODEL TEXT --calibration FILE [--work DIR] [--seeds 3]
        [--methods rtn,search,gptq,learned] [--learn-steps N] [--tokens N] [--levels 16,8,4]
        [--llama-tools DIR] [--llama-cpp] [--targets [4.75,5.0,5.5]] [--json FILE]

Every file is Q4_1 with embedding and head in Q8_0, a GGUF file, and scored against MODEL over the same windows of TEXT
(held out from training and from FILE) with float activations. A seed draws the calibration windows and, for `learned`,
the order of training; scores of a method are averaged over seeds window by window. `x min-max` is a ratio of mean KL
divergences; its standard error is paired, windows being the sampling units (delta method); `seeds` is the range of
that ratio over seeds. Files and scores stay in the work folder, and an interrupted run goes on from them.

--levels N uses N codes in the same blocks, a stress test with the first seed. --llama-tools names the folder of
llama-imatrix and llama-quantize: their files are made from the text of the same calibration windows. --llama-cpp also
runs every file in llama.cpp (llama-cpp-python), where weights in blocks meet int8 activations; ours does the same
there. --targets measures and mixes formats for the given sizes and for the sizes of the uniform files and of the
preset q4_1-mixed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quality_files import File, Files, Settings
from quality_peer import LlamaTools
from quality_statistics import Scores, averaged, ratio
from quantlab.cli.console import print_table, quiet_transformers

from quantlab.calibration.learned import LearnSettings
from quantlab.calibration.samples import LENGTH
from quantlab.errors import InputError

GATES = {"search": 0.75, "gptq": 0.4, "learned": 0.25}  # x min-max
AIM = 0.15  # of learned
GATE_IMPORTANCE, GATE_ONE_BIT_MORE = 0.35, 1.0  # learned x llama.cpp's Q4_1 and x its Q5_1, both by importance
GATE_LN_PERPLEXITY = 0.003  # nats per token between engines
ALL_LEVELS = 16  # of Q4_1
UNIFORM = ("q4_0", "q4_1", "q5_0")
TARGET_METHODS = ("rtn", "gptq")


@dataclass(frozen=True)
class Group:
    """The files of one method, one a seed, and their mean scores."""

    name: str
    files: Sequence[File]

    @property
    def scores(self) -> Scores:
        """Averaged window by window."""
        return averaged([file.scores for file in self.files])

    def against(self, base: Group) -> tuple[float, float]:
        """The ratio of mean divergences to another group's, and its standard error over windows."""
        return ratio(self.scores.kld, base.scores.kld)

    def each_against(self, base: Group) -> list[float]:
        """The same for every seed alone; a base of one file serves all."""
        bases = base.files if len(base.files) == len(self.files) else [base.files[0]] * len(self.files)
        return [ratio(file.scores.kld, other.scores.kld)[0] for file, other in zip(self.files, bases, strict=True)]


def main() -> None:
    """Parse, make, score, print."""
    quiet_transformers()
    arguments = parsed()
    settings = Settings(
        arguments.model, arguments.text, arguments.calibration,
        None if arguments.tokens is None else max(1, arguments.tokens // LENGTH),
        arguments.context, arguments.learn_steps, arguments.threads,
    )  # fmt: skip
    files = Files(settings, arguments.work or Path("out") / f"quality-{arguments.model.resolve().name}")
    said: dict[str, Any] = {}
    for levels in arguments.levels:
        said[f"levels {levels}"] = methods_table(files, arguments, levels)
    if arguments.llama_cpp:
        said["llama.cpp"] = engines_table(files)
    if arguments.targets:
        said["targets"] = [targets_table(files, method, arguments.targets) for method in TARGET_METHODS]
    if arguments.json:
        arguments.json.write_text(json.dumps(said, indent=1) + "\n")


def parsed() -> argparse.Namespace:
    """The command line."""
    words = (__doc__ or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(description=words)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path, help="held-out text to score")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="default: out/quality-MODEL")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", type=_words, default=["rtn", "search", "gptq", "learned"])
    parser.add_argument("--levels", type=_numbers, default=[ALL_LEVELS], help="16 is Q4_1 itself")
    parser.add_argument("--llama-tools", type=_tools, help="folder of llama-imatrix and llama-quantize")
    parser.add_argument("--llama-cpp", action="store_true", help="run every file in llama.cpp too")
    parser.add_argument("--learn-steps", type=int, default=LearnSettings().steps)
    parser.add_argument("--tokens", type=int, help="of calibration; default: the command's own")
    parser.add_argument("--targets", type=_reals, nargs="?", const=[4.75, 5.0, 5.5], help="bits per weight")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def _tools(text: str) -> LlamaTools:
    return LlamaTools(Path(text))


def _words(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _reals(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def methods_table(files: Files, arguments: argparse.Namespace, levels: int) -> list[dict[str, Any]]:
    """All methods with so many codes a block; with all of them llama.cpp's files too."""
    is_whole = levels == ALL_LEVELS
    seeds = range(arguments.seeds if is_whole else 1)
    fewer = None if is_whole else levels
    paths = {method: [files.ours(method, seed, levels=fewer) for seed in seeds] for method in arguments.methods}
    paths = {"rtn": [files.ours("rtn", levels=fewer)], **{m: p for m, p in paths.items() if m != "rtn"}}
    groups = scored_groups(files, paths)
    base = groups["rtn"]
    check_same_bytes(groups.values())
    if is_whole and arguments.llama_tools:
        groups |= llama_groups(files, arguments)
    title = f"{files.settings.model.name}, Q4_1" + ("" if is_whole else f", {levels} levels")
    rows = [method_row(group, base, is_whole) for group in groups.values()]
    said = print_rows(title, rows)
    print_basis(files, base)
    if is_whole and arguments.llama_tools and "learned" in groups:
        print_llama_gates(groups)
    return said


def check_same_bytes(groups: Any) -> None:
    """Methods are compared at exactly the same bytes."""
    sizes = {file.path.name: file.bytes for group in groups for file in group.files}
    if len(set(sizes.values())) != 1:
        raise SystemExit(f"files differ in their bytes: {sizes}")


def scored_groups(files: Files, paths: Mapping[str, Sequence[Path]]) -> dict[str, Group]:
    """Score what was not scored yet in one pass."""
    scored = iter(files.scored([path for some in paths.values() for path in some]))
    return {name: Group(name, [next(scored) for _ in some]) for name, some in paths.items()}


def llama_groups(files: Files, arguments: argparse.Namespace) -> dict[str, Group]:
    """llama.cpp's own files of the same original."""
    tools, seeds = arguments.llama_tools, range(arguments.seeds)
    wanted = {"llama.cpp Q4_1": ("q4_1", [None]), "llama.cpp Q4_1, imatrix": ("q4_1", seeds),
              "llama.cpp Q5_1, imatrix": ("q5_1", seeds)}  # fmt: skip
    paths = {name: [files.theirs(tools, format, seed) for seed in over] for name, (format, over) in wanted.items()}
    return scored_groups(files, paths)


def method_row(group: Group, base: Group, is_whole: bool) -> dict[str, Any]:
    """The figures of one method."""
    scores, (share, share_error) = group.scores, group.against(base)
    mean, error = scores.mean_kld
    gate = GATES.get(group.name) if is_whole else None
    return {
        "file": group.name, "bytes": group.files[0].bytes, "bits per weight": group.files[0].bits_per_weight,
        "kld": mean, "kld_stderr": error, "ratio": share, "ratio_stderr": share_error,
        "ratios of seeds": group.each_against(base), "perplexity": scores.perplexity,
        "same_top": scores.same_top_share, "gate": gate, "verdict": verdict(share, share_error, gate),
    }  # fmt: skip


def verdict(value: float, error: float, gate: float | None) -> str:
    """Whether a gate holds, and whether that is beyond two standard errors."""
    if gate is None:
        return ""
    sure = "" if abs(value - gate) > 2 * error else ", within 2 errors"
    return f"<= {gate:g} {'holds' if value <= gate else 'MISSED'}{sure}"


def print_rows(title: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One table; the rows as they are."""
    columns = (title, "bytes", "KL divergence", "x min-max", "seeds", "perplexity", "same top", "gate")
    told = []
    for row in rows:
        seeds = row["ratios of seeds"]
        spread = f"{min(seeds):.4f} to {max(seeds):.4f}" if len(seeds) > 1 else ""
        share = "1" if row["file"] == "rtn" else f"{row['ratio']:.4f} +- {row['ratio_stderr']:.4f}"
        told.append((
            row["file"], f"{row['bytes']:,}", f"{row['kld']:.6f} +- {row['kld_stderr']:.6f}", share, spread,
            f"{row['perplexity']:.3f}", f"{100 * row['same_top']:.2f} %", row["verdict"],
        ))  # fmt: skip
    print_table(columns, told)
    return rows


def print_basis(files: Files, base: Group) -> None:
    """What the table rests on."""
    scores, chosen = base.scores, files.settings
    nll = float(scores.nll_original.sum() / scores.tokens.sum())
    samples = files.samples(0)
    print(
        f"{chosen.text.name}: {int(scores.tokens.sum()):,} tokens in {len(scores.tokens)} windows of {chosen.context}; "
        f"the original: {nll:.4f} nats per token, perplexity {math.exp(nll):.3f};\n"
        f"calibration {chosen.calibration.name}, {samples.tokens:,} tokens a seed; learned {chosen.learn_steps} steps; "
        f"{platform.machine()}, {chosen.threads} threads\n"
    )


def print_llama_gates(groups: dict[str, Group]) -> None:
    """Ours against llama.cpp's files, seed by seed the same calibration text."""
    gates = {"llama.cpp Q4_1, imatrix": GATE_IMPORTANCE, "llama.cpp Q5_1, imatrix": GATE_ONE_BIT_MORE}
    rows = []
    for name, gate in gates.items():
        for method in (m for m in GATES if m in groups):
            share, error = groups[method].against(groups[name])
            told = verdict(share, error, gate) if method == "learned" else ""
            rows.append((f"{method} x {name}", f"{share:.4f} +- {error:.4f}", told))
    print_table(("KL divergence against llama.cpp's", "ratio", "gate"), rows)
    plain = groups["llama.cpp Q4_1"].scores.kld - groups["rtn"].scores.kld
    print(f"largest difference of a window's divergence, llama.cpp's Q4_1 less rtn: {abs(plain).max():.2g} nats\n")


def engines_table(files: Files) -> list[dict[str, Any]]:
    """Each file of ours in both engines."""
    rows, said = [], []
    for path, file in zip(files.made(), files.scored(files.made()), strict=True):
        scores = file.scores
        floats = float(scores.nll.sum() / scores.tokens.sum())
        ours, theirs = files.nll_by_int8(path)
        gate = f"<= {GATE_LN_PERPLEXITY} {'holds' if abs(ours - theirs) <= GATE_LN_PERPLEXITY else 'MISSED'}"
        perplexities = (f"{math.exp(nll):.4f}" for nll in (floats, ours, theirs))
        rows.append((path.name, *perplexities, f"{floats - theirs:+.5f}", f"{ours - theirs:+.5f}", gate))
        said.append({"file": path.name, "nll_float": floats, "nll_int8": ours, "nll_llama_cpp": theirs})
    columns = ("perplexity", "ours, float", "ours, int8", "llama.cpp", "ln float/theirs", "ln int8/theirs", "gate")
    print_table(columns, rows)
    if said:
        differences = [abs(row["nll_int8"] - row["nll_llama_cpp"]) for row in said]
        print(f"{len(said)} files: largest difference {max(differences):.5f} nats per token, "
              f"median {statistics.median(differences):.5f}\n")  # fmt: skip
    return said


def targets_table(files: Files, method: str, targets: Sequence[float]) -> list[dict[str, Any]]:
    """Measured mixes against files of one format and the preset: at these files' bytes, and at the sizes asked for
    against the smallest of these files that is no smaller.
    """
    paths = [files.ours(method, recipe=name, uniform=True) for name in UNIFORM]
    bases = files.scored([*paths, files.ours(method, recipe="q4_1-mixed")])
    bases.sort(key=lambda file: file.bytes)
    sizes = sorted({*targets, *(base.bits_per_weight for base in bases[1:])})
    mixes = files.scored([path for size in sizes if (path := reachable_mix(files, method, size))])
    rows, said = [], []
    for base in bases:
        rows.append((base.path.stem, f"{base.bits_per_weight:.4f}", *_kld(base), "", ""))
    for mix in mixes:
        rival = next((base for base in bases if base.bytes >= mix.bytes), bases[-1])
        share, error = ratio(mix.scores.kld, rival.scores.kld)
        told = verdict(share, error, 1.0)
        rows.append((mix.path.stem, f"{mix.bits_per_weight:.4f}", *_kld(mix),
                     f"{share:.4f} +- {error:.4f} x {rival.path.stem}", told))  # fmt: skip
        said.append({"file": mix.path.name, "bits per weight": mix.bits_per_weight, "kld": mix.scores.mean_kld[0],
                     "rival": rival.path.name, "ratio": share, "ratio_stderr": error})  # fmt: skip
    print_table((f"targets, {method}", "bits per weight", "KL divergence", "ratio", "gate"), rows)
    print()
    return said


def reachable_mix(files: Files, method: str, size: float) -> Path | None:
    """The mix of so many bits per weight; None, and a line that says so, below what the model's parts allow."""
    try:
        return files.mixed(method, size)
    except InputError as error:
        print(f"no mix of {size:g} bits per weight: {error}")
        return None


def _kld(file: File) -> tuple[str]:
    mean, error = file.scores.mean_kld
    return (f"{mean:.6f} +- {error:.6f}",)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
