"""Random mixtures around the natural shares, as RegMix draws them (arXiv 2407.01492, section 3.1, and its code)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from megatron_r1.mixture.config import SamplingConfig
from megatron_r1.mixture.weights import Bounds
from megatron_r1.utils.errors import ConfigError

STRENGTHS = 15
"""Strengths are drawn from this many, spaced evenly in their logarithm (RegMix's code)."""
ROUNDS = 50
"""Times a wanted number of mixtures is drawn before the caps count as too tight."""


def draw(
    rng: np.random.Generator, natural: Mapping[str, float], config: SamplingConfig, bounds: Bounds, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """`count` mixtures [count, k] in the order of `natural`, each row summing to 1, and their strengths [count].

    Dirichlet(strength * natural^temperature / sum). Rows above a cap of `bounds` are drawn again. Raises ConfigError when
    hardly any is within the caps.
    """
    prior = np.array(list(natural.values())) ** config.temperature
    prior /= prior.sum()
    high = np.array([bounds.high[name] for name in natural])
    choices = np.geomspace(config.lowest, config.highest, STRENGTHS)
    found, strengths = np.zeros((0, len(prior))), np.zeros(0)
    for _ in range(ROUNDS):
        strength = rng.choice(choices, size=count)
        # Dirichlet by gammas, in logarithms: with concentrations this small plain gammas underflow to 0/0.
        shape = strength[:, None] * prior
        logs = np.log(rng.gamma(shape + 1)) + np.log(rng.random(shape.shape)) / shape
        rows = np.exp(logs - logs.max(axis=1, keepdims=True))
        rows /= rows.sum(axis=1, keepdims=True)
        rows[rows < config.minimum] = 0.0
        rows /= rows.sum(axis=1, keepdims=True)
        within = (rows <= high + 1e-12).all(axis=1)
        found, strengths = np.concatenate([found, rows[within]]), np.concatenate([strengths, strength[within]])
        if len(found) >= count:
            return found[:count], strengths[:count]
    raise ConfigError(
        expected="caps that random mixtures can keep",
        found=f"{len(found)} of {ROUNDS * count} draws within max_epochs",
        fix="raise max_epochs, lower the budget, or raise the sampling's `lowest` strength",
    )
