"""Empirical Bayes: noisy benefits drawn towards their common mean by what their noise warrants.

Morris (JASA 78, 1983), the unequal-variance form of the positive-part James-Stein estimator:

    x_g ~ N(theta_g, v_g),  theta_g ~ N(mu, A):   theta_g^ = x_g - B_g (x_g - mu),  B_g = (k - 3)/(k - 1) v_g / (v_g + A)

with A >= 0 and mu estimated from all k sources. Below 4 sources nothing is drawn anywhere: there the estimator does not
beat the means themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FEWEST = 4
ROUNDS = 200


@dataclass(frozen=True)
class Shrunk:
    """values, factors: [k]; factor 0 leaves a value, 1 puts the pooled mean in its place. weight: of each in that mean."""

    values: np.ndarray
    factors: np.ndarray
    weight: np.ndarray
    pooled: float
    between: float  # A

    def applied(self, draws: np.ndarray) -> np.ndarray:
        """The same factors on bootstrap replicates [R, k], each drawn to its own pooled mean."""
        return draws - self.factors * (draws - (draws @ self.weight)[:, None])


def variances(draws: np.ndarray) -> np.ndarray:
    """Variance of each source's own noise [k] from joint replicates [R, k], k >= 3.

    A shift that all sources share (probe windows that make everything look good) moves no source towards or away from
    the pooled mean, so it must not be read as noise to shrink by: replicates are centred first. With independent own
    noise v, centred values have variance (1 - 2/k) v_g + sum(v) / k^2, which is solved for v.
    """
    k = draws.shape[1]
    centred = (draws - draws.mean(axis=1, keepdims=True)).var(axis=0)
    total = centred.sum() * k / (k - 1)
    return np.maximum((centred - total / k**2) / (1 - 2 / k), 0.0)


def shrink(means: np.ndarray, noise: np.ndarray) -> Shrunk:
    """means, noise (variances): [k]."""
    k = len(means)
    if k < FEWEST or not (noise > 0).any():
        even = np.full(k, 1.0 / k)
        return Shrunk(means.copy(), np.zeros(k), even, float(means.mean()), float(means.var()))
    noise = np.maximum(noise, 1e-12 * noise.max())
    between = float(max(means.var(ddof=1) - noise.mean(), 0.0))
    for _ in range(ROUNDS):
        weight = 1.0 / (noise + between)
        pooled = float((weight * means).sum() / weight.sum())
        found = float((weight * (k / (k - 1) * (means - pooled) ** 2 - noise)).sum() / weight.sum())
        if abs(max(found, 0.0) - between) <= 1e-12 * (abs(between) + noise.max()):
            break
        between = max(found, 0.0)
    weight = 1.0 / (noise + between)
    weight /= weight.sum()
    pooled = float(weight @ means)
    factors = (k - 3) / (k - 1) * noise / (noise + between)
    return Shrunk(means - factors * (means - pooled), factors, weight, pooled, between)
