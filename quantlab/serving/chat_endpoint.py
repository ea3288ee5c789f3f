"""`POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from quantlab.checkpoint.chat_text import chat_ids
from quantlab.generation.generator import Completion
from quantlab.generation.prompts import Message
from quantlab.serving.answer_stream import Chunks, answer_chunks
from quantlab.serving.api_error import ApiError
from quantlab.serving.attendance import Attendance
from quantlab.serving.chat_answer import ChatAnswer
from quantlab.serving.chat_request import ChatRequest, Retrieval, written_messages
from quantlab.serving.event_stream import EventStream
from quantlab.serving.fields import read_fields
from quantlab.serving.model_host import ModelHost
from quantlab.serving.reasoning import CLOSE, OPEN, marks_reasoning
from quantlab.serving.request_body import read_json_body
from quantlab.serving.request_log import RequestNotes, notes_of
from quantlab.serving.service import Service
from quantlab.serving.texts import TextRequest, write_texts
from quantlab.serving.turns import Turn


async def chat_completions(request: Request, service: Service) -> ASGIApp:
    """Answer a conversation.

    Raises:
        ApiError: it is refused.
    """
    asked = read_fields(ChatRequest, await read_json_body(request, service.settings.max_body))
    asked.check()
    work = ChatWork(service, asked)
    notes = notes_of(request.scope)
    notes.model = work.model
    notes.texts["messages"] = work.messages
    attendance = Attendance(request, service.turns, work)
    if not asked.stream:
        completions = await attendance.result()
        _note(notes, completions)
        return JSONResponse(_answer(work).whole(completions))
    try:
        first = await attendance.items()
    except BaseException:
        attendance.close()
        raise
    return EventStream(_chunks(_answer(work), attendance, first, asked, notes), attendance.close)


class ChatWork:
    """The turn of one request; called on the thread of the engine.

    Attributes:
        model: as the client called it.
        messages: with passages, as soon as these have been found.
        sources: the passages; None where none were asked for.
        is_inside: the prompt opens the model's reasoning.
        splits: reasoning is told apart.

    Raises:
        ApiError: the request is refused.
    """

    def __init__(self, service: Service, asked: ChatRequest) -> None:
        host = service.host
        self.service, self._asked = service, asked
        self.model = asked.model or host.settings.name
        self.messages = written_messages(asked.messages)
        self.sources: list[dict[str, Any]] | None = None
        self.is_inside = False
        self._is_marked = marks_reasoning(host.layout.template, host.tokenizer)
        self.splits = self._is_marked and asked.reasoning_format != "none"
        self._adapter = host.adapter_of(asked.model)
        self._params = asked.params(host.settings.params)
        if asked.retrieval and service.documents is None:
            raise ApiError(400, "retrieval: this server has no index (quantlab serve --index DIR)", field="retrieval")

    def __call__(self, turn: Turn) -> list[Completion]:
        """The answers, one a sample."""
        host, asked = self.service.host, self._asked
        grammar = asked.constraint()
        max_tokens = asked.max_completion_tokens or asked.max_tokens
        self._find_passages(host.context - min(max_tokens or host.settings.max_tokens, host.context // 4))
        text = chat_text(host, self.messages)
        host.check_text(text)
        self.is_inside = self._is_marked and text.rstrip().endswith(OPEN)
        if grammar is not None and self.is_inside and asked.logprobs:
            told = "logprobs: are not told where an answer of a given form follows reasoning; leave one of them out"
            raise ApiError(400, told, field="logprobs")
        request = TextRequest(
            adapter=self._adapter,
            params=self._params,
            max_tokens=max_tokens,
            stop=(*host.layout.stop, *asked.stops()),
            samples=asked.n or 1,
            grammar=grammar,
            logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
            cue=f"{CLOSE}\n\n" if self.is_inside else None,
            is_streamed=bool(asked.stream),
        )
        tokenizer = host.layout.tokenizer
        return write_texts(host, turn, chat_ids(text, tokenizer), request, tokenizer)

    def _find_passages(self, room: int) -> None:
        wanted, documents = self._asked.retrieval, self.service.documents
        if not wanted or documents is None:
            return
        chosen = wanted if isinstance(wanted, Retrieval) else Retrieval()
        self.messages[-1], self.sources = documents.put_before(
            self.messages[-1], chosen.passages, chosen.method, room, self.service.host
        )


def chat_text(host: ModelHost, messages: list[Message]) -> str:
    """A conversation as text; a last message of the assistant is the beginning of the answer.

    Raises:
        ApiError: there is no other message.
        InputError: the model's template refuses these messages.
    """
    if messages[-1]["role"] != "assistant":
        return host.layout.text(messages)
    *before, begun = messages
    if not before:
        raise ApiError(400, "messages: a message of the user is needed", field="messages")
    return host.layout.text(before) + begun["content"]


def _answer(work: ChatWork) -> ChatAnswer:
    tokenizer = work.service.host.layout.tokenizer
    return ChatAnswer(
        work.model, work.service.token_texts, tokenizer.eos, work.splits, work.is_inside, sources=work.sources
    )


def _chunks(
    answer: ChatAnswer, attendance: Attendance, first: list[Any], asked: ChatRequest, notes: RequestNotes
) -> AsyncIterator[Chunks]:
    def end(completions: list[Completion]) -> Chunks:
        _note(notes, completions)
        return answer.last(completions, with_usage=bool(asked.stream_options and asked.stream_options.include_usage))

    return answer_chunks(attendance, first, answer.first(asked.n or 1), answer.pieces, end)


def _note(notes: RequestNotes, completions: list[Completion]) -> None:
    notes.note_completions(completions)
    notes.texts["answers"] = [completion.text for completion in completions]
