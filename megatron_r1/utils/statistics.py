"""Small statistics without scipy: ranks, reliability, Student's t, Holm's correction, the correction of small bootstraps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist

import numpy as np

LARGE = 200
"""From this many degrees of freedom on, Student's t is taken from its expansion about the normal distribution."""


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, ties get their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - counts + ends - 1) / 2.0)[inverse]


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Rank correlation; None when it is undefined (fewer than 3 values, or all equal on one side)."""
    if len(a) < 3:
        return None
    ra, rb = ranks(np.asarray(a)), ranks(np.asarray(b))
    ra, rb = ra - ra.mean(), rb - rb.mean()
    scale = float(np.sqrt((ra**2).sum() * (rb**2).sum()))
    return float((ra * rb).sum()) / scale if scale > 0 else None


def spearman_brown(r: float | None, factor: float) -> float | None:
    """Reliability of a measurement `factor` times as long as one whose reliability is r: f r / (1 + (f - 1) r).

    None when r is None or so negative that the formula has no meaning.
    """
    if r is None or 1 + (factor - 1) * r <= 0:
        return None
    return factor * r / (1 + (factor - 1) * r)


def length_for(r: float | None, wanted: float) -> float | None:
    """How many times as long a measurement of reliability r has to be for `wanted` (Spearman-Brown prophecy).

    None when r is not positive: no length would be enough as far as these data say.
    """
    return None if r is None or r <= 0 else wanted * max(1 - r, 0.0) / (r * (1 - wanted))


def auc(first: np.ndarray, second: np.ndarray, confidence: float = 0.95) -> tuple[float, float, float]:
    """Area under the ROC curve (chance that a value of `first` [n] is above one of `second` [m], ties half) and its DeLong interval,
    cut at 0 and 1. Both must hold a value."""
    n, m = len(first), len(second)
    joint = ranks(np.concatenate([first, second]))
    # Rank among all less rank among its own: how many of the other kind lie below.
    below, above = (joint[:n] - ranks(first)) / m, (joint[n:] - ranks(second)) / n
    value = float(below.mean())
    variance = (float(below.var(ddof=1)) / n if n > 1 else 0.25) + (float(above.var(ddof=1)) / m if m > 1 else 0.25)
    half = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(variance)
    return value, max(value - half, 0.0), min(value + half, 1.0)


def interval(draws: np.ndarray, confidence: float) -> tuple[float, float]:
    """Percentile interval of bootstrap draws."""
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def t_cdf(t: float, df: int) -> float:
    """P(T <= t) of Student's t: the finite series for whole degrees of freedom (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    if df > LARGE:
        # Inverse of the expansion in `t_quantile`, to first order: good to 1e-6 there.
        return NormalDist().cdf(t * (1 - 1 / (4 * df)) / math.sqrt(1 + t * t / (2 * df)))
    angle = math.atan2(t, math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    if df % 2:
        term, total = cosine, 0.0
        for k in range(1, (df - 1) // 2 + 1):
            total += term
            term *= cosine * cosine * (2 * k) / (2 * k + 1)
        middle = 2 / math.pi * (angle + sine * total)
    else:
        term, total = 1.0, 0.0
        for k in range(1, df // 2 + 1):
            total += term
            term *= cosine * cosine * (2 * k - 1) / (2 * k)
        middle = sine * total
    return 0.5 + 0.5 * middle


def t_quantile(p: float, df: int) -> float:
    """t with P(T <= t) = p, for 0 < p < 1 and df >= 1."""
    if p < 0.5:
        return -t_quantile(1 - p, df)
    z = NormalDist().inv_cdf(p)
    if df > LARGE:  # Cornish-Fisher, Abramowitz and Stegun 26.7.5
        return z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
    low, high = 0.0, 1.0
    while t_cdf(high, df) < p and high < 1e12:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, df) < p else (low, middle)
    return (low + high) / 2


def stretch(count: int, confidence: float | None) -> float:
    """Factor on the deviations of a bootstrap over `count` units.

    sqrt(n / (n - 1)) makes its variance unbiased; with a confidence also t_{n-1} / z, so that percentile intervals of few
    units get the width Student's t would give them (Hesterberg 2015, "expanded percentile interval"). 1 for a single
    unit, whose spread is not known.
    """
    if count < 2:
        return 1.0
    unbiased = math.sqrt(count / (count - 1))
    if confidence is None:
        return unbiased
    p = (1 + confidence) / 2
    return unbiased * t_quantile(p, count - 1) / NormalDist().inv_cdf(p)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values: rejecting those below alpha keeps the chance of any false rejection below alpha."""
    adjusted, worst = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda key: (p_values[key], key))):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = worst
    return {name: adjusted[name] for name in p_values}
