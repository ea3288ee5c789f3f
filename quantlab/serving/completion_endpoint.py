"""`POST /v1/completions`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from quantlab.serving.answer_stream import Chunks, answer_chunks
from quantlab.serving.attendance import Attendance
from quantlab.serving.completion_answer import CompletionAnswer, Continued
from quantlab.serving.completion_request import CompletionRequest, Prompt
from quantlab.serving.event_stream import EventStream
from quantlab.serving.fields import read_fields
from quantlab.serving.request_body import read_json_body
from quantlab.serving.request_log import RequestNotes, notes_of
from quantlab.serving.service import Service
from quantlab.serving.texts import TextRequest, read_prompt, write_texts
from quantlab.serving.turns import Turn


async def completions(request: Request, service: Service) -> ASGIApp:
    """Continue texts, or score them.

    Raises:
        ApiError: it is refused.
    """
    asked = read_fields(CompletionRequest, await read_json_body(request, service.settings.max_body))
    asked.check()
    work = CompletionWork(service, asked)
    notes = notes_of(request.scope)
    notes.model = work.model
    notes.texts["prompts"] = work.prompts
    answer = CompletionAnswer(work.model, service.token_texts, bool(asked.echo))
    attendance = Attendance(request, service.turns, work)
    if not asked.stream:
        continued = await attendance.result()
        _note(notes, continued)
        return JSONResponse(answer.whole(continued))
    try:
        first = await attendance.items()
    except BaseException:
        attendance.close()
        raise
    return EventStream(_chunks(answer, attendance, first, work, notes), attendance.close)


class CompletionWork:
    """The turn of one request; called on the thread of the engine.

    Attributes:
        model: as the client called it.
        prompts: as they were given.
        texts: the prompts as texts, as soon as the turn has begun.

    Raises:
        ApiError: the request is refused.
    """

    def __init__(self, service: Service, asked: CompletionRequest) -> None:
        self._host, self.asked = service.host, asked
        self.model = asked.model or service.host.settings.name
        self.prompts = asked.prompts()
        self.texts: list[str] = []
        self._adapter = service.host.adapter_of(asked.model)
        self._params = asked.params(service.host.settings.params)

    def __call__(self, turn: Turn) -> list[Continued]:
        """The texts, prompt by prompt."""
        asked, tokenizer = self.asked, self._host.tokenizer
        request = TextRequest(
            adapter=self._adapter,
            params=self._params,
            max_tokens=asked.max_tokens,
            stop=asked.stops(),
            samples=asked.n or 1,
            grammar=asked.constraint(),
            logprobs=asked.logprobs,
            prompt_logprobs=asked.logprobs if asked.echo else None,
            is_streamed=bool(asked.stream),
        )
        ids = [self._ids(prompt) for prompt in self.prompts]
        self.texts = [prompt if isinstance(prompt, str) else tokenizer.decode(prompt) for prompt in self.prompts]
        continued = []
        for number, (prompt_ids, text) in enumerate(zip(ids, self.texts, strict=True)):
            if asked.max_tokens == 0:
                samples = [read_prompt(self._host, turn, prompt_ids, request, tokenizer)] * request.samples
            else:
                first = number * request.samples
                samples = write_texts(self._host, turn, prompt_ids, request, tokenizer, first)
            continued.append(Continued(prompt_ids, text, samples))
        return continued

    def _ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            self._host.check_text(prompt)
            return self._host.tokenizer.encode(prompt)
        self._host.check_length(len(prompt))
        return self._host.checked(prompt)


def _chunks(
    answer: CompletionAnswer, attendance: Attendance, first: list[Any], work: CompletionWork, notes: RequestNotes
) -> AsyncIterator[Chunks]:
    asked = work.asked

    def end(continued: list[Continued]) -> Chunks:
        _note(notes, continued)
        return answer.last(continued, with_usage=bool(asked.stream_options and asked.stream_options.include_usage))

    return answer_chunks(attendance, first, answer.first(work.texts, asked.n or 1), answer.pieces, end)


def _note(notes: RequestNotes, continued: list[Continued]) -> None:
    notes.note_completions([each for one in continued for each in one.samples], len(continued))
    notes.texts["answers"] = [each.text for one in continued for each in one.samples]
