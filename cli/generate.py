"""`quantlab generate MODEL -p PROMPT`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from quantlab.cli.console import check_threads, print_json
from quantlab.cli.options import Adapters, Config, Engine, Json, Model, Threads, weighted_adapters


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue; - reads stdin.", show_default=False)],
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="Tokens to generate at most.")] = 128,
    temp: Annotated[float, typer.Option("--temp", help="Temperature; 0 takes the most likely token.")] = 0.8,
    top_k: Annotated[int, typer.Option("--top-k", help="Keep the k most likely tokens; 0: all.")] = 40,
    top_p: Annotated[float, typer.Option("--top-p", help="Keep the smallest set with this probability.")] = 0.95,
    min_p: Annotated[float, typer.Option("--min-p", help="Keep tokens of this share of the best one's.")] = 0.05,
    repetition_penalty: Annotated[float, typer.Option("--repetition-penalty", help="Above 1: repeat less.")] = 1.0,
    presence_penalty: Annotated[
        float, typer.Option("--presence-penalty", help="Taken off the logits of generated tokens.")
    ] = 0.0,
    frequency_penalty: Annotated[
        float, typer.Option("--frequency-penalty", help="The same, each time that a token came.")
    ] = 0.0,
    penalty_window: Annotated[
        int, typer.Option("--penalty-window", help="Tokens that penalties look back at; 0: all.")
    ] = 0,
    logit_bias: Annotated[
        list[str] | None,
        typer.Option("--logit-bias", metavar="ID=BIAS", help="Add to a token's logit; -inf: never. May be repeated."),
    ] = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End at this string; may be repeated.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="The same seed gives the same text.")] = 0,
    engine: Engine = "auto",
    adapter: Adapters = None,
    threads: Threads = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Continue a text; it is printed as it is written."""
    from quantlab.generation.sampling import SamplingParams

    params = SamplingParams(
        logit_bias=_biases(logit_bias or ()),
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        penalty_window=penalty_window,
        temperature=temp,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
    )
    adapters = weighted_adapters(adapter)
    text = _standard_input() if prompt == "-" else _checked(prompt)
    check_threads(threads)
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


def _biases(options: Sequence[str]) -> dict[int, float]:
    from quantlab.errors import InputError

    biases: dict[int, float] = {}
    for option in options:
        token, _, bias = option.partition("=")
        try:
            pair = int(token), float(bias)
        except ValueError:
            raise InputError(f"--logit-bias {option}: expected ID=BIAS, a token id and a number") from None
        if pair[0] in biases:
            raise InputError(f"--logit-bias {option}: token {pair[0]} has a bias already")
        biases[pair[0]] = pair[1]
    return biases


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
