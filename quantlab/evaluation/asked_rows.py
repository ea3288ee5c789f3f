"""A task's rows as templates ask them: with a type of answer, passages, and a reference in the extractors' spelling."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantlab.errors import InputError
from quantlab.evaluation.tasks import Question, whole_number
from quantlab.generation.answer_types import MOST_CHOICES, AnswerType, checked_answer_type, letters
from quantlab.generation.answers import plain_words, reference_answer
from quantlab.generation.examples import REASONED, Example
from quantlab.generation.json_rows import MOST_FAULTS
from quantlab.generation.sources import GivenSource, Source
from quantlab.generation.templates import Asked, Template

Search = Callable[[str], Sequence[Source]]  # the passages for a question, best first


@dataclass(frozen=True)
class AskedRow:
    """One row of a task. `passages` may hold the answer, `context` does (an oracle's), and so do the documents that
    `sources` names.
    """

    line: int
    question: str
    answer_type: AnswerType
    choices: tuple[str, ...]
    reference: str
    passages: tuple[Source, ...] = ()
    context: tuple[Source, ...] = ()
    sources: tuple[str, ...] = ()

    def is_right(self, answer: str) -> bool:
        """Whether an extracted answer is the row's."""
        return (plain_words(answer) if self.answer_type == "free" else answer) == self.reference


class RowAsking:
    """The rows of a task as each template asks them; passages that were searched for are kept."""

    def __init__(
        self,
        rows: Sequence[AskedRow],
        examples: Sequence[Example],
        shots: int,
        role: str,
        search: Search | None,
        seed: int,
    ) -> None:
        self.rows = rows
        self._examples, self._shots, self._role = examples, shots, role
        self._search, self._seed = search, seed
        self._searched: dict[int, tuple[Source, ...]] = {}

    def asked(self, number: int, template: Template) -> Asked:
        """The question of row `number`, with what `template` shows around it.

        Raises:
            InputError: passages or a context that the row lacks.
        """
        row = self.rows[number]
        examples = [example for example in self._examples if example.question != row.question][: self._shots]
        passages = self._passages(number, template) if template.wants_passages else ()
        return Asked(row.question, row.answer_type, row.choices, passages, tuple(examples), self._role)

    def _passages(self, number: int, template: Template) -> tuple[Source, ...]:
        if template.passages == "oracle":
            if not self.rows[number].context:
                raise InputError('has no "context"')
            return self.rows[number].context
        if template.passages == "another question's":
            return self._others(number)
        passages = self.own_passages(number)
        if template.passages == "shuffled":
            order = random.Random(f"{self._seed} {number}")  # noqa: S311 no secret
            return tuple(order.sample(passages, len(passages)))
        return passages

    def is_found(self, number: int) -> bool:
        """Whether a passage of row `number` comes from one of its sources, named by paths or the ends of them."""
        places = [f"/{passage.source}" for passage in self.own_passages(number)]
        return any(place.endswith(f"/{source}") for place in places for source in self.rows[number].sources)

    def own_passages(self, number: int) -> tuple[Source, ...]:
        """What was found for row `number`, or what it brings along.

        Raises:
            InputError: it brings none.
        """
        row = self.rows[number]
        if self._search is None:
            if not row.passages:
                raise InputError('has no "passages"')
            return row.passages
        if number not in self._searched:
            self._searched[number] = tuple(self._search(row.question))
        return self._searched[number]

    def _others(self, number: int) -> tuple[Source, ...]:
        """Of the next question, from half of the file on, with another answer, and passages that are all different."""
        own = {passage.text for passage in self.own_passages(number)}
        count = len(self.rows)
        for step in range(count):
            other = (number + count // 2 + step) % count
            if self.rows[other].reference == self.rows[number].reference:
                continue
            if own.isdisjoint(passage.text for passage in self.own_passages(other)):
                return self.own_passages(other)
        raise InputError("no other question has passages that are all different")


def asked_rows(path: Path, questions: Sequence[Question], rules: str) -> list[AskedRow]:
    """The rows of a task that has been read.

    A row may say its "type" of answer; without one, choices, a number, yes or no, and a short text are told by the
    answer. "passages" and "context" are a text, an object of "source" and "text", or a list of them. "source" names the
    document that holds the answer, or is a list of such names.

    Raises:
        InputError: rows that are wrong for templates, by their lines.
    """
    rows, faults = [], []
    for question in questions:
        try:
            rows.append(_asked_row(question, rules))
        except ValueError as error:
            faults.append(f"line {question.line}: {error}")
    if faults:
        more = f"; and {len(faults) - MOST_FAULTS} more" if len(faults) > MOST_FAULTS else ""
        raise InputError(f"{path}: {len(faults)} bad rows: {'; '.join(faults[:MOST_FAULTS])}{more}")
    return rows


def _asked_row(question: Question, rules: str) -> AskedRow:
    row = question.row
    if "question" not in row:
        raise ValueError('"prompt" is continued as it is; templates need a "question"')
    if len(question.choices) > MOST_CHOICES:
        raise ValueError(f"has {len(question.choices)} choices; there are letters for {MOST_CHOICES}")
    if isinstance(question.answer, int):
        reference = letters(len(question.choices))[question.answer]
    else:
        reference = question.answer.rpartition(REASONED)[2].strip()
    answer_type = _answer_type(question, reference)
    return AskedRow(
        question.line,
        row["question"].strip(),
        answer_type,
        question.choices,
        reference_answer(reference, answer_type, rules),
        _sources(row.get("passages", []), "passages"),
        _sources(row.get("context", []), "context"),
        _names(row.get("source", [])),
    )


def _answer_type(question: Question, reference: str) -> AnswerType:
    if "type" in question.row:
        given = question.row["type"]
        if not isinstance(given, str):
            raise ValueError('"type" is no text')
        answer_type = checked_answer_type(given)  # its InputError is a ValueError
        if (answer_type == "choice") != bool(question.choices):
            raise ValueError('"type" choice goes with "choices", and no other does')
        if answer_type == "number" and whole_number(reference) is None:
            raise ValueError('"answer" is no number, which its "type" says')
        return answer_type
    if question.choices:
        return "choice"
    if question.reasoned or whole_number(reference) is not None:
        return "number"
    return "yes-no" if plain_words(reference) in ("yes", "no") else "text"


def _sources(given: object, name: str) -> tuple[GivenSource, ...]:
    return tuple(_source(one, f"{name} {number}") for number, one in enumerate(_listed(given), 1))


def _names(given: object) -> tuple[str, ...]:
    names = tuple(name for name in _listed(given) if isinstance(name, str) and name)
    if len(names) != len(_listed(given)):
        raise ValueError('"source" is no name of a document, or list of names')
    return names


def _listed(given: object) -> list[object]:
    return given if isinstance(given, list) else [given]


def _source(given: object, name: str) -> GivenSource:
    source, text = (given.get("source", name), given.get("text")) if isinstance(given, dict) else (name, given)
    if not isinstance(source, str) or not isinstance(text, str) or not text.strip():
        raise ValueError(f'"{name.partition(" ")[0]}" holds something else than texts, or objects of source and text')
    return GivenSource(source, text)
