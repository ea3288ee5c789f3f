"""Logits, histories and settings of the sampler, and its rule as a plain full sort."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from quantlab.generation.sampling import SamplingParams

OFF = {"repetition_penalty": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
LOGITS = np.array([2.0, -1.0, 0.5, 3.0, -4.0, 1.25, 0.0, 2.75, -2.5, 1.75, -0.5, 0.25], dtype=np.float32)


def params(**changes: float) -> SamplingParams:
    """Every step off but those that are named."""
    return SamplingParams(**{**OFF, **changes})


def expected_probabilities(logits: np.ndarray, history: list[int], params: SamplingParams) -> np.ndarray:
    """By transformers' processors, in the order in which `generate` runs them, in float64."""
    steps = LogitsProcessorList()
    if params.logit_bias:
        steps.append(SequenceBiasLogitsProcessor([[[token], bias] for token, bias in params.logit_bias.items()]))
    if params.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    steps.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        steps.append(MinPLogitsWarper(params.min_p))
    scores = steps(torch.tensor([history or [0]]), torch.from_numpy(logits.astype(np.float64))[None])
    return scores.softmax(1)[0].numpy()


# Against a plain implementation: float64, a full sort, numpy's own generator.


def plain_scores(logits: np.ndarray, history: list[int], params: SamplingParams, prompt: int) -> np.ndarray:
    """float64 [vocabulary] after bias and penalties."""
    scores = logits.astype(np.float64)
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    start = len(history) - params.penalty_window if params.penalty_window else 0
    recent = list(enumerate(history))[max(start, 0) :]
    for token in {token for _, token in recent}:
        factor = params.repetition_penalty
        scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
    for token, times in Counter(token for index, token in recent if index >= prompt).items():
        scores[token] -= params.presence_penalty + times * params.frequency_penalty
    return scores


def plain_kept(scores: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
    """The ids that can come, by falling score, and their weights."""
    ids = np.argsort(-scores, kind="stable")[: params.top_k or None]
    weights = np.exp((scores[ids] - scores[ids[0]]) / params.temperature)
    nucleus = int(np.searchsorted(np.cumsum(weights), params.top_p * weights.sum())) + 1
    kept = min(nucleus if params.top_p < 1 else len(ids), int((weights >= params.min_p).sum()))
    return ids[:kept], weights[:kept]


def plain_sample(logits: np.ndarray, history: list[int], params: SamplingParams, position: int, prompt: int = 0) -> int:
    scores = plain_scores(logits, history, params, prompt)
    if params.temperature == 0:
        return int(scores.argmax())
    ids, weights = plain_kept(scores, params)
    cumulative = np.cumsum(weights)
    share = np.random.Generator(np.random.Philox(key=params.seed, counter=position)).random()
    return int(ids[np.searchsorted(cumulative, share * cumulative[-1], side="right")])


def noise(vocabulary: int, seed: int, spread: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, spread, vocabulary).astype(np.float32)
