"""Eq. 6 over an influence table: rho, who is clipped, who is known to harm, the weights and their intervals."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from megatron_r1.artifacts.influence import InfluenceTable
from megatron_r1.mixture.config import MixtureConfig
from megatron_r1.mixture.weights import Bounds, share
from megatron_r1.utils.errors import ArtifactError, ConfigError, DataError


@dataclass(frozen=True)
class Solution:
    """Weights of method influence and everything they came from."""

    weights: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    rho: dict[str, float]
    rho_intervals: dict[str, tuple[float, float]]
    rho_capability: dict[str, dict[str, float]]
    clipped: list[str]
    harmful: list[str]
    kept_out: list[str]


def benefit_per_token(table: InfluenceTable, source: str, normalise: str) -> np.ndarray:
    """rho of one source for every capability, [C]: benefit of its scored documents / their predicted tokens.

    Eq. 6 is rho_g = (1/N_g) sum_i I_joint(x_i) s_i, I of a document's *mean* token loss and s_i its length. With I of
    the summed loss (what tables hold) s_i cancels. N_g counts the scored documents only, else large corpora would
    vanish.
    """
    sums = table.benefits(source, normalise).sum(axis=0)  # type: ignore[arg-type]
    return sums / table.scores(source).n_tokens.sum()


def solve(
    config: MixtureConfig, table: InfluenceTable, tokens: Mapping[str, int], seed: int, banned: Collection[str] = ()
) -> Solution:
    """Weights of the sources in `tokens` (source -> training tokens).

    The joint rho is the plain mean over capabilities (Eq. 5). `banned`: sources an earlier mixture gave nothing because
    they harm; they stay out unless `config.readmit` lets them in.
    """
    absent = sorted(set(tokens) - set(table.sources))
    if absent:
        raise ArtifactError(
            expected="influence scores for every source of the mixture",
            found=f"none for {', '.join(absent)}",
            fix="score these sources, or list the others under the mixture's `sources`",
        )
    per_capability = {name: benefit_per_token(table, name, config.normalise) for name in tokens}
    rho = {name: float(values.mean()) for name, values in per_capability.items()}
    draws_by_capability = {name: table.resample(name, config.bootstrap, seed, config.normalise) for name in tokens}
    draws = {name: values.mean(axis=1) for name, values in draws_by_capability.items()}
    rho_intervals = {name: interval(values, config.confidence) for name, values in draws.items()}
    clipped = [name for name in tokens if rho[name] <= 0]
    harmful = [name for name in clipped if rho_intervals[name][1] < 0]
    kept_out = [
        name
        for name in tokens
        if name in banned and name not in harmful and not readmitted(config, draws_by_capability[name])
    ]
    zero = {*harmful, *kept_out} if config.harmful == "zero" else set()
    bounds = Bounds.of(tokens, config.floor, zero, config.budget, config.max_epochs)
    weights = share({name: max(value, 0.0) for name, value in rho.items()}, bounds)
    return Solution(
        weights,
        weight_intervals(draws, bounds, config.confidence),
        rho,
        rho_intervals,
        {name: dict(zip(table.record.capabilities, values.tolist())) for name, values in per_capability.items()},
        clipped,
        harmful,
        kept_out,
    )


def readmitted(config: MixtureConfig, draws: np.ndarray) -> bool:
    """Whether a source that was kept out may come back, by the bootstrap of its rho per capability, [R, C]."""
    if config.readmit == "anew":
        return True
    judged = draws if config.readmit == "every" else draws.mean(axis=1, keepdims=True)
    return all(interval(judged[:, k], config.confidence)[0] > 0 for k in range(judged.shape[1]))


def weight_intervals(
    draws: Mapping[str, np.ndarray], bounds: Bounds, confidence: float
) -> dict[str, tuple[float, float]]:
    """Intervals of the weights: the rule applied to every bootstrap replicate of rho (draws: source -> [R]).

    Who is harmful is held fixed. Replicates in which no weights exist (no source positive, or caps too tight) are left
    out; with fewer than half left, DataError.
    """
    names = list(draws)
    stacked = np.maximum(np.stack([draws[name] for name in names], axis=1), 0.0)  # [R, sources]
    solved = []
    for row in stacked:
        try:
            solved.append(list(share(dict(zip(names, row.tolist())), bounds).values()))
        except (ConfigError, DataError):
            continue
    if 2 * len(solved) < len(stacked):
        raise DataError(
            expected="weights in at least half of the bootstrap replicates",
            found=f"in {len(solved)} of {len(stacked)}",
            fix="the benefit of every source is within noise of 0: score more documents, or use method natural or "
            "uniform",
        )
    columns = np.array(solved)
    return {name: interval(columns[:, k], confidence) for k, name in enumerate(names)}


def interval(values: np.ndarray, confidence: float) -> tuple[float, float]:
    """Percentile interval."""
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
