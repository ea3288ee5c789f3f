"""llama.cpp's side of quality.py: its quantizers, by its programs, and its scores, by llama-cpp-python."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantlab.calibration.samples import CalibrationSamples
from quantlab.checkpoint import Tokenizer
from quantlab.divergence import negative_log_likelihood
from quantlab.evaluation.windows import Window

VOCABULARY = ("--token-embedding-type", "q8_0", "--output-tensor-type", "q8_0")  # as our recipes have them


@dataclass(frozen=True)
class LlamaTools:
    """llama-quantize and llama-imatrix of one build."""

    folder: Path

    def __post_init__(self) -> None:
        for name in ("llama-quantize", "llama-imatrix"):
            if not (self.folder / name).is_file():
                raise SystemExit(f"{self.folder}: holds no {name}")

    def importance(
        self, model: Path, samples: CalibrationSamples, tokenizer: Tokenizer, out: Path, threads: int
    ) -> Path:
        """The importance matrix of a float GGUF file over the text of our calibration windows, one after the other, in
        chunks of the windows' length, as many as there are windows (one less where the last chunk is not full).
        """
        if not out.exists():
            text = out.with_suffix(".txt")
            lead = 0 if tokenizer.bos is None else 1
            text.write_text("".join(tokenizer.decode(list(window[lead:])) for window in samples.windows))
            count, length = str(len(samples.windows)), str(samples.length)
            self._run("llama-imatrix", "-m", model, "-f", text, "-o", f"{out}.part", "--chunks", count, "-c", length,
                      "-b", length, "-ub", length, "-t", threads, "--no-ppl", "-fit", "off")  # fmt: skip
            Path(f"{out}.part").rename(out)
        return out

    def quantize(self, model: Path, out: Path, format: str, importance: Path | None, threads: int) -> Path:
        """A file of one type, embedding and head in Q8_0."""
        if not out.exists():
            chosen = [] if importance is None else ["--imatrix", importance]
            part = out.with_name(f"part-{out.name}")
            self._run("llama-quantize", "--pure", *chosen, *VOCABULARY, model, part, format, threads)
            part.rename(out)
        return out

    def _run(self, program: str, *arguments: object) -> None:
        done = subprocess.run([self.folder / program, *map(str, arguments)], capture_output=True, check=False)
        if done.returncode:
            last = done.stderr.decode(errors="replace").strip().splitlines()[-3:]
            raise SystemExit(f"{program}: status {done.returncode}: {' / '.join(last)}")


def llama_nll(path: Path, windows: Sequence[Window], context: int, threads: int) -> float:
    """Mean negative log-likelihood in nats per token of the windows' targets as llama.cpp computes them: activations
    rounded to int8 where weights are packed, its usual f16 cache.
    """
    import llama_cpp

    model = llama_cpp.Llama(
        model_path=str(path), n_ctx=context, n_batch=context, n_ubatch=context, logits_all=True, n_threads=threads,
        n_threads_batch=threads, verbose=False,
    )  # fmt: skip
    total = 0.0
    for window in windows:
        ids, end = list(window.ids), len(window.ids) - 1
        model.reset()
        model.eval(ids[:end])
        logits = np.array(model.scores[end - window.scored : end])
        total += float(negative_log_likelihood(logits, np.asarray(window.targets)).sum())
    return total / sum(window.scored for window in windows)
