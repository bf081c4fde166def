"""Probe stage: ShardSet -> one held-out probe set per capability.

A probe set stands for a capability (arXiv 2509.24945 v1, section 5.1: D^P_C, D^P_M, D^P_K, never benchmarks). Candidates of every
source pass a chain of sieves: length, duplicates; where the settings ask for them the paper's quality classifier and its language-model
judge's two questions; overlap with training and held-out documents; semantic duplicates. Then they are composed into capabilities.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_r1.artifacts.base import Artifact, Workspace
from megatron_r1.artifacts.probe import PROBE_FILE, CapabilityProbe, ProbeDocument, ProbeSet
from megatron_r1.data.shards import ShardSet
from megatron_r1.parallel.context import initialize
from megatron_r1.probe.config import ProbeConfig
from megatron_r1.probe.judged import Judged, Sieving
from megatron_r1.probe.overlap import stretches
from megatron_r1.probe.scores import Scores
from megatron_r1.probe.sieves import SourceSieve, draw, drop_exact_duplicates, drop_near_duplicates, drop_overlap
from megatron_r1.utils.errors import ConfigError, DataError
from megatron_r1.utils.logging import get_logger, is_main_rank, progress

SPLIT = "probe"
HELD_OUT = ("test", "control")
log = get_logger(__name__)


def run(config: ProbeConfig, inputs: Mapping[str, Any], work: Workspace) -> Artifact | None:
    """Pick the probe windows and write `probe.json`. Scores of models are kept as they are made: a killed run goes on.

    Under torchrun the processes share what a classifier and a judge read; those that are not rank 0 return None. Raises DataError
    when a sieve leaves a source empty or a probe document is found in training, ConfigError when no source of a capability exists in
    the shards or a model's files do not, EnvironmentProblem when its package cannot be had.
    """
    if not is_main_rank() and not config.needs_model:
        return None
    shards = ShardSet.open(inputs["shards"])
    present = _present(config, shards)
    sieves, judged = sift(config, shards, present, work)
    if not is_main_rank():
        return None
    capabilities = {name: _compose(config, name, present[name], sieves) for name in config.capabilities}
    checks = _check_disjoint(shards, capabilities)
    probe = ProbeSet(
        capabilities=capabilities,
        shards=inputs["shards"].fingerprint,
        tokenizer=shards.tokenizer.sha256,
        tokens_per_document=config.tokens_per_document,
        checks=checks,
        judge=judged.judge,
        quality=judged.quality,
        notes=[*_partly_compared(config, shards), *judged.notes],
    ).sealed(shards)
    probe.save(work.path / PROBE_FILE)
    summary = {
        "documents": {name: len(found.documents) for name, found in capabilities.items()},
        "tokens": {
            name: sum(document.n_tokens - 1 for document in found.documents) for name, found in capabilities.items()
        },
        "sha256": probe.sha256,
    }
    if probe.judge is not None:
        summary["judge"] = {check.name: [check.auc, check.verdict] for check in probe.judge.checks}
    return work.complete(summary)


def _present(config: ProbeConfig, shards: ShardSet) -> dict[str, dict[str, float]]:
    """Sources of each capability that the shards hold; the others are named aloud."""
    present = {}
    for name, capability in config.capabilities.items():
        present[name] = {source: share for source, share in capability.sources.items() if source in shards.sources}
        missing = sorted(set(capability.sources) - set(present[name]))
        if missing:
            log.warning("probe %s: the shards hold no %s; the capability is probed without", name, ", ".join(missing))
        if not present[name]:
            raise ConfigError(
                expected=f"at least one source of capability {name!r} among the shards",
                found=f"none of {', '.join(sorted(capability.sources))}; "
                f"the shards hold {', '.join(sorted(shards.sources))}",
                fix=f"name sources the corpus step makes under capabilities.{name}.sources",
            )
    return present


def sift(
    config: ProbeConfig, shards: ShardSet, present: Mapping[str, Mapping[str, float]], work: Workspace
) -> tuple[dict[str, SourceSieve], Judged]:
    """Apply every rule to every source. Collective when a model is run."""
    members: dict[str, list[str]] = {}
    for capability, sources in present.items():
        for source in sources:
            members.setdefault(source, []).append(capability)
    sieves = [draw(config, source, shards.split(source, SPLIT)) for source in sorted(members)]
    drop_exact_duplicates(sieves)
    ctx = initialize(seed=config.seed or 0) if config.needs_model else None
    models = Sieving(config, shards, members, Scores(work.tmp / "scores", ctx), ctx) if ctx is not None else None
    if models is not None:
        models.score(sieves)
    drop_near_duplicates(config, sieves)
    for name, splits in (("overlap with training", ("train",)), ("overlap with held-out", HELD_OUT)):
        body = [shards.split(source, split) for source in shards.sources for split in splits]
        limit = int(config.rules.compare)
        stream = (part for shard in body for part in stretches(shard, config.rules.ngram, limit))
        with progress(f"probe: {name}", sum(min(shard.n_tokens, limit) for shard in body)) as bar:
            drop_overlap(config, sieves, name, stream, bar.advance)
    if models is not None and config.rules.semantic is not None:
        models.deduplicate(config.rules.semantic, sieves)
    if ctx is not None:
        ctx.barrier()  # from here on rank 0 may complete the artifact, which removes the scores that others read
    return {sieve.source: sieve for sieve in sieves}, models.found if models is not None else Judged()


def _partly_compared(config: ProbeConfig, shards: ShardSet) -> list[str]:
    """What the overlap rules did not look at."""
    notes = []
    for source in shards.sources:
        for split in ("train", *HELD_OUT):
            tokens = shards.split(source, split).n_tokens
            if tokens > config.rules.compare:
                notes.append(
                    f"overlap with {source}/{split}: its first {int(config.rules.compare)} of {tokens} tokens compared"
                )
                log.warning("probe: %s", notes[-1])
    return notes


def allocate(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Split `total` documents by `shares`, largest remainders first; each gets one at least when there are enough."""
    whole = sum(shares.values())
    exact = {name: total * share / whole for name, share in shares.items()}
    counts = {name: int(value) for name, value in exact.items()}
    by_rest = sorted(shares, key=lambda name: (counts[name] - exact[name], name))
    for name in by_rest[: total - sum(counts.values())]:
        counts[name] += 1
    for name in [name for name, count in counts.items() if count == 0 and total >= len(shares)]:
        counts[max(counts, key=lambda other: (counts[other], other))] -= 1
        counts[name] = 1
    return counts


