"""Slow and straightforward quantizers in double precision, to hold the compiled ones against."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from quantlab import native

BLOCK = 32


def correlated_moment(columns: int, seed: int = 0, tokens: int = 2000) -> np.ndarray:
    """Inputs of very different sizes that depend on each other."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(columns, columns)) / np.sqrt(columns) + 0.5 * np.eye(columns)
    inputs = rng.normal(size=(tokens, columns)) @ mixing * np.exp(rng.normal(size=columns))
    moment = (inputs.T @ inputs / tokens).astype(np.float32)
    return np.ascontiguousarray((moment + moment.T) / 2)


def gaussian(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(0, 0.02, (rows, columns))).astype(np.float32)


def opened(format: str, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """d and m, float64 [rows, blocks], and codes as d multiplies them, [rows, columns]."""
    header = 4 if format in ("q4_1", "q5_1") else 2
    parts = blocks.reshape(len(blocks), -1, native._core.row_bytes(format, BLOCK)).copy()
    scales = parts[..., :header].copy().view(np.float16).astype(np.float64)
    parts[..., :header] = 0
    parts[..., :2] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
    codes = native.dequantize(format, parts.reshape(len(blocks), -1)).astype(np.float64)
    return scales[..., 0], scales[..., 1] if header == 4 else np.zeros_like(scales[..., 0]), codes


def limits_of(format: str, levels: int) -> tuple[int, int, bool]:
    """The least and the most code that d multiplies, and whether there is an m."""
    if format in ("q4_1", "q5_1"):
        return 0, levels - 1, True
    if format == "q8_0":
        return -((levels - 1) // 2), (levels - 1) // 2, False
    return -(levels // 2), levels - 1 - levels // 2, False


def weighted_error(weights: np.ndarray, decoded: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """e H e^T of each row."""
    errors = weights.astype(np.float64) - decoded
    return np.einsum("ri,ij,rj->r", errors, moment.astype(np.float64), errors)


def least_affine_error(weights: np.ndarray, importance: np.ndarray, levels: int) -> float:
    """The least weighted squared error of a block for any real (d, m): all ways of cutting the sorted weights into as
    many runs as there are codes, each solved by least squares.
    """
    order = np.argsort(weights)
    w, u = weights[order].astype(np.float64), importance[order].astype(np.float64)
    best = np.inf
    for cuts in combinations(range(len(w) + 1), levels - 1):
        codes = np.searchsorted(np.array(cuts), np.arange(len(w)), side="right")
        design = np.stack([codes, np.ones_like(codes)], axis=1) * np.sqrt(u)[:, None]
        residual = np.linalg.lstsq(design, w * np.sqrt(u), rcond=None)[0]
        best = min(best, float(((w * np.sqrt(u) - design @ residual) ** 2).sum()))
    return best


def gptq_codes(
    weights: np.ndarray,
    moment: np.ndarray,
    damping: float,
    order: np.ndarray,
    scales: tuple[np.ndarray, np.ndarray],
    limits: tuple[int, int],
) -> np.ndarray:
    """GPTQ as its paper has it (arXiv 2210.17323), by the Cholesky factor of the inverse, with scales given."""
    d, m = scales
    n = len(order)
    damped = moment.astype(np.float64)[np.ix_(order, order)] + damping * np.eye(n)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    rest = weights.astype(np.float64)[:, order].copy()
    codes = np.empty_like(rest)
    for j, column in enumerate(order):
        step, offset = d[:, column // BLOCK], m[:, column // BLOCK]
        safe = np.where(step == 0, 1, step)
        codes[:, j] = np.where(step == 0, 0, np.clip(np.round((rest[:, j] - offset) / safe), *limits))
        error = (rest[:, j] - (step * codes[:, j] + offset)) / upper[j, j]
        rest[:, j:] -= error[:, None] * upper[j, j:]
    stored = np.empty_like(codes)
    stored[:, order] = codes
    return stored


def best_scales_error(weights: np.ndarray, codes: np.ndarray, moment: np.ndarray, *, has_offset: bool) -> np.ndarray:
    """The least weighted error of each row for these codes and any real scales: joint least squares over all blocks."""
    root = np.linalg.cholesky(moment.astype(np.float64)).T
    errors = []
    for w, q in zip(weights.astype(np.float64), codes, strict=True):
        columns = []
        for start in range(0, len(w), BLOCK):
            for values in (q, np.ones_like(q)) if has_offset else (q,):
                column = np.zeros_like(q)
                column[start : start + BLOCK] = values[start : start + BLOCK]
                columns.append(column)
        design = root @ np.stack(columns, axis=1)
        solution = np.linalg.lstsq(design, root @ w, rcond=None)[0]
        errors.append(((root @ w - design @ solution) ** 2).sum())
    return np.array(errors)
