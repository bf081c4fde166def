"""What an influence table says about each source, and the weights that follow from it (Eq. 6, or tilted natural shares)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import NoReturn

import numpy as np

from megatron_r1.artifacts.influence import InfluenceTable
from megatron_r1.mixture.config import KLConfig, MixtureConfig
from megatron_r1.mixture.shrink import FEWEST, Shrunk, shrink, variances
from megatron_r1.mixture.weights import (
    Bounds,
    boxed,
    divergence,
    effective_sources,
    log_tilted,
    natural,
    share,
    tilt,
)
from megatron_r1.utils.errors import ArtifactError, ConfigError, DataError
from megatron_r1.utils.statistics import interval

TAUS = np.geomspace(1e-3, 1e4, 141)
"""Multiples of the spread of rho that tau is looked for among, before it is narrowed down."""


@dataclass(frozen=True)
class Measured:
    """rho of every source and how sure it is. Legend: k sources in the order of `rho`, R replicates."""

    rho: dict[str, float]
    rho_intervals: dict[str, tuple[float, float]]
    rho_capability: dict[str, dict[str, float]]
    draws: np.ndarray  # [R, k], of the rho that weights follow
    clipped: list[str]
    harmful: list[str]
    kept_out: list[str]
    shrunk: Shrunk | None
    notes: list[str]

    @property
    def used(self) -> dict[str, float]:
        """The rho that weights follow: after shrinkage where there is any."""
        return dict(self.rho) if self.shrunk is None else dict(zip(self.rho, self.shrunk.values.tolist()))


@dataclass(frozen=True)
class Solution:
    """Weights with their intervals and what they came from."""

    weights: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    measured: Measured
    tau: float | None = None

    @property
    def rho(self) -> dict[str, float]:
        """Benefit per token of every source."""
        return self.measured.rho

    @property
    def clipped(self) -> list[str]:
        """Sources whose rho is not positive."""
        return self.measured.clipped

    @property
    def harmful(self) -> list[str]:
        """Sources whose interval of rho lies wholly below 0."""
        return self.measured.harmful


def benefit_per_token(table: InfluenceTable, source: str, normalise: str) -> np.ndarray:
    """rho of one source for every capability, [C]: benefit of its scored documents / their predicted tokens.

    Eq. 6 is rho_g = (1/N_g) sum_i I_joint(x_i) s_i, I of a document's *mean* token loss and s_i its length. With I of
    the summed loss (what tables hold) s_i cancels. N_g counts the scored documents only, else large corpora would
    vanish.
    """
    sums = table.benefits(source, normalise).sum(axis=0)  # type: ignore[arg-type]
    return sums / table.scores(source).n_tokens.sum()


def measure(
    config: MixtureConfig, table: InfluenceTable, names: Collection[str], seed: int, banned: Collection[str] = ()
) -> Measured:
    """rho of the sources `names` (the plain mean over capabilities, Eq. 5), their intervals, and who harms.

    `banned`: sources an earlier mixture gave nothing because they harm; they stay out unless `config.readmit` lets them
    in. A source of a single scored document has no interval worth the name, so it is never called harmful.
    """
    absent = sorted(set(names) - set(table.sources))
    if absent:
        raise ArtifactError(
            expected="influence scores for every source of the mixture",
            found=f"none for {', '.join(absent)}",
            fix="score these sources, or list the others under the mixture's `sources`",
        )
    names = list(names)
    per_capability = {name: benefit_per_token(table, name, config.normalise) for name in names}
    rho = {name: float(values.mean()) for name, values in per_capability.items()}
    wide = {name: table.resample(name, config.bootstrap, seed, config.normalise, config.confidence) for name in names}
    intervals = {name: interval(values.mean(axis=1), config.confidence) for name, values in wide.items()}
    single = [name for name in names if table.scores(name).units()[1] < 2]
    notes = [f"{name}: a single scored document, so its interval says nothing" for name in single]
    draws = np.stack([values.mean(axis=1) for values in wide.values()], axis=1)
    pulled = None
    if config.shrink == "pooled":
        if len(names) < FEWEST:
            notes.append(f"shrinkage needs {FEWEST} sources; with {len(names)} every rho stays as it is")
        pulled = _shrink(config, table, rho, seed, single)
        draws = pulled.applied(draws)
    harmful = [name for name in names if rho[name] <= 0 and intervals[name][1] < 0 and name not in single]
    measured = Measured(
        rho,
        intervals,
        {name: dict(zip(table.record.capabilities, values.tolist())) for name, values in per_capability.items()},
        draws,
        [],
        harmful,
        [name for name in names if name in banned and name not in harmful and not readmitted(config, wide[name])],
        pulled,
        notes,
    )
    return replace(measured, clipped=[name for name, value in measured.used.items() if value <= 0])


def _shrink(
    config: MixtureConfig, table: InfluenceTable, rho: Mapping[str, float], seed: int, single: Collection[str]
) -> Shrunk:
    means = np.array(list(rho.values()))
    if len(rho) < FEWEST:
        return shrink(means, np.zeros(len(rho)))
    plain = [table.resample(name, config.bootstrap, seed, config.normalise, None).mean(axis=1) for name in rho]
    noise = variances(np.stack(plain, axis=1))
    for k, name in enumerate(rho):
        if name in single:  # nothing is known of its noise: as noisy as the noisiest
            noise[k] = noise.max()
    return shrink(means, noise)


def solve(
    config: MixtureConfig,
    table: InfluenceTable,
    tokens: Mapping[str, int],
    seed: int,
    banned: Collection[str] = (),
    empty: Collection[str] = (),
) -> Solution:
    """Weights of the sources in `tokens` (source -> training tokens) by the methods influence and kl.

    `banned`: see `measure`. `empty`: sources of which no document is left; they get nothing.
    """
    measured = measure(config, table, tokens, seed, banned)
    out = {*measured.harmful, *measured.kept_out} if config.harmful == "zero" else set()
    bounds = Bounds.of(tokens, config.floor, {*out, *empty}, config.budget, config.max_epochs)
    if config.method != "kl":
        weights = share({name: max(value, 0.0) for name, value in measured.used.items()}, bounds)
        with np.errstate(divide="ignore"):
            logs = np.log(np.maximum(measured.draws, 0.0))
        return Solution(weights, weight_intervals(list(tokens), logs, bounds, config.confidence), measured)
    shares = natural(tokens)
    tau = choose_tau(config.kl or KLConfig(tau=1.0), shares, measured.used, bounds)
    weights = tilt(shares, measured.used, tau, bounds)
    logs = log_tilted(shares, measured.draws, tau)
    return Solution(weights, weight_intervals(list(tokens), logs, bounds, config.confidence), measured, tau)


def choose_tau(config: KLConfig, shares: Mapping[str, float], rho: Mapping[str, float], bounds: Bounds) -> float:
    """tau as given, or the smallest one that leaves the wanted number of effective sources or keeps within the divergence.

    The divergence falls as tau grows; the number of effective sources mostly rises, so the first crossing from below is
    taken. Raises ConfigError when no tau does it.
    """
    if config.tau is not None:
        return config.tau
    unit = float(np.ptp(list(rho.values()))) or 1.0

    def enough(tau: float) -> bool:
        weights = tilt(shares, rho, tau, bounds)
        if config.divergence is not None:
            return divergence(weights, shares) <= config.divergence * (1 + 1e-9)
        return effective_sources(weights) >= (config.effective_sources or 1.0) * (1 - 1e-9)

    first = next((i for i, factor in enumerate(TAUS) if enough(float(factor) * unit)), None)
    if first is None:
        _unreachable(config, shares, rho, bounds, unit)
    if first == 0:
        return float(TAUS[0]) * unit
    low, high = float(TAUS[first - 1]) * unit, float(TAUS[first]) * unit
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _unreachable(
    config: KLConfig, shares: Mapping[str, float], rho: Mapping[str, float], bounds: Bounds, unit: float
) -> NoReturn:
    every = [tilt(shares, rho, float(factor) * unit, bounds) for factor in TAUS]
    if config.divergence is not None:
        least = min(divergence(weights, shares) for weights in every)
        raise ConfigError(
            expected=f"weights within {config.divergence:g} nats of the natural shares",
            found=f"at least {least:.3g} nats, which floors, caps and sources without a share make necessary",
            fix=f"set kl.divergence to {least:.3g} or more, or loosen floor and max_epochs",
        )
    most = max(effective_sources(weights) for weights in every)
    raise ConfigError(
        expected=f"a tau that leaves {config.effective_sources:g} effective sources",
        found=f"at most {most:.3g} (natural shares have {effective_sources(shares):.3g})",
        fix=f"set kl.effective_sources to {most:.3g} or less, or use method uniform",
    )


def readmitted(config: MixtureConfig, draws: np.ndarray) -> bool:
    """Whether a source that was kept out may come back, by the bootstrap of its rho per capability, [R, C]."""
    if config.readmit == "anew":
        return True
    judged = draws if config.readmit == "every" else draws.mean(axis=1, keepdims=True)
    return all(interval(judged[:, k], config.confidence)[0] > 0 for k in range(judged.shape[1]))


def weight_intervals(
    names: list[str], logs: np.ndarray, bounds: Bounds, confidence: float
) -> dict[str, tuple[float, float]]:
    """Intervals of the weights: the rule applied to every bootstrap replicate (logs of what is shared by, [R, k]).

    Who is harmful, tau and the factors of shrinkage are held fixed. Replicates in which no weights exist (no source
    positive, or caps too tight) are left out; with fewer than half left, DataError.
    """
    low, high = (np.array([side[name] for name in names]) for side in (bounds.low, bounds.high))
    found = boxed(logs, low, high)
    solved = found[~np.isnan(found).any(axis=1)]
    if 2 * len(solved) < len(found):
        raise DataError(
            expected="weights in at least half of the bootstrap replicates",
            found=f"in {len(solved)} of {len(found)}",
            fix="the benefit of every source is within noise of 0: score more documents, or use method kl, natural or "
            "uniform",
        )
    return {name: interval(solved[:, k], confidence) for k, name in enumerate(names)}
