"""`quantlab generate MODEL -p PROMPT`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from quantlab.cli.console import check_threads, print_json
from quantlab.cli.constraint_options import (
    CUE,
    Choice,
    Choices,
    GrammarFile,
    JsonSchema,
    ReasoningBudget,
    Regex,
    ThenChoice,
    ThenCue,
    ThenJsonSchema,
    ThenRegex,
    grammar_of,
)
from quantlab.cli.generation_options import (
    DraftModel,
    DraftTokens,
    FrequencyPenalty,
    LogitBias,
    MaxTokens,
    MinP,
    PenaltyWindow,
    PresencePenalty,
    PromptCacheFolder,
    PromptCacheSize,
    RepetitionPenalty,
    Samples,
    Seed,
    Speculation,
    Stop,
    Temperature,
    TopK,
    TopP,
    opened_prompt_cache,
    sampling_params,
)
from quantlab.cli.options import Adapters, Config, Engine, Json, Model, Threads, weighted_adapters
from quantlab.cli.passage_search import METHOD, PASSAGES, IndexPlace, PassageCount, SearchMethod
from quantlab.cli.sample_view import show_samples
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
    is_given,
    refuse_without_template,
)

if TYPE_CHECKING:
    from quantlab.generation.generator import Timings

# Parameters that templates do not take.
PLAIN_ONLY = (
    "speculation", "draft_model", "num_draft_tokens", "logprobs", "prompt_logprobs", "json_schema", "regex", "choice",
    "choices", "grammar_file", "then_json_schema", "then_regex", "then_choice", "then_cue", "reasoning_budget",
)  # fmt: skip
OPTION_NAMES = {"grammar_file": "grammar"}  # where it is not the parameter's
# Several texts draft nothing.
SINGLE_ONLY = (
    "draft_model", "num_draft_tokens", "logprobs", "prompt_logprobs", "then_json_schema", "then_regex", "then_choice",
    "then_cue", "reasoning_budget",
)  # fmt: skip


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
    index: IndexPlace = None,
    passage_count: PassageCount = PASSAGES,
    search_method: SearchMethod = METHOD,
    passage_tokens: PassageTokens = None,
    ignore_chat_template: IgnoreChatTemplate = False,
    json_schema: JsonSchema = None,
    regex: Regex = None,
    choice: Choice = None,
    choices: Choices = None,
    grammar_file: GrammarFile = None,
    then_json_schema: ThenJsonSchema = None,
    then_regex: ThenRegex = None,
    then_choice: ThenChoice = None,
    then_cue: ThenCue = CUE,
    reasoning_budget: ReasoningBudget = 256,
    speculation: Speculation = "auto",
    draft_model: DraftModel = None,
    num_draft_tokens: DraftTokens = 15,
    samples: Samples = None,
    prompt_cache: PromptCacheFolder = None,
    prompt_cache_size: PromptCacheSize = "1GB",
    logprobs: Annotated[
        int | None, typer.Option("--logprobs", help="Tell ln p of each token and so many alternatives (--json).")
    ] = None,
    prompt_logprobs: Annotated[
        int | None, typer.Option("--prompt-logprobs", help="The same of the prompt's tokens (--json).")
    ] = None,
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
    _check_shown(json, {"--logprobs": logprobs, "--prompt-logprobs": prompt_logprobs})
    adapters = weighted_adapters(adapter)
    text = _standard_input() if prompt == "-" else _checked(prompt)
    check_threads(threads)
    settings: dict[str, Any] = {  # Any: arguments of several functions
        "engine": engine,
        "threads": threads,
        "adapters": adapters,
        "prompt_cache": opened_prompt_cache(prompt_cache, prompt_cache_size),
    }
    if template is not None:
        _refuse(context, PLAIN_ONLY, "is for a plain prompt; leave it or --template out")
        answer_by_template(context, text, params, settings)
        return
    refuse_without_template(context)
    grammar = grammar_of(json_schema, regex, choice, choices, grammar_file)
    if samples is not None:
        _refuse(context, SINGLE_ONLY, "is for a single text; leave it or --samples out")
        drawing = {"max_tokens": max_tokens, "params": params, "stop": stop or (), "grammar": grammar}
        show_samples(model, text, samples, {**drawing, **settings}, json)
        return
    then_grammar = grammar_of(then_json_schema, then_regex, then_choice, prefix="--then-")
    if then_grammar is None:
        _refuse(context, ("then_cue", "reasoning_budget"), "means nothing without --then-json-schema or its like")
    from quantlab.generation.generate import generate as continued

    result = continued(
        model,
        text,
        max_tokens=max_tokens,
        params=params,
        stop=stop or (),
        on_text=None if json else _show,
        **settings,
        grammar=grammar,
        then_grammar=then_grammar,
        cue=then_cue.replace("\\n", "\n"),
        reasoning_budget=reasoning_budget,
        speculation=speculation,
        draft_model=draft_model,
        draft_tokens=num_draft_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )
    if json:
        print_json(result)
        return
    print()
    timings = result.timings
    print(
        f"[{result.engine} engine: {timings.prompt_tokens} prompt tokens at {timings.prefill_tokens_per_second:.0f}/s, "
        f"{timings.generated_tokens} generated at {timings.decode_tokens_per_second:.1f}/s, {_drafts(timings)}"
        f"ended by {result.finish_reason}]",
        file=sys.stderr,
    )


def _drafts(timings: Timings) -> str:
    if not timings.drafted_tokens:
        return ""
    return f"{timings.accepted_tokens} of {timings.drafted_tokens} drafted tokens accepted, "


def _refuse(context: typer.Context, names: Sequence[str], reason: str) -> None:
    from quantlab.errors import InputError

    if given := [name for name in names if is_given(context, name)]:
        raise InputError(f"--{OPTION_NAMES.get(given[0], given[0].replace('_', '-'))} {reason}")


def _check_shown(json: bool, counts: Mapping[str, int | None]) -> None:
    from quantlab.errors import InputError

    if asked := [option for option, count in counts.items() if count is not None and not json]:
        raise InputError(f"{asked[0]} is part of the JSON object; add --json")


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
