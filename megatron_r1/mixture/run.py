"""Mixture stage: ShardSet (+ influence scores) -> the shares of the token budget the trainer reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_r1.artifacts.base import Artifact, Workspace
from megatron_r1.artifacts.influence import InfluenceTable
from megatron_r1.artifacts.mixture import MIXTURE_FILE, Mixture, load_mixture
from megatron_r1.data.shards import ShardSet
from megatron_r1.mixture.config import MixtureConfig
from megatron_r1.mixture.solve import solve
from megatron_r1.mixture.weights import Bounds, distance, natural, share, uniform
from megatron_r1.utils import io
from megatron_r1.utils.errors import ConfigError
from megatron_r1.utils.logging import get_logger

CAP_TOLERANCE = 1e-9
log = get_logger(__name__)


def run(config: MixtureConfig, inputs: Mapping[str, Any], work: Workspace) -> Artifact:
    """Compute the weights and write `mixture.json`.

    Raises ConfigError when floors or caps cannot be met, DataError when nothing is left to gain.
    """
    shards = ShardSet.open(inputs["shards"])
    tokens, missing = mixed_sources(config, {name: shards.split(name, "train").n_tokens for name in shards.sources})
    previous = inputs.get("previous")
    mixture = mix(
        config, tokens, missing, inputs.get("influence"), load_mixture(previous) if previous is not None else None
    )
    for name, weight in sorted(mixture.weights.items(), key=lambda item: -item[1]):
        passes = f", {mixture.epochs[name]:.2f} epochs" if mixture.epochs else ""
        log.info(
            "mixture %-20s %6.2f %% (natural %5.2f %%%s)%s",
            name,
            100 * weight,
            100 * mixture.natural[name],
            passes,
            _remark(mixture, name),
        )
    io.atomic_write_json(work.path / MIXTURE_FILE, mixture.plain())
    return work.complete(
        {"method": mixture.method, "weights": mixture.weights, "clipped": mixture.clipped, "harmful": mixture.harmful}
    )


def _remark(mixture: Mixture, name: str) -> str:
    if name in mixture.harmful:
        return "  known to harm"
    if name in mixture.kept_out:
        return "  kept out as harmful before"
    if name in mixture.clipped:
        return "  clipped"
    return "  capped" if name in mixture.capped else ""


def mixed_sources(config: MixtureConfig, available: Mapping[str, int]) -> tuple[dict[str, int], list[str]]:
    """Sources to mix with their training tokens, and those the recipe names which do not exist.

    Raises ConfigError when none is left.
    """
    named = config.sources or (list(config.weights) if config.weights else list(available))
    tokens = {name: available[name] for name in named if available.get(name, 0) > 0}
    missing = sorted(name for name in named if name not in tokens)
    if config.method == "explicit" and config.weights is not None:
        missing = [name for name in missing if config.weights[name] > 0]
    if missing:
        log.warning(
            "mixture: the shards hold no training tokens of %s; the others are mixed without", ", ".join(missing)
        )
    if not tokens:
        raise ConfigError(
            expected="at least one source with training tokens",
            found=f"none of {', '.join(named) or 'no sources at all'}",
            fix=f"name sources the shards hold ({', '.join(sorted(available)) or 'none'})",
        )
    return tokens, missing


def mix(
    config: MixtureConfig,
    tokens: Mapping[str, int],
    missing: list[str],
    influence: Artifact | None,
    previous: Mixture | None,
) -> Mixture:
    """The mixture of the sources in `tokens` (source -> training tokens)."""
    known: dict[str, Any] = {}
    if config.method == "influence":
        if influence is None:
            raise ConfigError(expected="an influence artifact", found="none", fix="give the mixture's inputs.influence")
        banned = [] if previous is None else [*previous.harmful, *previous.kept_out]
        solution = solve(config, InfluenceTable.open(influence), tokens, config.seed or 0, banned)
        weights = solution.weights
        known = {
            "intervals": solution.intervals,
            "rho": solution.rho,
            "rho_intervals": solution.rho_intervals,
            "rho_capability": solution.rho_capability,
            "clipped": solution.clipped,
            "harmful": solution.harmful,
            "kept_out": solution.kept_out,
            "confidence": config.confidence,
            "normalise": config.normalise,
            "influence_sha256": influence.fingerprint,
        }
    else:
        base = {
            "uniform": uniform(list(tokens)),
            "natural": natural(tokens),
            "explicit": {name: (config.weights or {}).get(name, 0.0) for name in tokens},
        }
        weights = share(base[config.method], Bounds.of(tokens, 0.0, set(), config.budget, config.max_epochs))
    caps = Bounds.of(tokens, 0.0, set(), config.budget, config.max_epochs).high
    return Mixture(
        method=config.method,
        weights=weights,
        natural=natural(tokens),
        uniform=uniform(list(tokens)),
        tokens=dict(tokens),
        missing=missing,
        floor=config.floor if config.method == "influence" else 0.0,
        budget=None if config.budget is None else int(config.budget),
        epochs={}
        if config.budget is None
        else {name: weight * config.budget / tokens[name] for name, weight in weights.items()},
        capped=[
            name for name in tokens if config.max_epochs is not None and weights[name] >= caps[name] - CAP_TOLERANCE
        ],
        change=None if previous is None else distance(weights, previous.weights),
        **known,
    )
