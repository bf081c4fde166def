"""Influence stage: ShardSet + ProbeSet + checkpoints -> benefit of every scored document for every capability."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from megatron_r1.artifacts.base import Artifact, Workspace
from megatron_r1.artifacts.checkpoint import CheckpointSet
from megatron_r1.artifacts.influence import (
    FEW_CHECKPOINTS,
    INFLUENCE_FILE,
    Curvature,
    Direction,
    InfluenceRecord,
    InfluenceTable,
    ScoredCheckpoint,
    column,
)
from megatron_r1.artifacts.probe import ProbeSet, load_probe
from megatron_r1.data.shards import ShardSet
from megatron_r1.influence import access
from megatron_r1.influence.aggregate import JOINT, advice, summarise
from megatron_r1.influence.choice import with_lowest_probe_loss
from megatron_r1.influence.config import InfluenceConfig
from megatron_r1.influence.job import Job, fold_weights, prepare, require_matching, scores_at
from megatron_r1.influence.score import score
from megatron_r1.influence.select import alphas
from megatron_r1.influence.store import ScoreStore, write_table
from megatron_r1.utils import io
from megatron_r1.utils.logging import get_logger

FEW_FOLDS = 4
log = get_logger(__name__)


def run(config: InfluenceConfig, inputs: Mapping[str, Any], work: Workspace) -> Artifact | None:
    """Score documents and write `influence.json` and `scores/<source>.parquet`. Resumable at every partition.

    Every process of a torchrun job may take part (they share the partitions); those that are not rank 0 return None.

    Raises ArtifactError when the inputs do not belong together, ConfigError or DataError when there is nothing to
    score, CheckpointError when the checkpoint has no fp32 weights or lacks the optimizer state the preconditioner
    needs.
    """
    shards, probe, checkpoints = (
        ShardSet.open(inputs["shards"]),
        load_probe(inputs["probe"]),
        CheckpointSet.open(inputs["checkpoint"]),
    )
    require_matching(config, inputs, shards, probe, checkpoints)
    job = prepare(config, shards, probe, checkpoints, ScoreStore(work.tmp / "partitions"))
    if config.keep_gradients:
        job = replace(job, gradients=work.path / "gradients")
    ctx = access.context(config.layout, job.seed)
    if config.checkpoint_choice == "probe_loss":
        job = with_lowest_probe_loss(job, checkpoints, ctx)
    validity = score(job, checkpoints, ctx)
    if not ctx.is_main:
        return None
    record = finish(job, probe, work, validity)
    io.atomic_write_json(work.path / INFLUENCE_FILE, record.plain())
    log.info("influence: %g %% intervals below cover the choice of %s, nothing else", 100 * record.confidence, " and ".join(record.interval_covers))
    for source, cell in sorted(record.joint.items(), key=lambda item: -item[1].mean):
        log.info(
            "influence %-20s joint %+.4f [%+.4f, %+.4f]  ess %.0f of %d",
            source,
            cell.mean,
            *cell.interval,
            cell.ess,
            cell.documents,
        )
    for found in record.reliabilities:
        if found.capability == JOINT:
            log.info("influence: %s", advice(found))
    return work.complete(
        {
            "documents": sum(cell.documents for cell in record.joint.values()),
            "tokens": sum(cell.tokens for cell in record.joint.values()),
            "checkpoints": [point.step for point in job.points],
            "validity": {name: entry["spearman"] for name, entry in (validity or {}).get("capabilities", {}).items()},
        }
    )


def finish(job: Job, probe: ProbeSet, work: Workspace, validity: dict[str, Any] | None) -> InfluenceRecord:
    """Write the tables, then summarise them. Everything here is a pure function of the partitions."""
    config, steps = job.config, [point.step for point in job.points]
    every = [scores_at(job, step) for step in steps]
    weights = fold_weights(job, steps[-1])
    for source, chosen in job.chosen.items():
        stacked = np.stack([scores[source] for scores in every])
        write_table(work.path / "scores" / f"{source}.parquet", chosen, list(job.probe), steps, stacked)
    directions, eps = {}, None
    about = {step: io.read_json(job.directions_file(step)) for step in steps}
    for step in steps:
        for capability, note in about[step]["capabilities"].items():
            eps = note.pop("eps")
            note.pop("weights")
            directions[column(capability, step)] = Direction.model_validate(note)
    several = len(job.points) >= FEW_CHECKPOINTS
    covers = ["scored documents"] + (["checkpoints"] if several else []) + (["probe folds"] if config.probe_folds > 1 else [])
    notes = []
    if not several:
        notes.append(f"intervals do not cover the choice of checkpoints, which moves the scores of all documents together; score {FEW_CHECKPOINTS} or more for that")
    if config.probe_folds == 1:
        notes.append("intervals do not cover the choice of probe windows; set probe_folds above 1 for that")
    elif config.probe_folds < FEW_FOLDS:
        notes.append(f"{config.probe_folds} probe folds hardly tell how noisy the probe is, so intervals are wide; 8 are better")
    kept = about[steps[-1]]["preconditioner"]["parameters"]
    if config.parameters != "all":
        notes.append(f"gradients of some parameters only were compared ({', '.join(kept[:4])}{', ...' if len(kept) > 4 else ''}: {len(kept)} tensors)")
    record = InfluenceRecord(
        capabilities=list(job.probe),
        preconditioner=config.preconditioner,
        eps=eps,
        curvature=_curvature(job, {step: found["preconditioner"] for step, found in about.items()}),
        parameters=config.parameters,
        scored_parameters=[] if config.parameters == "all" else kept,
        engine=config.engine,
        fd_epsilon=config.fd_epsilon,
        score_unit=config.score_unit,
        checkpoints=[
            ScoredCheckpoint(step=p.step, tokens=p.tokens, alpha=alpha) for p, alpha in zip(job.points, alphas(steps))
        ],
        checkpoint_choice=config.checkpoint_choice,
        candidate_losses={str(step): loss for step, loss in sorted(job.candidates.items())},
        tokens_per_document=config.tokens_per_document,
        folds=config.probe_folds,
        fold_documents=config.fold_documents,
        probe_sha256=probe.sha256,
        normalise=config.normalise,
        confidence=config.confidence,
        interval_covers=covers,
        directions=directions,
        fold_weights={capability: weights[c].tolist() for c, capability in enumerate(job.probe)},
        sources={source: {} for source in job.chosen},
        joint={},
        validity=validity,
        notes=notes,
    )
    windows = min(len(rows) for rows in job.probe.values())
    return summarise(InfluenceTable(work.path, record), config.bootstrap, job.seed, windows)


def _curvature(job: Job, about: Mapping[int, Mapping[str, Any]]) -> Curvature | None:
    reference = job.reference
    if reference is None:
        return None
    last = about[max(about)]
    return Curvature(
        documents=reference.sources,
        tokens=reference.tokens,
        sha256=reference.sha256,
        labels=last["labels"],
        rule=last["rule"],
        damping={str(step): found["damping"] for step, found in about.items()},
    )
