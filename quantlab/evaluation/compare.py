"""How far a model's predictions are from another's: both run in lockstep over a text, no logits are stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantlab.adapters.combine import Source as AdapterSource
from quantlab.checkpoint import Tokenizer, load_tokenizer
from quantlab.checkpoint.same_vocabulary import check_same_vocabulary
from quantlab.divergence import TokenDivergence, compare_logits, mean_and_stderr, perplexity_of
from quantlab.errors import InputError
from quantlab.evaluation.overlap import warn_of_overlap
from quantlab.evaluation.perplexity import check_finite
from quantlab.evaluation.same_tokenizer import check_same_windows
from quantlab.evaluation.scorers import Scorer, default_cache, open_scorer
from quantlab.evaluation.windows import Window, windows_of
from quantlab.evaluation.worst_tokens import WorstToken, worst_tokens

Progress = Callable[[int, int, str], None]  # (tokens done, tokens in all, the figure so far)
WORST = 10


@dataclass(frozen=True)
class DocumentResult:
    """The figures of one document, counted from 0; `begins` shows its first characters."""

    document: int
    begins: str
    tokens: int
    perplexity_a: float
    perplexity_b: float
    kld_mean: float
    kld_stderr: float
    same_top: float


@dataclass(frozen=True)
class CompareResult:
    """A is the reference. Divergences are KL(A || B) in nats per token, `kld_p999` the 99.9th percentile; `same_top` is
    the share of tokens where both rank the same token first; `ln_ratio` is ln(perplexity B / perplexity A), with the
    standard error of paired differences; `rms_dp` is the root mean square of p_B - p_A of the true token, `mean_dp` its
    mean. Every standard error takes windows as sampling units.
    """

    perplexity_a: float
    perplexity_b: float
    perplexity_a_stderr: float
    perplexity_b_stderr: float
    nll_a: float
    nll_b: float
    ln_ratio: float
    ln_ratio_stderr: float
    perplexity_ratio: float
    perplexity_ratio_stderr: float
    kld_mean: float
    kld_stderr: float
    kld_median: float
    kld_p90: float
    kld_p95: float
    kld_p99: float
    kld_p999: float
    kld_max: float
    same_top: float
    same_top_stderr: float
    rms_dp: float
    rms_dp_stderr: float
    mean_dp: float
    mean_dp_stderr: float
    tokens: int
    windows: int
    context: int
    engine: str
    engine_a: str
    engine_b: str
    activations_a: str
    activations_b: str
    kv_a: str
    kv_b: str
    documents: tuple[DocumentResult, ...]
    worst: tuple[WorstToken, ...]


@dataclass(frozen=True)
class Measurement:
    """Windows and their tokens' figures, and the result that sums them up."""

    windows: Sequence[Window]
    values: Sequence[TokenDivergence]
    result: CompareResult

    @property
    def divergences(self) -> np.ndarray:
        """KL(A || B) of every token, fp64 [tokens]."""
        return np.concatenate([value.kld for value in self.values])


def compare(
    a: str | Path,
    b: str | Path,
    text: str | Path,
    *,
    context: int = 512,
    stride: int | None = None,
    windows: str = "documents",
    engine: str = "auto",
    activations: str = "f32",
    activations_a: str | None = None,
    activations_b: str | None = None,
    kv_a: str | None = None,
    kv_b: str | None = None,
    adapters_a: Sequence[AdapterSource] | None = None,
    adapters_b: Sequence[AdapterSource] | None = None,
    worst: int = WORST,
    threads: int | None = None,
    progress: Progress | None = None,
) -> CompareResult:
    """Score `text` with both models at once; see `measure`, whose result this is."""
    return measure(
        a,
        b,
        Path(text),
        context=context,
        stride=stride,
        windows=windows,
        engine=engine,
        activations=activations,
        activations_a=activations_a,
        activations_b=activations_b,
        kv_a=kv_a,
        kv_b=kv_b,
        adapters_a=adapters_a,
        adapters_b=adapters_b,
        worst=worst,
        threads=threads,
        progress=progress,
    ).result