def _compose(
    config: ProbeConfig, name: str, shares: Mapping[str, float], sieves: Mapping[str, SourceSieve]
) -> CapabilityProbe:
    documents, short, records = [], {}, []
    for source, count in allocate(config.windows[name], shares).items():
        left = sieves[source]
        if len(left) < count:
            short[source] = count - len(left)
            log.warning("probe %s: %s has %d usable windows, %d were asked for", name, source, len(left), count)
        records += left.records
        ids = left.shard.ids
        documents += [
            ProbeDocument(source=source, split=SPLIT, index=index, id=ids[index], start=start, n_tokens=size)
            for index, start, size in zip(left.index[:count].tolist(), left.start[:count].tolist(), left.size[:count].tolist())
        ]
    log.info("probe %s: %d windows from %s", name, len(documents), ", ".join(shares))
    missing = sorted(set(config.capabilities[name].sources) - set(shares))
    return CapabilityProbe(documents=documents, sieves=records, missing=missing, short=short)


def _check_disjoint(shards: ShardSet, capabilities: Mapping[str, CapabilityProbe]) -> dict[str, int]:
    """Verify what the split promises: no probe document is a training document. Raises DataError."""
    picked: dict[str, set[str]] = {}
    for probe in capabilities.values():
        for document in probe.documents:
            picked.setdefault(document.source, set()).add(document.id)
    collisions = {source: sorted(id for id in shards.split(source, "train").ids if id in ids) for source, ids in picked.items()}
    found = {source: ids for source, ids in collisions.items() if ids}
    if found:
        source, ids = next(iter(found.items()))
        raise DataError(
            expected="probe documents that are not in the training split",
            found=f"{len(ids)} of {source!r} are in both, such as {ids[0]!r}",
            fix="make the shards again: document ids must be unique within a source",
        )
    return {"document ids also in training": 0}
