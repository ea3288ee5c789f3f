"""Where the time and memory of a calibrated quantization go.

    python benchmarks/calibration_speed.py MODEL [--method gptq] [--samples 128] [--length 512] [--calibration TEXT]
        [--refit-rounds 1] [--descent-sweeps 0] [--activations int8] [--threads 2] [--work FOLDER] [--json]

Quantizes MODEL to Q4_1 in WORK, throws the result away, and prints the seconds of each stage, the time the process had
a core, and its largest resident memory. Stages do not overlap; `forward` holds the tiles' sums of `search`, which
are taken on the way, `other` what comes before the first block: imports, text, tokens, embedding.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantlab.cli.console import print_table

STAGES = ("other", "read", "forward", "statistics", "fit", "write")


class Stopwatch:
    """Seconds of the main thread by stage; a stage within another counts alone."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._running = ["other"]
        self._since = time.monotonic()

    def change(self, stages: list[str]) -> None:
        """Go on with the last of `stages`."""
        now = time.monotonic()
        self.seconds[self._running[-1]] += now - self._since
        self._running, self._since = stages, now

    def watch(self, owner: type, name: str, stage: str) -> None:
        """Count what a method takes as a stage."""
        original: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(original)
        def watched(*arguments: Any, **keywords: Any) -> Any:
            before = self._running
            self.change([*before, stage])
            try:
                return original(*arguments, **keywords)
            finally:
                self.change(before)

        setattr(owner, name, watched)


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--method", default="gptq", choices=("search", "gptq"))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--calibration", type=Path, help="text; the bundled one has 32,000 tokens")
    parser.add_argument("--refit-rounds", type=int, default=1)
    parser.add_argument("--descent-sweeps", type=int, default=0)
    parser.add_argument("--activations", default="int8", choices=("int8", "float"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--work", type=Path, help="where the result goes for a moment")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    stopwatch = Stopwatch()
    folder = Path(tempfile.mkdtemp(dir=arguments.work))
    try:
        found = run(arguments, folder / "out", stopwatch)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(found)) if arguments.json else print_found(found)


def run(arguments: argparse.Namespace, out: Path, stopwatch: Stopwatch) -> dict[str, Any]:
    """Quantize, and say what it took."""
    from quantlab.calibration.calibrated import CalibrationOptions
    from quantlab.calibration.quantize import quantize_checkpoint
    from quantlab.calibration.samples import CalibrationRequest

    watch_stages(stopwatch)
    fitting = {"refit_rounds": arguments.refit_rounds, "descent_sweeps": arguments.descent_sweeps}
    options = CalibrationOptions(
        request=CalibrationRequest(arguments.calibration, arguments.samples, arguments.length),
        activations=arguments.activations,
        method_options=fitting if arguments.method == "gptq" else {},
    )
    started = time.monotonic()
    report = quantize_checkpoint(
        arguments.model, out, method=arguments.method, calibration=options, threads=arguments.threads
    )
    stopwatch.change(["write"])
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "model": str(arguments.model),
        "method": arguments.method,
        "parameters": report.parameters,
        "bits_per_weight": report.bits_per_weight,
        "seconds": time.monotonic() - started,
        "stages": stopwatch.seconds,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_memory_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "machine": f"{processor()}, {len(os.sched_getaffinity(0))} cores",
        "notes": list(report.notes),
    }


def watch_stages(stopwatch: Stopwatch) -> None:
    """What belongs to which stage."""
    from quantlab.calibration.activations import ActivationFile
    from quantlab.calibration.block_pass import BlockPass
    from quantlab.calibration.blockwise import CalibratedMethod
    from quantlab.calibration.collection import MomentSum
    from quantlab.calibration.streamed_model import StreamedModel
    from quantlab.calibration.work_folder import WorkFolder
    from quantlab.checkpoint.folder_writer import FolderWriter

    for owner, stage, names in (
        (StreamedModel, "read", ("load_block",)),
        (BlockPass, "forward", ("statistics", "finish")),
        (MomentSum, "statistics", ("add", "symmetric")),
        (CalibratedMethod, "fit", ("quantize",)),
        (ActivationFile, "write", ("sync",)),
        (WorkFolder, "write", ("save",)),
        (FolderWriter, "write", ("write_packed", "copy")),
    ):
        for name in names:
            stopwatch.watch(owner, name, stage)


def processor() -> str:
    """The processor's name, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def print_found(found: dict[str, Any]) -> None:
    """A table of stages and a line on the whole."""
    total = sum(found["stages"].values())
    rows = [(stage, f"{seconds:.1f}", f"{seconds / total:.0%}") for stage, seconds in found["stages"].items()]
    print_table(("stage", "seconds", ""), rows)
    print(
        f"\n{found['method']}, {found['parameters'] / 1e6:.0f} M parameters, {found['bits_per_weight']:.3f} bits per "
        f"weight: {found['seconds']:.1f} s ({found['processor_seconds']:.0f} s of processor time), peak memory "
        f"{found['peak_memory_bytes'] / 1e9:.2f} GB"
    )
    print(found["machine"])
    for note in found["notes"]:
        print(f"note: {note}")


if __name__ == "__main__":
    main()
