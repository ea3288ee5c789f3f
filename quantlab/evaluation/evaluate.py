"""Accuracy of a model on a task: exact answers by greedy generation, choices by their likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantlab.adapters.combine import Source as AdapterSource
from quantlab.checkpoint import Tokenizer, load_tokenizer
from quantlab.divergence import negative_log_likelihood
from quantlab.errors import InputError
from quantlab.evaluation.scorers import Scorer, open_scorer
from quantlab.evaluation.tasks import Question, is_right, read_task
from quantlab.evaluation.windows import Window
from quantlab.generation.generator import complete
from quantlab.generation.sampling import SamplingParams

Progress = Callable[[int, int, str], None]  # (questions done, questions in all, the figure so far)
GREEDY = SamplingParams(temperature=0)
MAX_TOKENS = 256  # of an exact answer with its reasoning
LINE_TOKENS = 32  # of an exact answer of one line
PLAIN = "plain"


@dataclass(frozen=True)
class Accuracy:
    """A share of right answers among `n`, its standard error, and its 95 % interval (Wilson's, which holds near 0 and 1
    too).
    """

    accuracy: float
    stderr: float
    interval: tuple[float, float]
    n: int


@dataclass(frozen=True)
class EvaluateResult:
    """`accuracy` counts exact answers, and choices by the likelihood of their text; `accuracy_normalized` takes the
    likelihood per byte of text instead (None without choices). `exact` and `choices` are the accuracies of either kind
    of question (None where there are none).
    """

    accuracy: float
    stderr: float
    interval: tuple[float, float]
    n: int
    accuracy_normalized: float | None
    exact: Accuracy | None
    choices: Accuracy | None
    choices_normalized: Accuracy | None
    per_template: dict[str, Accuracy]
    engine: str
    activations: str


@dataclass(frozen=True)
class Outcome:
    """Whether a question was answered rightly, and by the likelihood per byte."""

    right: bool
    right_normalized: bool


def evaluate(
    model: str | Path,
    task: Path,
    *,
    limit: int | None = None,
    seed: int | None = None,
    max_tokens: int = MAX_TOKENS,
    engine: str = "auto",
    activations: str = "f32",
    threads: int | None = None,
    adapters: Sequence[AdapterSource] | None = None,
    progress: Progress | None = None,
) -> EvaluateResult:
    """Ask a model the questions of a task file, greedily and by plain prompts.

    Args:
        model: folder, GGUF file or hub id.
        task: JSON lines; see `tasks.read_task`.
        limit: ask only so many questions: the first ones, or with `seed` some drawn at random.
        seed: see `limit`.
        max_tokens: of a reasoned answer; one of a line has 32 at most.
        engine: "auto", "native" or "torch".
        activations: "f32" or "int8" (native engine).
        threads: by default one a core.
        adapters: low-rank updates to compute beside the weights; see `load_engine`.
        progress: called with questions done, questions in all, and the accuracy so far.

    Raises:
        InputError: the model, an adapter or the task cannot be read, rows are wrong, or a question does not fit the
            context.
    """
    if max_tokens < 1:
        raise InputError(f"max tokens {max_tokens}: at least 1 is needed")
    questions = read_task(task, limit, seed)
    tokenizer = load_tokenizer(model)
    needed = [_needed(question, tokenizer, max_tokens) for question in questions]
    longest = max(most for _, most in needed)
    scorer = open_scorer(model, engine, None, threads, activations=activations, longest=longest, adapters=adapters)
    too_long = [q.line for q, (least, _) in zip(questions, needed, strict=True) if least > scorer.engine.context]
    if too_long:
        lines = ", ".join(map(str, too_long[:10])) + (" ..." if len(too_long) > 10 else "")
        raise InputError(
            f"{task}: questions longer than the context of {scorer.engine.context} tokens on lines {lines}"
        )
    outcomes: list[Outcome] = []
    for question in questions:
        outcomes.append(_ask(question, scorer, tokenizer, max_tokens))
        if progress is not None:
            share = sum(outcome.right for outcome in outcomes) / len(outcomes)
            progress(len(outcomes), len(questions), f"accuracy {100 * share:.1f} %")
    return _summary(questions, outcomes, scorer.name, activations)


def _needed(question: Question, tokenizer: Tokenizer, max_tokens: int) -> tuple[int, int]:
    """Tokens of context without which a question cannot be asked, and with which nothing is cut."""
    if question.choices:
        longest = max(len(_continued(question.prompt, choice, tokenizer)[0]) for choice in question.choices)
        return longest, longest
    prompt = len(tokenizer.encode(question.prompt))
    return prompt + 1, prompt + _answer_tokens(question, max_tokens)


def _answer_tokens(question: Question, max_tokens: int) -> int:
    return max_tokens if question.reasoned else min(max_tokens, LINE_TOKENS)


def _ask(question: Question, scorer: Scorer, tokenizer: Tokenizer, max_tokens: int) -> Outcome:
    if not question.choices:
        limit = _answer_tokens(question, max_tokens)
        completion = complete(
            scorer.engine, tokenizer, question.prompt, max_tokens=limit, params=GREEDY, stop=question.stops
        )
        right = is_right(question, completion.text)
        return Outcome(right, right)
    likelihoods = np.array([choice_likelihood(question.prompt, c, scorer, tokenizer) for c in question.choices])
    per_byte = likelihoods / [len(choice.encode()) for choice in question.choices]
    return Outcome(int(likelihoods.argmax()) == question.answer, int(per_byte.argmax()) == question.answer)


def choice_likelihood(prompt: str, choice: str, scorer: Scorer, tokenizer: Tokenizer) -> float:
    """ln p(choice | prompt), a space between them unless the prompt ends in one."""
    ids, start = _continued(prompt, choice, tokenizer)
    return -float(np.sum(token_losses(ids, start, scorer)[0]))


def token_losses(ids: Sequence[int], start: int, scorer: Scorer) -> tuple[np.ndarray, np.ndarray]:
    """-ln p, fp64, of the tokens from `start` (at least 1) on, and whether each was the most likely one, bool."""
    window = Window(tuple(ids), len(ids) - start, 0, start)
    losses: list[np.ndarray] = []
    greedy: list[np.ndarray] = []
    done = 0
    for logits in scorer.parts(window):
        targets = np.asarray(window.targets[done : done + len(logits)])
        done += len(targets)
        losses.append(negative_log_likelihood(logits, targets))
        greedy.append(logits.argmax(axis=1) == targets)
    return np.concatenate(losses), np.concatenate(greedy)


def _continued(prompt: str, choice: str, tokenizer: Tokenizer) -> tuple[list[int], int]:
    text = prompt + choice.lstrip() if prompt[-1].isspace() else f"{prompt} {choice.lstrip()}"
    return continuation(prompt, text, tokenizer)


def continuation(context: str, text: str, tokenizer: Tokenizer) -> tuple[list[int], int]:
    """The tokens of `text`, which begins with `context`, and the first of them that is not the context's alone.

    Where the last characters of the context join with what follows in one token, that token counts as what follows.
    """
    ids, before = tokenizer.encode(text), tokenizer.encode(context) if context else tokenizer.encode("")
    start = 0
    while start < min(len(before), len(ids)) and before[start] == ids[start]:
        start += 1
    return ids, max(1, min(start, len(ids) - 1))


def _summary(
    questions: Sequence[Question], outcomes: Sequence[Outcome], engine: str, activations: str
) -> EvaluateResult:
    exact = [o.right for q, o in zip(questions, outcomes, strict=True) if not q.choices]
    chosen = [o for q, o in zip(questions, outcomes, strict=True) if q.choices]
    whole = accuracy_of([o.right for o in outcomes])
    return EvaluateResult(
        accuracy=whole.accuracy,
        stderr=whole.stderr,
        interval=whole.interval,
        n=whole.n,
        accuracy_normalized=accuracy_of([o.right_normalized for o in outcomes]).accuracy if chosen else None,
        exact=accuracy_of(exact) if exact else None,
        choices=accuracy_of([o.right for o in chosen]) if chosen else None,
        choices_normalized=accuracy_of([o.right_normalized for o in chosen]) if chosen else None,
        per_template={PLAIN: whole},
        engine=engine,
        activations=activations,
    )


def accuracy_of(right: Sequence[bool]) -> Accuracy:
    """Share, standard error and Wilson's interval (Wilson 1927, JASA 22:209) of at least one answer."""
    n, share = len(right), sum(right) / len(right)
    z = 1.959963984540054  # of the normal distribution, for 95 %
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    interval = (max(0.0, centre - half), min(1.0, centre + half))
    return Accuracy(share, math.sqrt(share * (1 - share) / n), interval, n)
