"""95 % confidence intervals: Wilson for shares, bootstrap over documents for ratios and for paired differences."""

from __future__ import annotations

import math

import numpy as np

Z95 = 1.959963984540054
_CHUNK = 1 << 22  # resampled indices held at once


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Score interval of a share (Wilson 1927; Brown, Cai, DasGupta 2001, equation 4). n = 0 gives (0, 1): nothing is known."""
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    centre = share + Z95**2 / (2 * n)
    half = Z95 * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n * n))
    scale = 1 + Z95**2 / n
    # At 0 and n the formula gives the bound exactly, up to rounding.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return max(low, 0.0), min(high, 1.0)


def bootstrap_ratio(numerators: np.ndarray, denominators: np.ndarray, draws: int, rng: np.random.Generator) -> tuple[float, float]:
    """Percentile interval of sum(numerators) / sum(denominators) when the units (documents) are drawn with replacement.

    Shapes [n]. With one unit there is no spread to see and the interval is the value itself twice: read n beside it.
    """
    numerators, denominators = np.asarray(numerators, float), np.asarray(denominators, float)
    n = len(numerators)
    if n == 0 or denominators.sum() <= 0:
        raise ValueError(f"expected at least one unit with a positive denominator; found {n} units")
    ratios = []
    per_chunk = max(1, _CHUNK // n)
    for start in range(0, draws, per_chunk):
        picks = rng.integers(0, n, size=(min(per_chunk, draws - start), n))
        below = denominators[picks].sum(1)
        ratios.append(numerators[picks].sum(1)[below > 0] / below[below > 0])
    low, high = np.quantile(np.concatenate(ratios), [0.025, 0.975])
    return float(low), float(high)


def bootstrap_mean(values: np.ndarray, draws: int, rng: np.random.Generator) -> tuple[float, float]:
    """Percentile interval of a mean; values [n]."""
    values = np.asarray(values, float)
    return bootstrap_ratio(values, np.ones_like(values), draws, rng)
