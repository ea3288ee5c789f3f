"""`quantlab generate MODEL -p PROMPT`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from quantlab.cli.console import check_threads, print_json
from quantlab.cli.generation_options import (
    FrequencyPenalty,
    LogitBias,
    MaxTokens,
    MinP,
    PenaltyWindow,
    PresencePenalty,
    RepetitionPenalty,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
    sampling_params,
)
from quantlab.cli.options import Adapters, Config, Engine, Json, Model, Threads, weighted_adapters
from quantlab.cli.template_answer import answer_by_template
from quantlab.cli.template_options import (
    AnswerTrigger,
    AnswerTypeName,
    ExampleFile,
    IgnoreChatTemplate,
    PassageFiles,
    PassageTokens,
    Role,
    Rules,
    Shots,
    Template,
    Trigger,
    refuse_without_template,
)


def generate(
    context: typer.Context,
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue; - reads stdin.", show_default=False)],
    max_tokens: MaxTokens = 128,
    temp: Temperature = 0.8,
    top_k: TopK = 40,
    top_p: TopP = 0.95,
    min_p: MinP = 0.05,
    repetition_penalty: RepetitionPenalty = 1.0,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    penalty_window: PenaltyWindow = 0,
    logit_bias: LogitBias = None,
    stop: Stop = None,
    seed: Seed = 0,
    template: Template = None,
    examples: ExampleFile = None,
    shots: Shots = 8,
    role: Role = "",
    trigger: Trigger = None,
    answer_trigger: AnswerTrigger = None,
    answer_type: AnswerTypeName = "free",
    rules: Rules = "strict",
    passages: PassageFiles = None,
    passage_tokens: PassageTokens = None,
    ignore_chat_template: IgnoreChatTemplate = False,
    engine: Engine = "auto",
    adapter: Adapters = None,
    threads: Threads = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Continue a text; it is printed as it is written."""
    params = sampling_params(
        temp,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        penalty_window,
        logit_bias,
        seed,
    )
    adapters = weighted_adapters(adapter)
    text = _standard_input() if prompt == "-" else _checked(prompt)
    check_threads(threads)
    if template is not None:
        answer_by_template(context, text, params, {"engine": engine, "threads": threads, "adapters": adapters})
        return
    refuse_without_template(context)
    from quantlab.generation import generator

    result = generator.generate(
        model,
        text,
        max_tokens=max_tokens,
        params=params,
        stop=stop or (),
        on_text=None if json else _show,
        engine=engine,
        threads=threads,
        adapters=adapters,
    )
    if json:
        print_json(result)
        return
    print()
    timings = result.timings
    print(
        f"[{result.engine} engine: {timings.prompt_tokens} prompt tokens at {timings.prefill_tokens_per_second:.0f}/s, "
        f"{timings.generated_tokens} generated at {timings.decode_tokens_per_second:.1f}/s, "
        f"ended by {result.finish_reason}]",
        file=sys.stderr,
    )


def _show(piece: str) -> None:
    print(piece, end="", flush=True)


def _checked(prompt: str) -> str:
    from quantlab.errors import InputError

    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:  # Python stands surrogates in for bytes that are no UTF-8
        raise InputError("--prompt is not UTF-8 text") from None
    return prompt


def _standard_input() -> str:
    from quantlab.errors import InputError

    if sys.stdin is None:
        raise InputError("standard input is closed; give the prompt itself instead of -")
    try:
        return sys.stdin.buffer.read().decode("utf-8").rstrip("\n")
    except UnicodeDecodeError:
        raise InputError("standard input is not UTF-8 text") from None
