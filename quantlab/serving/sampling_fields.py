"""The fields that chat and completions share: how tokens are drawn, and when a text ends."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from quantlab.errors import InputError
from quantlab.generation.sampling import SamplingParams
from quantlab.serving.api_error import ApiError
from quantlab.serving.fields import RequestFields

MOST_STOPS = 16
MOST_STOP_CHARACTERS = 500
MOST_BIASES = 1024
MOST_SAMPLES = 16
MOST_GRAMMAR_CHARACTERS = 50_000  # compiling takes time by the square of the alternatives
RANDOM_SEED = -1  # llama.cpp's
# Of requests, and what the sampler calls them.
_PARAMETERS = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty")

StopString = Annotated[str, Field(min_length=1, max_length=MOST_STOP_CHARACTERS)]


class StreamOptions(RequestFields):
    """What a stream tells beside the text."""

    include_usage: bool | None = None


class SamplingFields(RequestFields):
    """Absent ones, and null, mean the server's defaults."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    repeat_penalty: float | None = None  # llama.cpp's name
    repeat_last_n: int | None = None
    seed: int | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MOST_STOPS)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_SAMPLES)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=MOST_BIASES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    grammar: Annotated[str, Field(max_length=MOST_GRAMMAR_CHARACTERS)] | None = None
    json_schema: dict[str, Any] | bool | None = None

    def stops(self) -> tuple[str, ...]:
        """The strings that end a text."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def params(self, defaults: SamplingParams) -> SamplingParams:
        """How tokens are drawn.

        Raises:
            ApiError: 400, a value out of range.
        """
        given: dict[str, Any] = {name: getattr(self, name) for name in _PARAMETERS}
        given["repetition_penalty"] = (
            self.repeat_penalty if self.repetition_penalty is None else self.repetition_penalty
        )
        given["penalty_window"] = max(self.repeat_last_n, 0) if self.repeat_last_n is not None else None
        given["seed"] = secrets.randbits(63) if self.seed == RANDOM_SEED else self.seed
        given["logit_bias"] = _biases(self.logit_bias)
        changes = {name: value for name, value in given.items() if value is not None}
        for name, value in changes.items():  # one by one: the fault gets the field's name
            try:
                replace(defaults, **{name: value})
            except InputError as error:
                raise ApiError(400, f"{name}: {error}", field=name) from None
        params = replace(defaults, **changes)
        if params.seed + (self.n or 1) > 1 << 64:
            raise ApiError(400, f"seed: {params.seed} leaves no seeds for {self.n} samples", field="seed")
        return params


def _biases(given: Mapping[str, float] | None) -> dict[int, float] | None:
    if given is None:
        return None
    biases = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise ApiError(400, f"logit_bias: {key[:40]!r} is no token id", field="logit_bias")
        biases[int(key)] = value
    return biases
