"""Checkpoints chosen by what they are good at: AutoMixer's task-selected ones (arXiv 2506.21910), by probe loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from megatron_r1.artifacts.checkpoint import CheckpointInfo, CheckpointSet
from megatron_r1.influence import access
from megatron_r1.influence.job import Job
from megatron_r1.influence.probe_gradient import row_weights
from megatron_r1.influence.rows import Row, TokenLosses, batches, padded_tokens, row_sums
from megatron_r1.parallel.context import ParallelContext
from megatron_r1.utils import io
from megatron_r1.utils.errors import DataError
from megatron_r1.utils.logging import get_logger, progress

log = get_logger(__name__)


def with_lowest_probe_loss(job: Job, checkpoints: CheckpointSet, ctx: ParallelContext) -> Job:
    """The job at the `checkpoints` trained checkpoints with the lowest probe loss, mean over the scored capabilities. Collective.

    AutoMixer picks, for every task, the checkpoint of one run that is best at it. With several capabilities in a step the choice
    is for all of them together; a step for each makes it one by one. The losses are kept, so a relaunch chooses alike. Raises
    DataError at a loss that is not a number.
    """
    file = job.store.folder / "checkpoint_losses.json"
    trained = [point for point in checkpoints.checkpoints if point.step > 0]
    known: dict[str, float] | None = ctx.broadcast_object(io.read_json(file) if ctx.is_main and file.exists() else None)
    if known is None:
        known = {str(point.step): loss for point, loss in zip(trained, _losses(job, trained, ctx))}
        if ctx.is_main:
            io.atomic_write_json(file, known)
    losses = {int(step): loss for step, loss in known.items()}
    best = sorted(trained, key=lambda point: (losses[point.step], -point.step))[: job.config.checkpoints]
    points = sorted(best, key=lambda point: point.step)
    log.info("influence: of %d checkpoints those at %s have the lowest probe loss", len(trained), ", ".join(f"{point.step}" for point in points))
    return replace(job, points=points, candidates=losses)


def _losses(job: Job, points: Sequence[CheckpointInfo], ctx: ParallelContext) -> list[float]:
    """Mean over capabilities of the probe loss at each checkpoint, nats per token."""
    found = []
    with progress("influence: probe losses", len(points) * sum(padded_tokens(rows, job.tokens) for rows in job.probe.values())) as bar:
        for point in points:
            bar.note(checkpoint=str(point.step))
            losses = access.weights(point, ctx, job.config).losses
            each = [probe_loss(losses, rows, job.config.probe_weighting, job.tokens, ctx.device, bar.advance) for rows in job.probe.values()]
            if not np.isfinite(each).all():
                raise DataError(
                    expected=f"probe losses that are numbers at the checkpoint of step {point.step}",
                    found=", ".join(f"{name} {loss}" for name, loss in zip(job.probe, each)),
                    fix="check that training did not diverge, or set checkpoint_choice: evenly and fewer `checkpoints`",
                )
            found.append(float(np.mean(each)))
    return found


@torch.no_grad()
def probe_loss(
    losses: TokenLosses,
    rows: Sequence[Row],
    weighting: str,
    batch_tokens: int,
    device: torch.device,
    advance: Callable[[int], None] = lambda _: None,
) -> float:
    """The weighted mean loss whose gradient is `probe_gradient`'s, nats per token."""
    weights, total = np.array(row_weights(rows, weighting)), 0.0
    for batch in batches(rows, batch_tokens, device):
        sums = row_sums(losses(batch.tensors), batch.tensors["loss_mask"]).cpu().numpy()
        total += float(sums @ weights[batch.positions])
        advance(batch.padded_tokens)
    return total
