"""From benefit per token to shares of the budget: Eq. 6 with the floor and cap the paper leaves open."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from megatron_r1.utils.errors import ConfigError, DataError

NEGLIGIBLE = 1e-15
"""Bases below this fraction of the largest count as 0."""


@dataclass(frozen=True)
class Bounds:
    """What every share has to respect, source by source."""

    low: dict[str, float]
    high: dict[str, float]

    @classmethod
    def of(
        cls, tokens: Mapping[str, int], floor: float, zero: set[str], budget: int | None, max_epochs: float | None
    ) -> Bounds:
        """Floor and cap of every source. A cap below the floor wins: no source can give more than it holds.

        tokens: training tokens of each source; zero: sources that get nothing. Raises ConfigError when the floors
        exceed 1.
        """
        high = {
            name: 1.0 if max_epochs is None or budget is None else min(max_epochs * count / budget, 1.0)
            for name, count in tokens.items()
        }
        low = {name: min(floor, high[name]) for name in tokens}
        for name in zero:
            low[name] = high[name] = 0.0
        if math.fsum(low.values()) > 1:
            raise ConfigError(
                expected="floors that sum to at most 1",
                found=f"{floor:g} for each of {len(tokens) - len(zero)} sources",
                fix=f"lower `floor` to at most {1 / max(len(tokens) - len(zero), 1):.4g}",
            )
        return cls(low, high)


def share(base: Mapping[str, float], bounds: Bounds) -> dict[str, float]:
    """Shares clip(lambda * base, low, high) with the lambda that makes them sum to 1.

    Without active bounds this is base / sum(base). Where a bound binds, what is taken or given is shared by the others
    in proportion to their base. Raises ConfigError naming the binding sources when the caps leave too little room,
    DataError when no base is positive or one is not a number.
    """
    names = list(base)
    values = np.array([base[name] for name in names], np.float64)
    if not np.isfinite(values).all() or (values < 0).any():
        bad = {name: base[name] for name in names if not (math.isfinite(base[name]) and base[name] >= 0)}
        raise DataError(
            expected="finite, non-negative numbers to share by", found=f"{bad}", fix="make the influence artifact again"
        )
    if values.max() > 0:
        values = values / values.max()
        values[values < NEGLIGIBLE] = 0.0
    low = np.array([bounds.low[name] for name in names])
    high = np.array([bounds.high[name] for name in names])
    wanted = (values > 0) & (high > 0)
    grows = wanted & (high > low)
    if not wanted.any() and not math.isclose(float(low.sum()), 1.0, abs_tol=1e-12):
        raise DataError(
            expected="at least one source with a positive benefit per token",
            found="none above 0",
            fix="the model gains nothing more from these sources: stop here, change the sources, or use method "
            "natural or uniform",
        )
    room = float(np.where(grows, high, low).sum())
    if room < 1 - 1e-12:
        _too_little_room(names, low, high, wanted, bounds)
    scale = _scale(values, low, high, grows) if grows.any() else 0.0
    weights = np.clip(scale * values, low, high)
    return dict(zip(names, _exact(weights, low, high).tolist()))


def _too_little_room(
    names: list[str], low: np.ndarray, high: np.ndarray, wanted: np.ndarray, bounds: Bounds
) -> NoReturn:
    """Say how much of the budget the caps leave room for, and whose caps they are. Raises ConfigError."""
    room = float(np.where(wanted & (high > low), high, low).sum())
    binding = sorted((name for name, can in zip(names, wanted) if can), key=lambda name: bounds.high[name])
    raise ConfigError(
        expected="caps that leave room for the whole budget",
        found=f"room for {100 * room:.1f} % of it; binding: "
        + ", ".join(f"{name} (at most {100 * bounds.high[name]:.2f} %)" for name in binding),
        fix="raise max_epochs, lower the budget, or add data to the binding sources",
    )


def _scale(values: np.ndarray, low: np.ndarray, high: np.ndarray, grows: np.ndarray) -> float:
    """lambda. The sum of clip(lambda v, low, high) is piecewise linear: find the piece that holds 1 and solve."""
    edges = np.unique(np.concatenate([low[grows] / values[grows], high[grows] / values[grows]]))
    total = np.array([np.clip(edge * values, low, high).sum() for edge in edges])
    k = int(np.searchsorted(total, 1.0))
    if k == 0:
        return float(edges[0])
    if k == len(edges):
        return float(edges[-1])
    middle = (edges[k - 1] + edges[k]) / 2
    free = (middle * values > low) & (middle * values < high)
    slope = float(values[free].sum())
    return float(edges[k - 1] + (1.0 - total[k - 1]) / slope) if slope > 0 else float(edges[k])


def _exact(weights: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Take up the last rounding error where there is room for it."""
    rest = 1.0 - math.fsum(weights)
    room = np.where(rest > 0, high - weights, weights - low)
    k = int(room.argmax())
    weights = weights.copy()
    weights[k] += rest
    return weights


def uniform(names: list[str]) -> dict[str, float]:
    """Equal shares."""
    return {name: 1.0 / len(names) for name in names}


