"""Scoring: checkpoint by checkpoint, partition by partition; what is finished is never computed again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from megatron_r1.artifacts.checkpoint import CheckpointSet
from megatron_r1.influence import access
from megatron_r1.influence.finite_difference import FiniteDifference, sum_by_unit
from megatron_r1.influence.groups import energy_shares
from megatron_r1.influence.job import Job, totals_at, work_tokens
from megatron_r1.influence.probe_gradient import ProbeGradient, dot, norm, probe_gradients
from megatron_r1.influence.rows import batches, padded_tokens
from megatron_r1.influence.validity import receipt
from megatron_r1.utils import io
from megatron_r1.utils.logging import get_logger, progress

TRUNCATION_WARNING = 0.02
log = get_logger(__name__)


def score(job: Job, checkpoints: CheckpointSet) -> dict[str, Any] | None:
    """Compute every missing partition and the receipt."""
    ctx = access.context(job.seed)
    directions, scoring, receipts = work_tokens(job)
    receipt_file = job.store.folder / "validity.json"
    with progress("influence", len(job.points) * (directions + scoring) + receipts) as bar:
        for point in job.points:
            last = point is job.points[-1]
            todo = [p for p in job.partitions() if job.load(point.step, *p) is None]
            if not todo and job.directions_file(point.step).exists() and (not last or receipt_file.exists() or not job.config.validity.batches):
                bar.advance(directions + scoring)
                continue
            bar.note(checkpoint=str(point.step))
            loaded = access.load(checkpoints, point, ctx, job.config.preconditioner, job.config.eps)
            engine = FiniteDifference(loaded.losses, loaded.parameters, job.config.fd_epsilon)
            if todo or not job.directions_file(point.step).exists():
                _score_checkpoint(job, point.step, engine, loaded, todo, ctx.device, bar.advance)
            if last and job.config.validity.batches and not receipt_file.exists():
                found = receipt(
                    job.config.validity, engine, loaded.trainer, job.chosen, totals_at(job, point.step), job.probe,
                    job.config.probe_weighting, job.tokens, ctx.device, job.seed, bar.advance,
                )
                io.atomic_write_json(receipt_file, {"checkpoint": point.step, "optimizer": job.config.preconditioner, **found})
            engine.verify_restored()
    if not job.config.validity.batches:
        return None
    validity = io.read_json(receipt_file)
    for name, entry in validity["capabilities"].items():
        value = entry["spearman"]
        log.info("influence receipt %s: predicted against real one-step change, Spearman %s", name, "undefined" if value is None else f"{value:.3f}")
    return validity


def _score_checkpoint(
    job: Job, step: int, engine: FiniteDifference, loaded: access.LoadedCheckpoint, todo: list[tuple[str, int, int, int]], device: torch.device,
    advance: Callable[[int], None],
) -> None:
    """Directions of every capability at one checkpoint, then the partitions in `todo`."""
    lines: list[dict[str, Any]] = []
    notes: dict[str, dict[str, Any]] = {}
    check = batches(job.check_rows(), job.tokens, device)
    for capability, rows in job.probe.items():
        found = probe_gradients(
            loaded.losses, loaded.parameters, rows, job.config.probe_folds, job.config.probe_weighting, job.tokens, device, advance
        )
        along = [loaded.preconditioner(part.gradient) for part in found]
        errors = [engine.truncation(direction, check, advance) for direction in along] if check else [None]
        notes[capability] = describe_direction(engine, found, along, errors, loaded.eps)
        lines += along
        if check and max(errors) > TRUNCATION_WARNING:
            log.warning(
                "influence %s at step %d: curvature error of the finite differences is about %.1f %%; lower fd_epsilon or raise eps",
                capability, step, 100 * max(errors),
            )
    io.atomic_write_json(job.directions_file(step), notes)
    for source, part, first, last in job.partitions():
        rows = job.chosen[source].part(first, last)
        if (source, part, first, last) not in todo:
            advance(2 * job.columns * padded_tokens(rows, job.tokens))
            continue
        packed = batches(rows, job.tokens, device)
        found = [sum_by_unit(engine.scores(line, packed, advance=advance), rows, last - first) for line in lines]
        job.store.save(step, source, part, np.stack(found, axis=1))


def describe_direction(
    engine: FiniteDifference, parts_: list[ProbeGradient], along: list[dict[str, Any]], errors: list[float | None], eps: float | None
) -> dict[str, Any]:
    """What is worth knowing of a capability's direction: of the whole probe, folds joined."""
    gradient = {name: sum(part.weight * part.gradient[name] for part in parts_) for name in parts_[0].gradient}
    direction = {name: sum(part.weight * line[name] for part, line in zip(parts_, along)) for name in gradient}
    return {
        "probe_loss": sum(part.weight * part.loss for part in parts_), "gradient_norm": norm(gradient), "direction_norm": norm(direction),
        "self_influence": dot(gradient, direction), "step": engine.step(direction), "truncation": None if errors[0] is None else max(errors),
        "energy": energy_shares(gradient, direction), "weights": [part.weight for part in parts_], "eps": eps,
    }
