"""How good a model is, as a search sees it: a weighted sum of likelihoods, accuracies and functions, the higher the
better.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quantlab.documents import read_bytes, read_documents
from quantlab.errors import InputError, one_line
from quantlab.evaluation.evaluate import MAX_TOKENS, evaluate
from quantlab.evaluation.perplexity import perplexity
from quantlab.evaluation.tasks import read_task

Scorer = Callable[[Path], float]
DEFAULT_CONTEXT = 512
ROW_CHARACTERS = 40  # from which on a line is of one text: shorter ones (braces, headings) recur anywhere
SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Term:
    """One thing that a model is scored by, and how much it counts.

    Attributes:
        kind: "loss" of a text file (its score: minus the nats per token), "task" (accuracy on a JSON-lines file, see
            `tasks.read_task`), or "call" (what a Python function says of the model's folder).
        source: the file, or `module:function` (or `file.py:function`).
        context: tokens of a window, of "loss".
        limit: ask only so many questions, of "task".
        max_tokens: of a reasoned answer, of "task".
        function: of "call", where it is at hand already.
    """

    kind: Literal["loss", "task", "call"]
    source: str
    weight: float = 1.0
    context: int = DEFAULT_CONTEXT
    limit: int | None = None
    max_tokens: int | None = None
    function: Scorer | None = None

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.kind} {Path(self.source).name}"


@dataclass(frozen=True)
class Score:
    """A model's score; `stderr` takes the terms as independent (None where a function, which has none, is among them).
    `terms` are their own scores, by name.
    """

    score: float
    stderr: float | None
    terms: Mapping[str, float]


class Fitness:
    """A sum of terms.

    Args:
        threads: to score with, by default one a core.
        trust_code: whether functions that the terms name by text may be imported and run.

    Raises:
        InputError: a file cannot be read, a function is not there, or may not be run.
    """

    def __init__(self, terms: Sequence[Term], *, threads: int | None = None, trust_code: bool = False) -> None:
        if not terms:
            raise InputError("fitness: names nothing to score by")
        self.terms, self._threads = tuple(terms), threads
        self._functions: dict[Term, Scorer] = {}
        for term in self.terms:
            if term.kind == "call":
                self._functions[term] = term.function or _imported(term.source, trust_code)
            else:
                _rows(term)  # faults of files show at once

    def score(self, model: str | Path) -> Score:
        """The score of a model's folder or file.

        Raises:
            InputError: it cannot be scored, such as one whose logits are no numbers.
        """
        total, variance = 0.0, 0.0
        found: dict[str, float] = {}
        for term in self.terms:
            value, stderr = self._term(term, model)
            if not math.isfinite(value):
                raise InputError(f"{model}: {term.name} gives {value}")
            found[_distinct(term.name, found)] = value
            total += term.weight * value
            variance += math.nan if stderr is None else (term.weight * stderr) ** 2
        return Score(total, math.sqrt(variance) if math.isfinite(variance) else None, found)

    def _term(self, term: Term, model: str | Path) -> tuple[float, float | None]:
        if term.kind == "loss":
            loss = perplexity(model, Path(term.source), context=term.context, threads=self._threads)
            return -loss.nll, loss.stderr
        if term.kind == "task":
            most = MAX_TOKENS if term.max_tokens is None else term.max_tokens
            task = evaluate(model, Path(term.source), limit=term.limit, max_tokens=most, threads=self._threads)
            return task.accuracy, task.stderr
        return _number(self._functions[term](Path(model)), term), None


def check_disjoint(fitness: Iterable[Term], test: Iterable[Term]) -> None:
    """Refuse files to search by and files to judge by that have rows in common: documents and lines of texts, questions
    of tasks.

    Raises:
        InputError: two of them have, or one cannot be read.
    """
    judged = [(term, _rows(term)) for term in test]
    for one in fitness:
        ours = _rows(one)
        for other, theirs in judged:
            common = ours.keys() & theirs.keys()
            if common:
                first = min(ours[row] for row in common)
                row = next(row for row in common if ours[row] == first)
                raise InputError(
                    f"{other.source}: {len(common)} of its rows are in {one.source} too, the first is "
                    f"{one_line(row, SHOWN_CHARACTERS)!r}; judge by what the search does not see"
                )


def digest_of(terms: Iterable[Term]) -> str:
    """Of all that decides a score but the model: files' contents, functions' names, and how they are counted."""
    hasher = hashlib.sha256()
    for term in terms:
        hasher.update(repr((term.kind, term.weight, term.context, term.limit, term.max_tokens)).encode())
        hasher.update(term.source.encode() if term.kind == "call" else read_bytes(Path(term.source)))
    return hasher.hexdigest()[:16]


def _rows(term: Term) -> dict[str, int]:
    """What a file consists of, white space made one, and where each row is first."""
    if term.kind == "task":
        rows = [f"{question.prompt} {question.choices}" for question in read_task(Path(term.source), term.limit)]
    elif term.kind == "loss":
        documents = read_documents(Path(term.source))
        lines = [line for document in documents for line in document.splitlines() if len(line) >= ROW_CHARACTERS]
        rows = [*lines, *documents]
    else:
        rows = []
    found: dict[str, int] = {}
    for place, row in enumerate(rows):
        found.setdefault(" ".join(row.split()), place)
    return found


def _distinct(name: str, taken: Mapping[str, float]) -> str:
    """A name that no other term has: two files may be called alike."""
    number = 2
    while name in taken:
        name = f"{name.rstrip('0123456789').removesuffix(' #')} #{number}"
        number += 1
    return name


def _number(value: Any, term: Term) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InputError(
            f"{term.source}: gives {one_line(repr(value), SHOWN_CHARACTERS)} instead of a number"
        ) from None


def _imported(source: str, trust_code: bool) -> Scorer:
    if not trust_code:
        raise InputError(f"call: {source}: runs code; allow it with --trust-code if you know what it does")
    module_name, _, name = source.rpartition(":")
    try:
        if module_name.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(module_name).stem, module_name)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(module_name)
    except (ImportError, OSError, SyntaxError) as error:
        raise InputError(f"call: {source}: cannot be imported: {error}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"call: {source}: {module_name} has no function {name!r}")
    return function
