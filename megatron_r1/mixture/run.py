"""Mixture stage: ShardSet (+ influence scores) -> the shares of the token budget the trainer reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_r1.artifacts.base import Artifact, Parent, Workspace
from megatron_r1.artifacts.influence import InfluenceTable
from megatron_r1.artifacts.influence_join import open_influence
from megatron_r1.artifacts.mixture import (
    MIXTURE_FILE,
    KeptDocuments,
    Mixture,
    Redundancy,
    load_mixture,
    write_kept,
)
from megatron_r1.data.shards import ShardSet
from megatron_r1.mixture.baselines import baseline
from megatron_r1.mixture.config import MEASURED, MixtureConfig
from megatron_r1.mixture.keep import keep
from megatron_r1.mixture.redundancy import count_once
from megatron_r1.mixture.solve import Measured, measure, solve
from megatron_r1.mixture.stop import decide
from megatron_r1.mixture.tables import TABLES
from megatron_r1.mixture.weights import (
    Bounds,
    distance,
    divergence,
    effective_sources,
    natural,
    uniform,
)
from megatron_r1.utils import io
from megatron_r1.utils.errors import ArtifactError, ConfigError
from megatron_r1.utils.logging import get_logger, is_main_rank

CAP_TOLERANCE = 1e-9
log = get_logger(__name__)


def run(config: MixtureConfig, inputs: Mapping[str, Any], work: Workspace) -> Artifact | None:
    """Compute the weights and write `mixture.json`, and `kept/<source>.npy` where documents are filtered.

    Under torchrun every rank may call it: method perplexity reads documents with all of them, for the others rank 0 works alone.
    Those that are not rank 0 return None. Raises ConfigError when floors or caps cannot be met, DataError when nothing is left to gain.
    """
    if not is_main_rank() and not config.needs_model:
        return None
    shards = ShardSet.open(inputs["shards"])
    tokens, missing = mixed_sources(config, {name: shards.split(name, "train").n_tokens for name in shards.sources})
    previous = inputs.get("previous")
    looked = look(config, shards, list(tokens), inputs["shards"], inputs.get("influence"))
    mixture = mix(config, tokens, missing, looked, load_mixture(previous) if previous is not None else None, inputs)
    if not is_main_rank():
        return None
    _log(mixture)
    for source, numbers in looked.numbers.items():
        write_kept(work.path, source, numbers)
    io.atomic_write_json(work.path / MIXTURE_FILE, mixture.plain())
    return work.complete(
        {"method": mixture.method, "weights": mixture.weights, "clipped": mixture.clipped, "harmful": mixture.harmful}
    )


def _log(mixture: Mixture) -> None:
    if mixture.interval_covers:
        log.info("mixture: intervals cover the choice of %s, nothing else", " and ".join(mixture.interval_covers))
    for name, weight in sorted(mixture.weights.items(), key=lambda item: -item[1]):
        passes = f", {mixture.epochs[name]:.2f} epochs" if mixture.epochs else ""
        span = "" if mixture.intervals is None else " [{:.2f}, {:.2f}]".format(*(100 * e for e in mixture.intervals[name]))
        log.info(
            "mixture %-20s %6.2f %%%s (natural %5.2f %%%s)%s",
            name,
            100 * weight,
            span,
            100 * mixture.natural[name],
            passes,
            _remark(mixture, name),
        )
    for note in mixture.notes:
        log.warning("mixture: %s", note)
    if mixture.kept is not None:
        kept = mixture.kept
        log.info(
            "mixture: %d of %d scored documents pass the rule %s; %d documents with %d tokens are trained on%s",
            sum(kept.passed.values()),
            sum(kept.scored.values()),
            kept.rule,
            sum(kept.documents.values()),
            sum(kept.tokens.values()),
            " (a random part of the same size instead)" if kept.control else "",
        )
    if mixture.regression is not None:
        for name, fit in mixture.regression.capabilities.items():
            rank = "not defined" if fit.spearman is None else f"{fit.spearman:.2f}"
            log.info(
                "mixture: regression of %s: rank correlation on proxies left out %s, error %.4f (spread %.4f); foretold %.4f, best proxy %.4f",
                name, rank, fit.error, fit.spread, fit.foretold, fit.lowest,
            )  # fmt: skip
    if mixture.decision is not None:
        log.info("mixture: another round? %s", mixture.decision.follows)


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
    stated = config.stated
    named = config.sources or (list(stated) if stated else list(available))
    tokens = {name: available[name] for name in named if available.get(name, 0) > 0}
    missing = sorted(name for name in named if name not in tokens)
    if stated is not None:
        missing = [name for name in missing if stated[name] > 0]
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


@dataclass(frozen=True)
class Looked:
    """What was read of an influence artifact, before any weight is made."""

    table: InfluenceTable | None = None
    """Near duplicates counted once where the settings ask for it."""
    fingerprint: str | None = None
    redundancy: Redundancy | None = None
    numbers: dict[str, np.ndarray] = field(default_factory=dict)
    """source -> numbers of the documents trained on, where documents are filtered."""
    kept: KeptDocuments | None = None
    pool: dict[str, int] | None = None
    """source -> tokens that shares and passes are reckoned with, where documents are filtered."""


def look(
    config: MixtureConfig, shards: ShardSet, names: list[str], artifact: Artifact, influence: Artifact | list[Artifact] | None
) -> Looked:
    """Read the scores; count duplicates once and choose documents as asked. Raises ArtifactError for other shards."""
    if influence is None:
        return Looked()
    table, fingerprint = open_influence(influence)
    absent = sorted(set(names) - set(table.sources))
    splits = {name: shards.split(name, "train") for name in names if name not in absent}
    if config.redundancy is None and config.filter.rule == "none":
        return Looked(table, fingerprint)
    if absent:
        raise ArtifactError(
            expected="influence scores for every source of the mixture",
            found=f"none for {', '.join(absent)}",
            fix="score these sources, or list the others under the mixture's `sources`",
        )
    for one in [influence] if isinstance(influence, Artifact) else influence:
        _same_shards(artifact, one)
    numbers, kept, pool = keep(config, table, splits, config.seed or 0) if config.filter.rule != "none" else ({}, None, None)
    counted, found = count_once(config.redundancy, table, splits) if config.redundancy is not None else (table, None)
    return Looked(counted, fingerprint, found, numbers, kept, pool)


def _same_shards(shards: Artifact, influence: Artifact) -> None:
    """Document numbers mean the same documents only in the shards that were scored. Raises ArtifactError."""
    parent = influence.manifest.parents.get("shards")
    if isinstance(parent, Parent) and parent.fingerprint != shards.fingerprint:
        raise ArtifactError(
            expected=f"influence measured on the shards {shards.fingerprint[:8]} that are mixed",
            found=f"measured on {parent.fingerprint[:8]} ({parent.name})",
            fix="point the mixture and its influence at the same corpus step",
        )


def mix(
    config: MixtureConfig,
    tokens: Mapping[str, int],
    missing: list[str],
    looked: Looked,
    previous: Mixture | None,
    inputs: Mapping[str, Any],
) -> Mixture:
    """The mixture of the sources in `tokens` (source -> training tokens). `inputs`: what baselines are made from."""
    pool = dict(tokens) if looked.pool is None else looked.pool
    empty = [] if looked.kept is None else looked.kept.emptied
    banned = [] if previous is None else [*previous.harmful, *previous.kept_out]
    known: dict[str, Any] = {}
    measured: Measured | None = None
    if config.method in MEASURED:
        if looked.table is None:
            raise ConfigError(expected="an influence artifact", found="none", fix="give the mixture's inputs.influence")
        solution = solve(config, looked.table, pool, config.seed or 0, banned, empty)
        weights, measured = solution.weights, solution.measured
        known = {"intervals": solution.intervals, "tau": solution.tau, "kept_out": measured.kept_out}
    else:
        weights, known = baseline(config, pool, inputs, empty)
        if looked.table is not None and set(pool) <= set(looked.table.sources):
            measured = measure(config, looked.table, pool, config.seed or 0)
        elif looked.table is not None:
            unscored = ", ".join(sorted(set(pool) - set(looked.table.sources)))
            known["notes"] = [*known.get("notes", []), f"what the influence measured is not recorded: it has no scores of {unscored}"]
    if measured is not None and looked.table is not None:
        known = {**_measurements(config, looked, measured), **known, "notes": [*measured.notes, *known.get("notes", [])]}
        known["decision"] = decide(config, looked.table, weights, natural(pool), previous)
    known.setdefault("origin", TABLES[config.table].origin if config.table is not None else config.origin)
    caps = Bounds.of(pool, 0.0, set(empty), config.budget, config.max_epochs).high
    return Mixture(
        method=config.method,
        weights=weights,
        natural=natural(pool),
        uniform=uniform(list(pool)),
        tokens=pool,
        missing=missing,
        floor=config.floor if config.method in MEASURED else 0.0,
        budget=None if config.budget is None else int(config.budget),
        epochs={}
        if config.budget is None
        else {name: weight * config.budget / pool[name] if pool[name] else 0.0 for name, weight in weights.items()},
        capped=[
            name
            for name in pool
            if config.max_epochs is not None and name not in empty and weights[name] >= caps[name] - CAP_TOLERANCE
        ],
        change=None if previous is None else distance(weights, previous.weights),
        table=config.table,
        effective_sources=effective_sources(weights),
        divergence=divergence(weights, natural(pool)),
        kept=looked.kept,
        influence_sha256=looked.fingerprint,
        **known,
    )


def _measurements(config: MixtureConfig, looked: Looked, measured: Measured) -> dict[str, Any]:
    """What the influence says, recorded alike for every method that was given one."""
    shrunk = measured.shrunk
    return {
        "interval_covers": [] if looked.table is None else list(looked.table.record.interval_covers),
        "rho": measured.rho,
        "rho_intervals": measured.rho_intervals,
        "rho_capability": measured.rho_capability,
        "clipped": measured.clipped,
        "harmful": measured.harmful,
        "confidence": config.confidence,
        "normalise": config.normalise,
        "notes": measured.notes,
        "redundancy": looked.redundancy,
        "shrunk": {} if shrunk is None else measured.used,
        "shrinkage": {} if shrunk is None else dict(zip(measured.rho, shrunk.factors.tolist())),
        "pooled": None if shrunk is None else shrunk.pooled,
    }
