"""Model Stock (arXiv 2403.19522): how far to go from the base to the models' mean, from the angle between them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from quantlab.merging.methods.blocks import runs
from quantlab.merging.methods.inner_products import Doubles, GramSurvey, NoSurvey, matrix_of, row_grams
from quantlab.merging.methods.method import Survey
from quantlab.merging.methods.sums import weighted_sum


def model_stock(
    base: torch.Tensor, tensors: Sequence[torch.Tensor], *, filter_wise: bool = False, survey: Doubles | None
) -> torch.Tensor:
    """t * mean of the models + (1 - t) * base, with t = T cos / (1 + (T - 1) cos) for T models.

    cos is the mean cosine between pairs of differences from the base: of whole tensors, as in the paper, or of each row
    if `filter_wise`. A pair has the cosine 0 if one of its differences is 0, and t is 0 where cos is not positive: the
    formula's geometry knows no such models, and it has a pole at -1 / (T - 1).
    """
    if not filter_wise:
        assert survey is not None
        t, count = float(share_of_mean(survey)), len(tensors)
        return weighted_sum([base, *tensors], [1 - t, *[t / count] * count])
    origin, matrices = matrix_of(base), [matrix_of(tensor) for tensor in tensors]
    shares = share_of_mean(row_grams(base, tensors))[:, None] / len(tensors)
    out = np.empty_like(origin)
    columns = out.shape[1]
    for first, last in runs(out.size, columns):
        here = slice(first // max(1, columns), last // max(1, columns))
        total = np.zeros((here.stop - here.start, columns))
        for matrix in matrices:
            total += matrix[here] - origin[here]
        total *= shares[here]
        total += origin[here]
        out[here] = total
    return torch.from_numpy(out.reshape(base.shape))


def model_stock_survey(filter_wise: bool) -> Survey:
    """The inner products of the differences, but where rows bring their own."""
    return NoSurvey() if filter_wise else GramSurvey(from_base=True)


def share_of_mean(gram: Doubles) -> Doubles:
    """t from inner products [models, models, ...]: an array [...]."""
    count = len(gram)
    squared = np.stack([gram[i, i] for i in range(count)])
    cosines = []
    for i in range(count):
        for j in range(i + 1, count):
            lengths = np.sqrt(squared[i] * squared[j])
            cosines.append(np.divide(gram[i, j], lengths, out=np.zeros_like(lengths), where=lengths > 0))
    total = np.sort(np.stack(cosines), axis=0).sum(axis=0)  # sorted: the order of the models does not show
    cosine = np.clip(total / len(cosines), 0, 1)
    return count * cosine / (1 + (count - 1) * cosine)
