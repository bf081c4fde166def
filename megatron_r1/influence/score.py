"""Scoring: checkpoint by checkpoint, partition by partition; what is finished is never computed again.

Under torchrun every process holds the whole model and computes all directions; the partitions are shared among the
processes and the receipt is rank 0's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from megatron_r1.artifacts.checkpoint import CheckpointInfo, CheckpointSet
from megatron_r1.influence import access
from megatron_r1.influence.finite_difference import FiniteDifference, sum_by_unit
from megatron_r1.influence.groups import energy_shares
from megatron_r1.influence.job import Job, Partition, direction_tokens, scoring_tokens, totals_at
from megatron_r1.influence.probe_gradient import Direction, ProbeGradient, dot, norm, probe_gradients
from megatron_r1.influence.rows import batches
from megatron_r1.influence.validity import cost, receipt
from megatron_r1.parallel.context import ParallelContext
from megatron_r1.utils import io
from megatron_r1.utils.logging import get_logger, progress

TRUNCATION_WARNING = 0.02
log = get_logger(__name__)
Advance = Callable[[int], None]


def score(job: Job, checkpoints: CheckpointSet, ctx: ParallelContext) -> dict[str, Any] | None:
    """Compute every missing partition and the receipt; returns the receipt, on rank 0. Collective."""
    mine = job.partitions()[ctx.data_rank :: ctx.data_size]
    per_point = direction_tokens(job) + sum(scoring_tokens(job, partition) for partition in mine)
    receipt_tokens = cost(job.config.validity, job.chosen, job.probe, job.seed, job.tokens) if ctx.is_main else 0
    with progress("influence", len(job.points) * per_point + receipt_tokens) as bar:
        for point in job.points:
            # Rank 0 looks and tells: the others may already be writing what a later look would find.
            todo, directions, receipts = ctx.broadcast_object(_missing(job, point))
            if not (todo or directions or receipts):
                bar.advance(per_point)
                continue
            bar.note(checkpoint=str(point.step))
            loaded = access.load(checkpoints, point, ctx, job.config.preconditioner, job.config.eps)
            engine = FiniteDifference(loaded.losses, loaded.parameters, job.config.fd_epsilon)
            if todo or directions:
                _score_checkpoint(job, point.step, engine, loaded, mine, set(todo), ctx, bar.advance)
            ctx.barrier()
            if receipts and ctx.is_main:
                _take_receipt(job, point.step, engine, loaded, ctx, bar.advance)
            engine.verify_restored()
            ctx.barrier()
    # From here on rank 0 may complete the artifact, which removes the scratch folder.
    return _read_receipt(job) if ctx.is_main else None


def _missing(job: Job, point: CheckpointInfo) -> tuple[list[Partition], bool, bool]:
    """Partitions, directions and receipt of a checkpoint that are still to be made."""
    todo = [partition for partition in job.partitions() if job.load(point.step, partition) is None]
    receipts = point is job.points[-1] and job.config.validity.batches > 0 and not job.receipt_file.exists()
    return todo, not job.directions_file(point.step).exists(), receipts


def _score_checkpoint(
    job: Job,
    step: int,
    engine: FiniteDifference,
    loaded: access.LoadedCheckpoint,
    mine: list[Partition],
    todo: set[Partition],
    ctx: ParallelContext,
    advance: Advance,
) -> None:
    """Directions of every capability at one checkpoint, then those of this process' partitions that are in `todo`."""
    lines = _directions(job, step, engine, loaded, ctx, advance)
    for partition in mine:
        if partition not in todo:
            advance(scoring_tokens(job, partition))
            continue
        rows = job.rows(partition)
        packed = batches(rows, job.tokens, ctx.device)
        found = [sum_by_unit(engine.scores(line, packed, advance=advance), rows, len(partition)) for line in lines]
        job.save(step, partition, np.stack(found, axis=1))


def _directions(
    job: Job,
    step: int,
    engine: FiniteDifference,
    loaded: access.LoadedCheckpoint,
    ctx: ParallelContext,
    advance: Advance,
) -> list[Direction]:
    """P G of every capability and probe fold, capability by capability; noted in the directions file."""
    config = job.config
    lines: list[Direction] = []
    notes: dict[str, dict[str, Any]] = {}
    check = batches(job.check_rows(), job.tokens, ctx.device)
    for capability, rows in job.probe.items():
        found = probe_gradients(
            loaded.losses,
            loaded.parameters,
            rows,
            config.probe_folds,
            config.probe_weighting,
            job.tokens,
            ctx.device,
            advance,
        )
        along = [loaded.preconditioner(part.gradient) for part in found]
        truncation = max(engine.truncation(line, check, advance) for line in along) if check else None
        notes[capability] = _describe(engine, found, along, truncation, loaded.eps)
        lines += along
        if truncation is not None and truncation > TRUNCATION_WARNING:
            log.warning(
                "influence %s at step %d: curvature makes the finite differences wrong by about %.1f %%; lower "
                "fd_epsilon or raise eps",
                capability,
                step,
                100 * truncation,
            )
    if ctx.is_main:
        io.atomic_write_json(job.directions_file(step), notes)
    return lines


def _describe(
    engine: FiniteDifference,
    found: list[ProbeGradient],
    along: list[Direction],
    truncation: float | None,
    eps: float | None,
) -> dict[str, Any]:
    """What is worth knowing of a capability's direction: of the whole probe, folds joined."""
    gradient = {name: sum(part.weight * part.gradient[name] for part in found) for name in found[0].gradient}
    direction = {name: sum(part.weight * line[name] for part, line in zip(found, along)) for name in gradient}
    return {
        "probe_loss": sum(part.weight * part.loss for part in found),
        "gradient_norm": norm(gradient),
        "direction_norm": norm(direction),
        "self_influence": dot(gradient, direction),
        "step": engine.step(direction),
        "truncation": truncation,
        "energy": energy_shares(gradient, direction),
        "weights": [part.weight for part in found],
        "eps": eps,
    }


def _take_receipt(
    job: Job,
    step: int,
    engine: FiniteDifference,
    loaded: access.LoadedCheckpoint,
    ctx: ParallelContext,
    advance: Advance,
) -> None:
    found = receipt(
        job.config.validity,
        engine,
        loaded.trainer,
        job.chosen,
        totals_at(job, step),
        job.probe,
        job.config.probe_weighting,
        job.tokens,
        ctx.device,
        job.seed,
        advance,
    )
    io.atomic_write_json(job.receipt_file, {"checkpoint": step, "optimizer": job.config.preconditioner, **found})


def _read_receipt(job: Job) -> dict[str, Any] | None:
    if not job.config.validity.batches:
        return None
    validity = io.read_json(job.receipt_file)
    for name, entry in validity["capabilities"].items():
        value = "undefined" if entry["spearman"] is None else f"{entry['spearman']:.3f}"
        log.info("influence receipt, %s: Spearman of predicted and real one-step change %s", name, value)
    return validity
