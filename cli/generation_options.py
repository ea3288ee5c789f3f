"""Options of the commands that generate text, and the parameters that they make."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from quantlab.generation.prompt_cache import PromptCache
    from quantlab.generation.sampling import SamplingParams

MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", help="Tokens to generate at most.")]
Temperature = Annotated[float, typer.Option("--temp", help="Temperature; 0 takes the most likely token.")]
TopK = Annotated[int, typer.Option("--top-k", help="Keep the k most likely tokens; 0: all.")]
TopP = Annotated[float, typer.Option("--top-p", help="Keep the smallest set with this probability.")]
MinP = Annotated[float, typer.Option("--min-p", help="Keep tokens of this share of the best one's.")]
RepetitionPenalty = Annotated[float, typer.Option("--repetition-penalty", help="Above 1: repeat less.")]
PresencePenalty = Annotated[float, typer.Option("--presence-penalty", help="Taken off the logits of generated tokens.")]
FrequencyPenalty = Annotated[float, typer.Option("--frequency-penalty", help="The same, each time that a token came.")]
PenaltyWindow = Annotated[int, typer.Option("--penalty-window", help="Tokens that penalties look back at; 0: all.")]
LogitBias = Annotated[
    list[str] | None,
    typer.Option("--logit-bias", metavar="ID=BIAS", help="Add to a token's logit; -inf: never. May be repeated."),
]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="End at this string; may be repeated.")]
Seed = Annotated[int, typer.Option("--seed", help="The same seed gives the same text.")]
Speculation = Annotated[
    str,
    typer.Option(
        "--speculation", help="auto: draft tokens where that pays; lookup: wherever the text repeats; off. Same text."
    ),
]
DraftModel = Annotated[
    str | None,
    typer.Option("--draft-model", "--draft", metavar="MODEL", help="A smaller model, same tokenizer, that drafts."),
]
DraftTokens = Annotated[int, typer.Option("--num-draft-tokens", help="Tokens of a draft at most.")]
Samples = Annotated[
    int | None,
    typer.Option("--samples", help="Texts from one prompt, drawn together; with a voting template, its votes."),
]
PromptCacheFolder = Annotated[
    Path | None,
    typer.Option("--prompt-cache", metavar="DIR", help="Keep what prompts computed here, for later runs to reuse."),
]
PromptCacheSize = Annotated[
    str, typer.Option("--prompt-cache-size", help="Bytes that the folder may take; the least recently used go.")
]


def sampling_params(
    temp: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    presence_penalty: float,
    frequency_penalty: float,
    penalty_window: int,
    logit_bias: Sequence[str] | None,
    seed: int,
) -> SamplingParams:
    """What the options of these names ask for.

    Raises:
        InputError: a value out of range, or a bias that is not ID=BIAS.
    """
    from quantlab.generation.sampling import SamplingParams

    return SamplingParams(
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


def opened_prompt_cache(folder: Path | None, size: str) -> PromptCache | None:
    """The folder that --prompt-cache names, if it does.

    Raises:
        InputError: it cannot be one, or the size is none.
    """
    if folder is None:
        return None
    from quantlab.checkpoint.byte_sizes import bytes_of
    from quantlab.generation.prompt_cache import PromptCache

    return PromptCache(folder, bytes_of(size, "--prompt-cache-size"))