def measure(
    a: str | Path,
    b: str | Path,
    text: Path,
    *,
    context: int = 512,
    stride: int | None = None,
    windows: str = "documents",
    engine: str = "auto",
    activations: str = "f32",
    activations_a: str | None = None,
    activations_b: str | None = None,
    kv_a: str | None = None,
    kv_b: str | None = None,
    adapters_a: Sequence[AdapterSource] | None = None,
    adapters_b: Sequence[AdapterSource] | None = None,
    worst: int = WORST,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Measurement:
    """Score `text` with both models at once and keep each token's figures.

    Args:
        a: the reference: folder, GGUF file or hub id.
        b: the model to compare with it, which may be the same with another cache, other activations or adapters.
        text: UTF-8 text file; lines `<|endoftext|>` part documents.
        context: tokens of a window.
        stride: move windows on by this many tokens, so that more text precedes a token.
        windows: "documents", or "llama" as llama.cpp cuts texts.
        engine: "auto", "native" or "torch", for both.
        activations: "f32" or "int8", for both.
        activations_a: of A alone; `activations_b` of B.
        activations_b: see `activations_a`.
        kv_a: element type of A's cache, "f32", "f16" or "q8_0"; by default "f32" with float activations, else "f16".
        kv_b: of B's.
        adapters_a: low-rank updates to compute beside A's weights; see `load_engine`.
        adapters_b: beside B's.
        worst: how many of the tokens with the largest divergence to report.
        threads: to compute with; by default one a core.
        progress: called with tokens done, tokens in all, and the figure so far.

    Raises:
        InputError: a model, an adapter or the text cannot be read, the tokenizers or the sizes of the vocabularies
            differ, the context is longer than a model's, an option is wrong, or logits are not finite.
    """
    if worst < 0:
        raise InputError(f"worst {worst}: must be 0 or more")
    tokenizer, cut = _common_windows(a, b, text, context, stride, windows)
    for model in dict.fromkeys((str(a), str(b))):
        warn_of_overlap(model, cut)
    types_a, types_b = activations_a or activations, activations_b or activations
    scorer_a = open_scorer(a, engine, context, threads, activations=types_a, kv=kv_a, adapters=adapters_a)
    scorer_b = open_scorer(b, engine, context, threads, activations=types_b, kv=kv_b, adapters=adapters_b)
    if scorer_a.vocabulary != scorer_b.vocabulary:
        sizes = f"{scorer_a.vocabulary} and {scorer_b.vocabulary}"
        raise InputError(f"{a} and {b} have vocabularies of different sizes ({sizes} tokens)")
    values = _lockstep(scorer_a, scorer_b, cut, (str(a), str(b)), progress)
    main = _main_figures(values)
    names = scorer_a.name, scorer_b.name
    result = CompareResult(
        **main,
        tokens=sum(window.scored for window in cut),
        windows=len(cut),
        context=context,
        engine=names[0] if names[0] == names[1] else f"{names[0]} and {names[1]}",
        engine_a=names[0],
        engine_b=names[1],
        activations_a=types_a,
        activations_b=types_b,
        kv_a=kv_a or default_cache(types_a),
        kv_b=kv_b or default_cache(types_b),
        documents=tuple(_documents(cut, values, tokenizer)),
        worst=tuple(worst_tokens(cut, values, tokenizer, worst)),
    )
    return Measurement(cut, values, result)


def _common_windows(
    a: str | Path, b: str | Path, text: Path, context: int, stride: int | None, kind: str
) -> tuple[Tokenizer, list[Window]]:
    tokenizer, other = load_tokenizer(a), load_tokenizer(b)
    names = str(a), str(b)
    check_same_vocabulary(tokenizer, other, names)
    windows = windows_of(text, tokenizer, context, stride, kind)
    check_same_windows(windows, windows_of(text, other, context, stride, kind), tokenizer, names)
    return tokenizer, windows


def _lockstep(
    a: Scorer, b: Scorer, windows: Sequence[Window], names: tuple[str, str], progress: Progress | None
) -> list[TokenDivergence]:
    values, done, summed, total = [], 0, 0.0, sum(window.scored for window in windows)
    for window in windows:
        parts, start = [], 0
        for logits_a, logits_b in zip(a.parts(window), b.parts(window), strict=True):
            targets = np.asarray(window.targets[start : start + len(logits_a)])
            parts.append(compare_logits(logits_a, logits_b, targets))
            start += len(targets)
        value = _joined(parts)
        for figures, name in ((value.nll_a, names[0]), (value.nll_b, names[1]), (value.kld, names[1])):
            check_finite(figures, window, name)
        values.append(value)
        done, summed = done + window.scored, summed + float(value.kld.sum())
        if progress is not None:
            progress(done, total, f"KL divergence {summed / done:.5f}")
    return values


def _joined(parts: Sequence[TokenDivergence]) -> TokenDivergence:
    if len(parts) == 1:
        return parts[0]
    fields = ("nll_a", "nll_b", "kld", "top_a", "top_b")
    return TokenDivergence(*(np.concatenate([getattr(part, field) for part in parts]) for field in fields))


def _main_figures(values: Sequence[TokenDivergence]) -> dict[str, float]:
    """The figures over all tokens, by their names in `CompareResult`."""
    nll_a, stderr_a = mean_and_stderr([value.nll_a for value in values])
    nll_b, stderr_b = mean_and_stderr([value.nll_b for value in values])
    ln_ratio, ln_ratio_stderr = mean_and_stderr([value.nll_b - value.nll_a for value in values])
    kld_mean, kld_stderr = mean_and_stderr([value.kld for value in values])
    top, top_stderr = mean_and_stderr([_agreement(value) for value in values])
    differences = [np.exp(-value.nll_b) - np.exp(-value.nll_a) for value in values]
    mean_dp, mean_dp_stderr = mean_and_stderr(differences)
    square, square_stderr = mean_and_stderr([difference**2 for difference in differences])
    rms = square**0.5
    tokens = np.concatenate([value.kld for value in values])
    median, p90, p95, p99, p999 = (float(x) for x in np.percentile(tokens, (50, 90, 95, 99, 99.9)))
    ratio = perplexity_of(ln_ratio)
    return {
        "perplexity_a": perplexity_of(nll_a),
        "perplexity_b": perplexity_of(nll_b),
        "perplexity_a_stderr": perplexity_of(nll_a) * stderr_a,
        "perplexity_b_stderr": perplexity_of(nll_b) * stderr_b,
        "nll_a": nll_a,
        "nll_b": nll_b,
        "ln_ratio": ln_ratio,
        "ln_ratio_stderr": ln_ratio_stderr,
        "perplexity_ratio": ratio,
        "perplexity_ratio_stderr": ratio * ln_ratio_stderr,
        "kld_mean": kld_mean,
        "kld_stderr": kld_stderr,
        "kld_median": median,
        "kld_p90": p90,
        "kld_p95": p95,
        "kld_p99": p99,
        "kld_p999": p999,
        "kld_max": float(tokens.max()),
        "same_top": top,
        "same_top_stderr": top_stderr,
        "rms_dp": rms,
        "rms_dp_stderr": square_stderr / (2 * rms) if rms else 0.0,  # to first order
        "mean_dp": mean_dp,
        "mean_dp_stderr": mean_dp_stderr,
    }


def _agreement(value: TokenDivergence) -> np.ndarray:
    return (value.top_a == value.top_b).astype(np.float64)


def _documents(
    windows: Sequence[Window], values: Sequence[TokenDivergence], tokenizer: Tokenizer
) -> list[DocumentResult]:
    grouped: dict[int, list[int]] = {}
    for index, window in enumerate(windows):
        grouped.setdefault(window.document, []).append(index)
    results = []
    for document, members in sorted(grouped.items()):
        chosen = [values[index] for index in members]
        kld_mean, kld_stderr = mean_and_stderr([value.kld for value in chosen])
        results.append(
            DocumentResult(
                document=document,
                begins=_beginning(windows[members[0]], tokenizer),
                tokens=sum(windows[index].scored for index in members),
                perplexity_a=perplexity_of(mean_and_stderr([value.nll_a for value in chosen])[0]),
                perplexity_b=perplexity_of(mean_and_stderr([value.nll_b for value in chosen])[0]),
                kld_mean=kld_mean,
                kld_stderr=kld_stderr,
                same_top=mean_and_stderr([_agreement(value) for value in chosen])[0],
            )
        )
    return results


def _beginning(window: Window, tokenizer: Tokenizer) -> str:
    return " ".join(tokenizer.decode(window.ids[:40]).split())[:40]
