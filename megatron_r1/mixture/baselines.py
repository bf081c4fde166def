"""Shares by every method that is not influence: what each is compared with, recorded alike."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_r1.artifacts.base import Artifact
from megatron_r1.artifacts.checkpoint import CheckpointSet
from megatron_r1.artifacts.mixture import GroupDRO, PerplexityRecord, load_mixture
from megatron_r1.data.shards import ShardSet
from megatron_r1.mixture.config import MixtureConfig, PerplexityConfig, RandomConfig, RegMixConfig
from megatron_r1.mixture.perplexity import kept_tokens, resampled
from megatron_r1.mixture.proxies import read_proxies, require_trained_here
from megatron_r1.mixture.regmix import choose
from megatron_r1.mixture.sampling import draw
from megatron_r1.mixture.weights import Bounds, natural, share, uniform
from megatron_r1.utils.errors import ArtifactError, ConfigError
from megatron_r1.utils.seeding import generator
from megatron_r1.utils.statistics import interval

REGMIX = "RegMix (arXiv 2407.01492)"


@dataclass(frozen=True)
class Base:
    """Relative shares a method asks for, before caps, and the fields of the record that say where they come from."""

    shares: dict[str, float]
    known: dict[str, Any] = field(default_factory=dict)


def baseline(config: MixtureConfig, pool: Mapping[str, int], inputs: Mapping[str, Any], empty: Collection[str] = ()) -> tuple[dict[str, float], dict[str, Any]]:
    """(weights, fields of the record) of a method that does not follow influence. `pool`: source -> training tokens;
    `empty`: sources of which no document is left, which get nothing.

    Raises what the method's inputs make it raise; ConfigError when the caps leave too little room.
    """
    bounds = Bounds.of(pool, 0.0, set(empty), config.budget, config.max_epochs)
    found = _METHODS[config.method](config, pool, inputs, bounds)
    return share(found.shares, bounds), found.known


def _stated(config: MixtureConfig, pool: Mapping[str, int], inputs: Mapping[str, Any], bounds: Bounds) -> Base:
    stated = config.stated or {}
    return Base({name: stated.get(name, 0.0) for name in pool})


def _random(config: MixtureConfig, pool: Mapping[str, int], inputs: Mapping[str, Any], bounds: Bounds) -> Base:
    settings = config.random or RandomConfig(index=0)
    rng = generator(config.seed or 0, "random mixture", settings.index)
    rows, strengths = draw(rng, natural(pool), settings, bounds, 1)
    return Base(
        dict(zip(pool, rows[0].tolist())),
        {"strength": float(strengths[0]), "origin": f"random mixture {settings.index} of seed {config.seed or 0}, drawn as in {REGMIX}"},
    )


def _without(config: MixtureConfig, pool: Mapping[str, int], inputs: Mapping[str, Any], bounds: Bounds) -> Base:
    left_out, given = config.without or "", inputs.get("base")
    if left_out not in pool:
        raise ConfigError(
            expected=f"a source of the mixture to leave out ({', '.join(pool)})", found=repr(left_out), fix="correct `without`"
        )
    before = natural(pool) if given is None else load_mixture(given).weights
    unknown = sorted(name for name, weight in before.items() if weight > 0 and name not in pool)
    if unknown:
        raise ConfigError(
            expected=f"a base mixture over the sources of the shards ({', '.join(pool)})", found=f"shares of {', '.join(unknown)}",
            fix="make the base from the same corpus step",
        )
    rest = {name: before.get(name, 0.0) for name in pool if name != left_out}
    if not sum(rest.values()) > 0:
        raise ConfigError(
            expected=f"a share for at least one source besides {left_out}", found="one source has everything", fix="leave one out of two sources or more"
        )
    known = {"without": left_out, "base": {name: before.get(name, 0.0) for name in pool}}
    origin = f"{'natural shares' if given is None else given.name} without {left_out}, the others in proportion"
    return Base({**rest, left_out: 0.0}, {**known, "origin": origin})


def _regmix(config: MixtureConfig, pool: Mapping[str, int], inputs: Mapping[str, Any], bounds: Bounds) -> Base:
    settings = config.regmix or RegMixConfig()
    proxies = read_proxies(_listed(inputs.get("proxies")), inputs["shards"], list(pool))
    chosen = choose(settings, proxies, natural(pool), bounds, config.seed or 0, config.confidence, config.bootstrap)
    known: dict[str, Any] = {"regression": chosen.regression, "notes": chosen.notes}
    if chosen.intervals is not None:
        known |= {"intervals": chosen.intervals, "interval_covers": ["proxy runs"], "confidence": config.confidence}
    return Base(chosen.weights, {**known, "origin": f"{REGMIX}, {settings.fit} fit of {len(proxies.names)} proxies"})


def _doremi(config: MixtureConfig, pool: Mapping[str, int], inputs: Mapping[str, Any], bounds: Bounds) -> Base:
    checkpoints = CheckpointSet.open(_listed(inputs.get("proxies"))[0])
    trained, name = checkpoints.manifest, checkpoints.artifact.name
    if trained.group_dro is None:
        raise ArtifactError(
            expected=f"{name} to be trained with objective group_dro", found=f"objective {trained.objective}",
            fix="set objective: group_dro and inputs.reference on that step",
        )
    require_trained_here(checkpoints, inputs["shards"], list(pool))
    absent = sorted(set(pool) - set(trained.group_dro.weights))
    if absent:
        raise ArtifactError(
            expected="domain weights of every source of the mixture", found=f"none of {', '.join(absent)} in {name}",
            fix="train on all sources (sources: uniform, as Algorithm 1 does), or name the others under `sources`",
        )
    record = GroupDRO(
        proxy=name, reference=trained.group_dro.reference, steps=trained.group_dro.updates, step_size=trained.group_dro.step_size,
        smoothing=trained.group_dro.smoothing,
    )  # fmt: skip
    notes = [] if trained.group_dro.updates else [f"{name} never updated its domain weights: they are uniform"]
    origin = f"DoReMi (arXiv 2305.10429, Algorithm 1), mean over {record.steps} updates of {name}"
    return Base({source: trained.group_dro.weights[source] for source in pool}, {"group_dro": record, "origin": origin, "notes": notes})


def _perplexity(config: MixtureConfig, pool: Mapping[str, int], inputs: Mapping[str, Any], bounds: Bounds) -> Base:
    from megatron_r1.mixture.reading import read  # needs torch, which no other method does

    settings = config.perplexity or PerplexityConfig()
    checkpoints = CheckpointSet.open(inputs["checkpoint"])
    samples = read(settings, ShardSet.open(inputs["shards"]), checkpoints, list(pool), config.seed or 0)
    tokens = {name: float(count) for name, count in pool.items()}
    kept, edges = kept_tokens(settings, tokens, samples)
    draws = resampled(settings, tokens, samples, config.bootstrap, config.seed or 0)
    record = PerplexityRecord(
        model=checkpoints.artifact.name, keep=settings.keep, band=settings.band,
        low=None if settings.band == "low" else edges[0], high=None if settings.band == "high" else edges[1],
        documents={name: len(sample.loss) for name, sample in samples.items()},
        loss={name: float((sample.loss * sample.read).sum() / sample.read.sum()) for name, sample in samples.items()},
        kept={name: kept[name] * sum(tokens.values()) / tokens[name] for name in pool},
    )  # fmt: skip
    return Base(kept, {
        "perplexity": record,
        "intervals": {name: interval(draws[:, j], config.confidence) for j, name in enumerate(pool)},
        "interval_covers": ["documents read"], "confidence": config.confidence,
        "origin": f"{settings.band} perplexity under {checkpoints.artifact.name} (as arXiv 2309.04564 and 2405.20541 prune documents)",
    })  # fmt: skip


def _listed(value: Artifact | list[Artifact] | None) -> list[Artifact]:
    return value if isinstance(value, list) else [] if value is None else [value]


_METHODS = {
    "uniform": lambda config, pool, inputs, bounds: Base(uniform(list(pool))),
    "natural": lambda config, pool, inputs, bounds: Base(natural(pool)),
    "explicit": _stated,
    "published": _stated,
    "random": _random,
    "without": _without,
    "regmix": _regmix,
    "doremi": _doremi,
    "perplexity": _perplexity,
}
