"""lm-eval's standard tasks on our engines: `python -m quantlab.evaluation.lm_eval_model run --model quantlab
--model_args pretrained=MODEL ...`.

The command is lm-eval's own, with one more model. From Python, `lm_eval.simple_evaluate(model=QuantlabLM(MODEL), ...)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from quantlab.checkpoint import load_tokenizer
from quantlab.errors import InputError, missing_extra
from quantlab.evaluation.evaluate import continuation, token_losses
from quantlab.evaluation.scorers import open_scorer
from quantlab.generation.generator import complete
from quantlab.generation.sampling import SamplingParams

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError:
    raise missing_extra("lm-eval", "eval") from None

MAX_TOKENS = 256  # of an answer whose task sets no limit


@register_model("quantlab")
class QuantlabLM(LM):
    """A model of ours as lm-eval sees one.

    Args:
        pretrained: folder, GGUF file or hub id.
        engine: "auto", "native" or "torch".
        activations: "f32" or "int8" (native engine).
        kv: element type of the cache; "f32" with float activations, else "f16".
        threads: by default one a core.
        max_length: of a sequence in tokens; by default the model's own, but no more than 4096.
        batch_size: lm-eval's; sequences are computed one after the other whatever it says.
        max_batch_size: likewise.
        device: likewise; the processor computes.

    Raises:
        InputError: the model cannot be loaded.
    """

    def __init__(
        self,
        pretrained: str,
        engine: str = "auto",
        activations: str = "f32",
        kv: str | None = None,
        threads: int | None = None,
        max_length: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        self._tokenizer = load_tokenizer(pretrained)
        self._scorer = open_scorer(
            pretrained, engine, None, threads, activations=activations, kv=kv, longest=max_length
        )
        self.max_length = self._scorer.engine.context
        starts = sorted(self._tokenizer.eos) if self._tokenizer.bos is None else [self._tokenizer.bos]
        if not starts:
            raise InputError(f"{pretrained}: its tokenizer has neither start nor end token to put before a text")
        self._start = starts[0]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """ln p of each continuation behind its context, and whether greedy decoding gives it."""
        results = []
        for request in _shown(requests):
            context, text = request.args
            ids, start = self._pair(context, text)
            losses, greedy = token_losses(*self._cut(ids, start), self._scorer)
            result = -float(losses.sum()), bool(greedy.all())
            self.cache_hook.add_partial("loglikelihood", request.args, result)
            results.append(result)
        return results

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """ln p of each text, every token behind as much text as fits."""
        results = []
        for request in _shown(requests):
            ids = self._tokenizer.encode(request.args[0], add_special_tokens=False)
            windows = rolling_windows(ids, self._start, self.max_length)
            result = sum(-float(token_losses(*window, self._scorer)[0].sum()) for window in windows)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
            results.append(result)
        return results

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """What follows each context, up to a stop string, an end token or a number of tokens."""
        results = []
        for request in _shown(requests):
            context, settings = request.args
            limit = int(settings.get("max_gen_toks", MAX_TOKENS))
            result = complete(
                self._scorer.engine,
                self._tokenizer,
                self._fitting(context, limit),
                max_tokens=limit,
                params=_sampling(settings),
                stop=_stops(settings.get("until")),
            ).text
            self.cache_hook.add_partial("generate_until", request.args, result)
            results.append(result)
        return results

    @property
    def tokenizer_name(self) -> str:
        """For the names of caches."""
        return "quantlab"

    def _pair(self, context: str, text: str) -> tuple[list[int], int]:
        if context:
            return continuation(context, context + text, self._tokenizer)
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        return [self._start, *ids], 1

    def _cut(self, ids: list[int], start: int) -> tuple[list[int], int]:
        """The last tokens that the model holds; nothing is asked of the very last one."""
        dropped = max(0, len(ids) - (self.max_length + 1))
        return ids[dropped:], max(1, start - dropped)

    def _fitting(self, context: str, limit: int) -> str:
        """The end of a context too long to leave room for an answer."""
        room = max(1, self.max_length - limit - 1)
        ids = self._tokenizer.encode(context, add_special_tokens=False)
        return context if len(ids) <= room else self._tokenizer.decode(ids[-room:])


def rolling_windows(ids: Sequence[int], start: int, longest: int) -> Iterator[tuple[list[int], int]]:
    """Windows (ids, first scored place) that score each token once: `longest` at a time, each window as long as that
    allows, the first one behind the start token.
    """
    done = 0
    while done < len(ids):
        count = min(len(ids) - done, longest)
        end = done + count
        window = [start, *ids[:end]][-(longest + 1) :]
        yield window, len(window) - count
        done = end


def _sampling(settings: dict[str, Any]) -> SamplingParams:
    """Greedy unless the task asks to sample, then by its temperature, top_p and top_k alone."""
    if not settings.get("do_sample", float(settings.get("temperature") or 0) > 0):
        return SamplingParams(temperature=0)
    return SamplingParams(
        temperature=float(settings.get("temperature") or 1),
        top_k=int(settings.get("top_k") or 0),
        top_p=float(settings.get("top_p") or 1),
        min_p=0,
        seed=int(settings.get("seed") or 0),
    )


def _stops(until: str | Sequence[str] | None) -> tuple[str, ...]:
    found = (until,) if isinstance(until, str) else tuple(until or ())
    return tuple(text for text in found if text)


def _shown(requests: Sequence[Instance]) -> Iterator[Instance]:
    """One after the other, behind lm-eval's kind of progress bar."""
    from tqdm import tqdm

    yield from tqdm(requests, desc="quantlab", disable=None)


def main() -> None:
    """lm-eval's command line, which knows the model `quantlab` too."""
    import lm_eval.models  # noqa: F401 lists its own, which it does only as long as nothing else is listed
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
