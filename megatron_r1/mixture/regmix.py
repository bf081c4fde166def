"""RegMix (arXiv 2407.01492): losses of small trainings on random mixtures -> a regression -> the mixture it likes best.

Legend: n proxies, k sources, C capabilities, N candidates, R bootstrap replicates. Losses are fitted in their logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from megatron_r1.artifacts.mixture import CapabilityFit, Regression
from megatron_r1.mixture.config import RegMixConfig
from megatron_r1.mixture.proxies import Proxies
from megatron_r1.mixture.sampling import draw
from megatron_r1.mixture.weights import Bounds
from megatron_r1.utils.errors import ArtifactError, EnvironmentProblem
from megatron_r1.utils.seeding import derive_seed, generator
from megatron_r1.utils.statistics import interval, spearman

JOINT = "joint"
PENALTIES = np.geomspace(1e-6, 1e2, 33)
"""Ridge penalties tried, in units of the mean squared deviation of the shares times n."""
FOLDS = 5
"""Parts the proxies are cut into to tell how well trees foretell a proxy they have not seen."""


class Fit(Protocol):
    """A fitted regression of one capability."""

    def predict(self, shares: np.ndarray) -> np.ndarray:
        """Log loss [m] of shares [m, k]."""
        ...


@dataclass(frozen=True)
class Ridge:
    """log loss = level + (shares - centre) @ slopes. Shares sum to 1, so only differences of slopes mean anything."""

    slopes: np.ndarray  # [k]
    centre: np.ndarray  # [k]
    level: float
    penalty: float  # relative, one of PENALTIES

    def predict(self, shares: np.ndarray) -> np.ndarray:
        """See Fit."""
        return self.level + (shares - self.centre) @ self.slopes

    @classmethod
    def fit(cls, shares: np.ndarray, target: np.ndarray, penalty: float | None = None) -> Ridge:
        """Least squares with a squared penalty; by default the one with the least leave-one-out error (PRESS, closed form).

        Residual i of a fit without proxy i is e_i / (1 - h_ii), h = 1/n + U s^2 / (s^2 + penalty) U^T.
        """
        n, k = shares.shape
        centre, level = shares.mean(axis=0), float(target.mean())
        left, sizes, right = np.linalg.svd(shares - centre, full_matrices=False)
        scale = float((sizes**2).sum()) / k or 1.0
        along = left.T @ (target - level)

        def error(relative: float) -> float:
            kept = sizes**2 / (sizes**2 + relative * scale)
            residual = target - level - left @ (kept * along)
            leverage = 1 / n + (left**2 * kept).sum(axis=1)
            return float(((residual / np.maximum(1 - leverage, 1e-9)) ** 2).mean())

        chosen = min(PENALTIES, key=error) if penalty is None else penalty
        return cls(right.T @ (sizes / (sizes**2 + chosen * scale) * along), centre, level, float(chosen))


class Trees:
    """LightGBM: 1000 rounds at a rate of 0.01, as in the paper's code, without its early stopping. Raises EnvironmentProblem where the package is missing."""

    def __init__(self, shares: np.ndarray, target: np.ndarray, seed: int) -> None:
        lightgbm = _lightgbm()
        settings = {
            "objective": "regression", "learning_rate": 1e-2, "seed": seed % 2**31, "num_threads": 1, "deterministic": True, "verbose": -1,
            "min_data_in_leaf": min(20, max(len(shares) // 5, 2)),
        }  # fmt: skip
        self.model: Any = lightgbm.train(settings, lightgbm.Dataset(shares, target), num_boost_round=1000)

    def predict(self, shares: np.ndarray) -> np.ndarray:
        """See Fit."""
        return np.asarray(self.model.predict(shares), np.float64)


def _lightgbm() -> Any:
    try:
        import lightgbm
    except ImportError as error:
        raise EnvironmentProblem(
            expected="the lightgbm package, because regmix.fit is lightgbm", found=str(error), fix="pip install lightgbm, or set regmix.fit: linear"
        ) from error
    return lightgbm


@dataclass(frozen=True)
class Chosen:
    """The mixture, what it rests on, and its intervals (none with trees)."""

    weights: dict[str, float]
    regression: Regression
    intervals: dict[str, tuple[float, float]] | None
    notes: list[str]


def choose(
    config: RegMixConfig, proxies: Proxies, natural: Mapping[str, float], bounds: Bounds, seed: int, confidence: float, bootstrap: int
) -> Chosen:
    """Fit, foretell `candidates` random mixtures within the caps, and average the `best` of them.

    The goal is the mean over capabilities of the loss relative to the proxies' (geometric) mean, so that none decides by the
    size of its loss. As a sum of exponentials it can have its minimum inside the simplex though every fit is linear. Raises
    ArtifactError when every proxy ended with the same loss.
    """
    logs = np.log(proxies.losses)  # [n, C]
    if (logs.std(axis=0) == 0).any():
        flat = [name for name, spread in zip(proxies.capabilities, logs.std(axis=0)) if spread == 0]
        raise ArtifactError(
            expected="proxies whose losses differ", found=f"the same loss of every proxy for {', '.join(flat)}",
            fix="train the proxies on different mixtures (method random with index: \"{n}\") and for more steps",
        )
    columns = range(len(proxies.capabilities))
    seeds = [derive_seed(seed, "regmix trees", name) for name in proxies.capabilities]
    fitted: list[Fit] = [_fit(config, proxies.shares, logs[:, c], seeds[c]) for c in columns]
    held_out = np.stack([_held_out(config, proxies.shares, logs[:, c], seeds[c], seed) for c in columns], axis=1)
    rows, _ = draw(generator(seed, "regmix candidates"), natural, config.sampling, bounds, config.candidates)
    foretold = np.stack([fit.predict(rows) for fit in fitted], axis=1)  # [N, C]
    weights = best_mean(rows, joint(foretold - logs.mean(axis=0)), config.best)
    ridges = [fit for fit in fitted if isinstance(fit, Ridge)]
    regression = Regression(
        fit=config.fit, proxies=proxies.names, tokens=proxies.tokens,
        penalty={name: fit.penalty for name, fit in zip(proxies.capabilities, ridges)},
        slopes={
            name: dict(zip(proxies.sources, (fit.slopes - fit.slopes.mean()).tolist())) for name, fit in zip(proxies.capabilities, ridges)
        },
        capabilities=quality(proxies, logs, held_out, np.array([fit.predict(weights[None])[0] for fit in fitted])),
        candidates=len(rows), best=config.best,
    )  # fmt: skip
    notes = [
        f"{name}: proxies left out of the fit are foretold no better than by their mean, so these weights rest on noise"
        for name, found in regression.capabilities.items()
        if found.error >= found.spread
    ]
    intervals = None
    if config.fit == "linear":
        draws = _bootstrap(proxies.shares, logs, [fit.penalty for fit in ridges], rows, config.best, seed, bootstrap)
        intervals = {name: interval(draws[:, j], confidence) for j, name in enumerate(proxies.sources)}
    return Chosen(dict(zip(proxies.sources, weights.tolist())), regression, intervals, notes)


def joint(logs: np.ndarray) -> np.ndarray:
    """Mean over capabilities of the relative loss, from its logarithm [..., C]: [...]."""
    return np.exp(logs).mean(axis=-1)


def best_mean(rows: np.ndarray, foretold: np.ndarray, best: int) -> np.ndarray:
    """Mean of the `best` rows [N, k] with the lowest foretold loss [N]."""
    return rows[np.argpartition(foretold, best - 1)[:best]].mean(axis=0)


def _fit(config: RegMixConfig, shares: np.ndarray, target: np.ndarray, seed: int) -> Fit:
    return Ridge.fit(shares, target) if config.fit == "linear" else Trees(shares, target, seed)


def _held_out(config: RegMixConfig, shares: np.ndarray, target: np.ndarray, tree_seed: int, seed: int) -> np.ndarray:
    """Log loss of every proxy [n], foretold without it: one left out at a time (its penalty chosen anew), or fifths for trees."""
    n = len(target)
    parts = np.arange(n) if config.fit == "linear" else generator(seed, "regmix folds").permutation(n) % min(FOLDS, n)
    found = np.empty(n)
    for part in np.unique(parts):
        out = parts == part
        found[out] = _fit(config, shares[~out], target[~out], tree_seed).predict(shares[out])
    return found


def quality(proxies: Proxies, logs: np.ndarray, held_out: np.ndarray, at: np.ndarray) -> dict[str, CapabilityFit]:
    """Per capability, and of the joint goal: errors and rank correlation on held-out proxies, and what is foretold for the
    weights, whose log losses are `at` [C]."""
    centre = logs.mean(axis=0)
    sides = {name: (np.exp(logs[:, c]), np.exp(held_out[:, c]), math.exp(at[c])) for c, name in enumerate(proxies.capabilities)}
    sides[JOINT] = (joint(logs - centre), joint(held_out - centre), float(joint(at - centre)))
    return {
        name: CapabilityFit(
            error=float(np.sqrt(((real - guess) ** 2).mean())), spread=float(real.std()), spearman=spearman(guess, real),
            foretold=there, lowest=float(real.min()),
        )
        for name, (real, guess, there) in sides.items()
    }  # fmt: skip


def _bootstrap(
    shares: np.ndarray, logs: np.ndarray, penalties: list[float], rows: np.ndarray, best: int, seed: int, replicates: int
) -> np.ndarray:
    """Weights [R, k] from proxies drawn with replacement, candidates and penalties held fixed."""
    rng, n = generator(seed, "regmix bootstrap"), len(shares)
    found = []
    for _ in range(replicates):
        index = rng.integers(0, n, n)
        drawn = logs[index]
        fits = [Ridge.fit(shares[index], drawn[:, c], penalty) for c, penalty in enumerate(penalties)]
        foretold = np.stack([fit.predict(rows) for fit in fits], axis=1)
        found.append(best_mean(rows, joint(foretold - drawn.mean(axis=0)), best))
    return np.array(found)
