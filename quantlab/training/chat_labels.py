"""Conversations -> token ids and labels: loss on the assistant's turns, whatever chat template writes them.

A request for an answer is the conversation before it, rendered with the generation prompt. What the template adds to
that text once the answer is there, is the turn; the model learns it up to the token that ends it. All turns of a
conversation make one sample where its ids begin, for every turn, with exactly those of that request. Where they do not
(a template that drops the thoughts of earlier turns, a tokenizer that joins a turn's end with what follows), or where
no token would end a turn, every turn makes a sample of its own, whose prompt is what a request sends.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from quantlab.checkpoint.chat_text import chat_ids, render_chat, render_marked_chat
from quantlab.errors import InputError
from quantlab.training.faults import counted
from quantlab.training.row_forms import Conversation
from quantlab.training.sample import Sample, sample_of
from quantlab.training.text_labels import TextEncoder

Span = tuple[int, int]


@dataclass(frozen=True)
class _Turn:
    """What a request sends, and the text with the answer, which begins with it."""

    prompt: str
    answered: str


class ChatEncoder:
    """Makes samples of conversations by one template.

    `last_turn_only` learns the last answer alone.
    """

    def __init__(self, template: str, encoder: TextEncoder, *, last_turn_only: bool = False) -> None:
        self._template, self._encoder, self._last_turn_only = template, encoder, last_turn_only
        self._tokenizer = encoder.tokenizer
        added = self._tokenizer.backend.get_added_tokens_decoder()
        self._special = {i for i, token in added.items() if token.special} | self._tokenizer.eos
        self._unended = 0  # samples whose template wrote no token that ends a turn, so that the end token was added
        self._unstopped: Counter[int] = Counter()  # tokens that end turns, but do not end generation
        self._marked_rows = 0

    def samples(self, row: Conversation, place: str) -> list[Sample]:
        """One sample, or one for every turn to learn.

        Raises:
            InputError: the template fails on the messages, or writes answers that do not continue the generation
                prompt and has no `{% generation %}` marks; the tokenizer cannot encode the text.
        """
        numbers = [n for n, m in enumerate(row.messages) if m["role"] == "assistant" and n >= row.learned_from]
        turns = [self._turn(row, number, place) for number in (numbers[-1:] if self._last_turn_only else numbers)]
        if not all(turn.answered.startswith(turn.prompt) for turn in turns):
            return [self._marked(row, turns, place)]
        whole = self._text(row, len(row.messages), place)
        if len(turns) == 1 and len(row.messages) == numbers[-1] + 1:
            return [self._turn_sample(turns[0], place)]
        together = self._joined(whole, turns, place)
        return [together] if together is not None else [self._turn_sample(turn, place) for turn in turns]

    def notes(self) -> list[str]:
        """What is worth saying of the samples made so far."""
        notes = []
        if self._unended:
            notes.append(
                f"the chat template ends {counted(self._unended, 'sample')} with no special token; the end token "
                f"{self._piece(self._encoder.end)} is added"
            )
        for token, count in self._unstopped.items():
            notes.append(
                f"{self._piece(token)} ends {counted(count, 'sample')}, and this model's generation does not stop at "
                "it: add it to eos_token_id in generation_config.json"
            )
        if self._marked_rows:
            notes.append(
                f"{counted(self._marked_rows, 'conversation')} labelled by the template's generation marks: its "
                "answers do not continue its generation prompt, so that serving sees other tokens before an answer"
            )
        return notes

    def _piece(self, token: int) -> str:
        return self._tokenizer.decode([token], skip_special_tokens=False)

    def _turn(self, row: Conversation, number: int, place: str) -> _Turn:
        turn = _Turn(self._text(row, number, place, generation_prompt=True), self._text(row, number + 1, place))
        lines = (row.messages[number]["content"] or "").strip().splitlines()  # earlier ones may be thoughts, dropped
        if lines and lines[-1].strip() not in turn.answered.removeprefix(turn.prompt):
            raise InputError("the chat template leaves out what the assistant says")
        return turn

    def _text(self, row: Conversation, count: int, place: str, *, generation_prompt: bool = False) -> str:
        return render_chat(
            self._template,
            row.messages[:count],
            self._tokenizer,
            place,
            generation_prompt=generation_prompt,
            tools=row.tools,
        )

    def _joined(self, whole: str, turns: list[_Turn], place: str) -> Sample | None:
        """One sample of all turns; None where its ids would not be those of each turn's request, or where an answer
        that no special token ends is followed by more.
        """
        if not all(whole.startswith(turn.answered) for turn in turns):
            return None
        ids = chat_ids(whole, self._tokenizer)
        spans = []
        for turn in turns:
            start, end = self._common(ids, turn.prompt), self._common(ids, turn.answered)
            if end is None:  # white space that joins with what follows
                end = self._common(ids, turn.answered.rstrip())
            if start is None or end is None or end <= start:
                return None
            end = start + self._learned(ids[start:end])
            if end < len(ids) and ids[end - 1] not in self._special:
                return None
            spans.append((start, end))
        return self._ended(ids, spans, place, as_served=True)

    def _common(self, ids: list[int], text: str) -> int | None:
        """How many of `ids` the text alone gives; None where it gives others."""
        alone = chat_ids(text, self._tokenizer)
        return len(alone) if ids[: len(alone)] == alone else None

    def _turn_sample(self, turn: _Turn, place: str) -> Sample:
        """The request's ids, and the answer's: of the whole text where they begin with the request's, else apart."""
        together = self._joined(turn.answered, [turn], place)
        if together is not None:
            return together
        prompt, answer = chat_ids(turn.prompt, self._tokenizer), turn.answered.removeprefix(turn.prompt)
        ids = self._encoder.behind(prompt, answer, lambda: chat_ids(turn.answered, self._tokenizer))
        return self._ended([*prompt, *ids], [(len(prompt), len(prompt) + self._learned(ids))], place, as_served=True)

    def _learned(self, answer: list[int]) -> int:
        """How many of an answer's ids are learned: up to the last special token that only white space follows."""
        for count in range(len(answer), 0, -1):
            if answer[count - 1] in self._special:
                return count
            if self._tokenizer.decode([answer[count - 1]]).strip():
                break
        return len(answer)

    def _ended(self, ids: list[int], spans: list[Span], place: str, *, as_served: bool) -> Sample:
        """With an end token where the conversation ends with an answer that no special token ends."""
        start, end = spans[-1]
        last = ids[end - 1]
        if last in self._special - self._tokenizer.eos:
            self._unstopped[last] += 1
        if end == len(ids) and last not in self._special:
            self._unended += 1
            ids, spans = [*ids, self._encoder.end], [*spans[:-1], (start, end + 1)]
        return sample_of(ids, spans, place, as_served)

    def _marked(self, row: Conversation, turns: list[_Turn], place: str) -> Sample:
        """By the template's own marks, where its answers do not continue its generation prompt."""
        self._marked_rows += 1
        text, marks = render_marked_chat(self._template, row.messages, self._tokenizer, place, tools=row.tools)
        marks = [mark for mark in marks if mark[0] < mark[1]]
        if not marks:
            raise _not_continued(next(turn for turn in turns if not turn.answered.startswith(turn.prompt)))
        if row.learned_from or self._last_turn_only:
            marks = marks[-len(turns) :]
        ids = chat_ids(text[: marks[0][0]], self._tokenizer)
        spans = []
        for number, (start, end) in enumerate(marks):
            following = marks[number + 1][0] if number + 1 < len(marks) else len(text)
            answer = self._continued(ids, text[start:end], text[:end])
            spans.append((len(ids), len(ids) + self._learned(answer)))
            ids += answer
            ids += self._continued(ids, text[end:following], text[:following])
        return self._ended(ids, spans, place, as_served=False)

    def _continued(self, ids: list[int], text: str, whole: str) -> list[int]:
        return self._encoder.behind(ids, text, lambda: chat_ids(whole, self._tokenizer)) if text else []


def _not_continued(turn: _Turn) -> InputError:
    same = next(
        (n for n, (a, b) in enumerate(zip(turn.prompt, turn.answered, strict=False)) if a != b), len(turn.answered)
    )
    asked, written = turn.prompt[same:][:30], turn.answered[same:][:30]
    return InputError(
        f"the chat template asks for an answer with {asked!r} where it writes {written!r} once it has one; give a "
        "template that continues its generation prompt, or marks answers with {% generation %}"
    )
