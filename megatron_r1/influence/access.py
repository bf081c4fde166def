"""The one place where influence meets the runtime: a checkpoint becomes a loss function and named weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from megatron_r1.artifacts.checkpoint import CheckpointInfo, CheckpointSet
from megatron_r1.influence.config import InfluenceConfig
from megatron_r1.influence.rows import Batch, TokenLosses
from megatron_r1.influence.space import Sharded, Space, space_of
from megatron_r1.model.forward import token_losses
from megatron_r1.model.load import load_model
from megatron_r1.model.precondition import Adam, Identity, Preconditioner
from megatron_r1.model.taps import parameters_of
from megatron_r1.parallel.checkpoint import load_second_moment
from megatron_r1.parallel.config import LayoutConfig
from megatron_r1.parallel.context import ParallelContext, initialize


@dataclass(frozen=True)
class Weights:
    """A checkpoint's weights, in this process and the others of its copy."""

    chunks: list[nn.Module]
    losses: TokenLosses
    parameters: dict[str, Tensor]
    space: Space


@dataclass(frozen=True)
class LoadedCheckpoint(Weights):
    """A checkpoint ready to be scored at."""

    preconditioner: Preconditioner  # P of the score, for those that are not estimated from documents
    trainer: Preconditioner  # P of the trainer's own step
    eps: float | None


def context(layout: LayoutConfig, seed: int) -> ParallelContext:
    """Process groups; several copies of the model share the partitions among them."""
    return initialize(layout, seed)


def weights(point: CheckpointInfo, ctx: ParallelContext, config: InfluenceConfig) -> Weights:
    """Load weights alone. Raises CheckpointError when they are not there."""
    chunks = load_model(point, ctx, precision=config.precision)
    space = space_of(chunks, ctx)

    def whole(batch: Batch) -> Tensor:
        return token_losses(chunks, batch)

    return Weights(chunks, space.losses if isinstance(space, Sharded) else whole, parameters_of(chunks), space)


def load(checkpoints: CheckpointSet, point: CheckpointInfo, ctx: ParallelContext, config: InfluenceConfig) -> LoadedCheckpoint:
    """Load weights, and the optimizer's second moment when P or the receipt needs it.

    Raises CheckpointError when it is not there.
    """
    found = weights(point, ctx, config)
    own = (found.chunks, found.losses, found.parameters, found.space)
    if config.preconditioner != "adam" and not (config.validity.batches and config.receipt_optimizer == "trainer"):
        return LoadedCheckpoint(*own, Identity(), Identity(), None)
    moment, step = load_second_moment(point.path, found.chunks, ctx)
    beta2, eps = float(checkpoints.optimizer["beta2"]), float(checkpoints.optimizer["eps"])
    adam = Adam(moment, step, beta2, eps)
    trainer = adam if config.receipt_optimizer == "trainer" else Identity()
    if config.preconditioner != "adam":
        return LoadedCheckpoint(*own, Identity(), trainer, None)
    chosen = adam if config.eps is None or config.eps == eps else Adam(moment, step, beta2, config.eps)
    return LoadedCheckpoint(*own, chosen, trainer, eps if config.eps is None else config.eps)
