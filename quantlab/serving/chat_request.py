"""What `/v1/chat/completions` is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from quantlab.generation.grammars import Grammar
from quantlab.generation.prompts import Message
from quantlab.serving.api_error import ApiError
from quantlab.serving.fields import RequestFields
from quantlab.serving.grammar_fields import chosen_grammar
from quantlab.serving.sampling_fields import SamplingFields

MOST_TOP_LOGPROBS = 20
MOST_MESSAGES = 4096
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class ContentPart(RequestFields):
    """A part of a message; only text is read."""

    type: str
    text: str | None = None


class ChatMessage(RequestFields):
    """A message of the conversation."""

    role: str
    content: str | Annotated[list[ContentPart], Field(fail_fast=True)] | None = None
    tool_calls: list[Any] | None = None

    def written(self, place: str) -> Message:
        """As layouts take it.

        Raises:
            ApiError: 400, a role or a part that there is not; `place` is the message's path.
        """
        if self.role not in ROLES:
            known = ", ".join(ROLES)
            raise ApiError(400, f"{place}.role: {self.role[:40]!r} is none of: {known}", field=f"{place}.role")
        if self.tool_calls:
            raise ApiError(400, "function calls are not supported yet", field=f"{place}.tool_calls")
        if isinstance(self.content, str):
            return {"role": ROLES[self.role], "content": self.content}
        texts = []
        for number, part in enumerate(self.content or ()):
            if part.type != "text" or part.text is None:
                field = f"{place}.content.{number}"
                raise ApiError(400, f"{field}: a part of type {part.type[:40]!r}; only text is read", field=field)
            texts.append(part.text)
        return {"role": ROLES[self.role], "content": "\n".join(texts)}


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]


class SchemaHolder(RequestFields):
    """OpenAI's `json_schema`: the schema and its name."""

    schema_: Annotated[dict[str, Any] | bool, Field(alias="schema")]


class ResponseFormat(RequestFields):
    """`schema` beside the type is llama.cpp's way."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaHolder | None = None
    schema_: Annotated[dict[str, Any] | bool | None, Field(alias="schema")] = None


class Retrieval(RequestFields):
    """How passages are found for the last message."""

    passages: Annotated[int, Field(ge=1, le=50)] | None = None
    method: Literal["hybrid", "vector", "keyword"] | None = None


class ChatRequest(SamplingFields):
    """See OpenAI's reference for what it shares with it, and docs/serving.md for the rest."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    reasoning_format: Literal["auto", "none", "deepseek"] | None = None
    retrieval: bool | Retrieval | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None

    def check(self) -> None:
        """Refuse what is not there yet.

        Raises:
            ApiError: 400.
        """
        for field in ("tools", "functions"):
            if getattr(self, field):
                raise ApiError(400, f"{field}: function calls are not supported yet; leave it out", field=field)
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", field="top_logprobs")

    def constraint(self) -> Grammar | None:
        """What the answer has to be; compiled, which may take a while.

        Raises:
            ApiError: 400, more than one, or one that nothing can meet.
        """
        format_ = self.response_format
        schema: Any = None
        if format_ is not None and format_.type == "json_object":
            schema = {"type": "object"} if format_.schema_ is None else format_.schema_
        elif format_ is not None and format_.type == "json_schema":
            schema = format_.schema_ if format_.json_schema is None else format_.json_schema.schema_
            if schema is None:
                raise ApiError(400, "response_format.json_schema: is missing", field="response_format.json_schema")
        return chosen_grammar({"response_format": schema, "json_schema": self.json_schema}, self.grammar)


def written_messages(messages: Sequence[ChatMessage]) -> list[Message]:
    """The messages, as layouts take them.

    Raises:
        ApiError: 400, naming the message that is wrong.
    """
    return [message.written(f"messages.{number}") for number, message in enumerate(messages)]