def natural(tokens: Mapping[str, int]) -> dict[str, float]:
    """Shares proportional to training tokens."""
    total = sum(tokens.values())
    return {name: count / total for name, count in tokens.items()}


def distance(a: Mapping[str, float], b: Mapping[str, float]) -> float:
    """Total variation distance of two mixtures: the share of tokens that moves to other sources, 0..1."""
    return 0.5 * math.fsum(abs(a.get(name, 0.0) - b.get(name, 0.0)) for name in {*a, *b})


def boxed(log_base: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """clip(exp(log_base + nu), low, high) with the nu of each row that makes it sum to 1.

    log_base: [R, k], -inf for sources that only get their `low` [k]; NaN rows where no nu exists. The sum is monotone in
    nu with corners where a source leaves a bound, so the corners around 1 are found and the piece between them is solved
    exactly: what clamping one source after another would arrive at, without the iteration and without underflow.
    """
    with np.errstate(divide="ignore"):
        log_low, log_high = np.log(low), np.log(high)
    grows = np.isfinite(log_base) & (high > low)  # [R, k]
    base = np.where(grows, log_base, 0.0)

    def at(nu: np.ndarray) -> np.ndarray:
        """Shares at nu [R, m]: [R, m, k]."""
        raised = np.minimum(base[:, None, :] + nu[..., None], log_high)
        return np.where(grows[:, None, :], np.maximum(np.exp(raised), low), low)

    corners = np.concatenate([np.where(grows, log_low - base, -np.inf), np.where(grows, log_high - base, -np.inf)], axis=1)
    corners = np.sort(corners, axis=1)  # [R, 2k]
    finite = np.where(np.isfinite(corners), corners, np.inf).min(axis=1, keepdims=True)
    corners = np.maximum(corners, np.where(np.isfinite(finite), finite - 800.0, 0.0))  # exp(-800) is 0
    total = at(corners).sum(axis=2)  # [R, 2k]
    last = (total < 1.0).sum(axis=1)  # number of corners below: the piece that holds 1 ends at this one
    rows = np.arange(len(log_base))
    upper = corners[rows, np.minimum(last, corners.shape[1] - 1)]
    lower = corners[rows, np.maximum(last - 1, 0)]
    middle = (lower + upper) / 2
    raised = base + middle[:, None]
    free = grows & (raised > log_low) & (raised < log_high)
    fixed = np.where(free, 0.0, at(middle[:, None])[:, 0]).sum(axis=1)
    top = np.where(free, base, -np.inf).max(axis=1)
    some = np.isfinite(top)
    with np.errstate(divide="ignore", invalid="ignore"):
        mass = np.log(np.exp(np.where(free, base - np.where(some, top, 0.0)[:, None], -np.inf)).sum(axis=1)) + top
        solved = np.log(np.maximum(1.0 - fixed, 0.0)) - mass
    nu = np.where(some, np.clip(solved, lower, upper), upper)
    found = at(nu[:, None])[:, 0]
    found[np.abs(found.sum(axis=1) - 1.0) > 1e-9] = np.nan
    return found


def tilt(shares: Mapping[str, float], rho: Mapping[str, float], tau: float, bounds: Bounds) -> dict[str, float]:
    """The weights that maximise sum w rho - tau KL(w || shares) within bounds: clip(nu * shares * exp(rho / tau)).

    Exact: the Lagrange condition of every source not at a bound is rho - tau log(w / shares) = const. Raises DataError
    for numbers that are none, ConfigError when the caps leave too little room.
    """
    names = list(shares)
    _require_finite({name: rho[name] for name in names})
    low = np.array([bounds.low[name] for name in names])
    high = np.array([bounds.high[name] for name in names])
    found = boxed(log_tilted(shares, np.array([[rho[name] for name in names]]), tau), low, high)[0]
    if np.isnan(found).any():
        _too_little_room(names, low, high, np.array([shares[name] > 0 for name in names]), bounds)
    return dict(zip(names, _exact(found, low, high).tolist()))


def log_tilted(shares: Mapping[str, float], rho: np.ndarray, tau: float) -> np.ndarray:
    """log(shares * exp(rho / tau)) for rho [R, k], the largest of each row brought to 0."""
    with np.errstate(divide="ignore"):
        found = np.log(np.array(list(shares.values()))) + rho / tau
    return found - found.max(axis=1, keepdims=True)


def _require_finite(rho: Mapping[str, float]) -> None:
    bad = {name: value for name, value in rho.items() if not math.isfinite(value)}
    if bad:
        raise DataError(expected="finite benefits per token", found=f"{bad}", fix="make the influence artifact again")


def divergence(weights: Mapping[str, float], shares: Mapping[str, float]) -> float:
    """KL(weights || shares) in nats: 0 for equal mixtures."""
    total = math.fsum(w * math.log(w / shares[name]) for name, w in weights.items() if w > 0)
    return max(total, 0.0)


def effective_sources(weights: Mapping[str, float]) -> float:
    """exp(entropy): the number of sources when all weigh alike, 1 when one has all."""
    return math.exp(-math.fsum(w * math.log(w) for w in weights.values() if w > 0))
