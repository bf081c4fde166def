"""P of the score, from the settings: ready-made ones, and those that are first estimated from documents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_r1.influence.access import LoadedCheckpoint
from megatron_r1.influence.config import InfluenceConfig
from megatron_r1.influence.datainf import DataInf
from megatron_r1.influence.ekfac import EKFAC
from megatron_r1.influence.fisher import FisherDocuments
from megatron_r1.influence.groups import Selected, select
from megatron_r1.influence.reference import DocumentGradients, Reference
from megatron_r1.model.precondition import Preconditioner
from megatron_r1.parallel.context import ParallelContext
from megatron_r1.utils.errors import ParallelError

ESTIMATED = ("datainf", "ekfac")
"""Preconditioners that are estimated from documents."""


def preconditioner_of(
    config: InfluenceConfig,
    loaded: LoadedCheckpoint,
    reference: Reference | None,
    ctx: ParallelContext,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[Preconditioner, dict[str, Any]]:
    """P and what the artifact records about it at this checkpoint. `reference`: there for estimated ones.

    Raises ConfigError for a pattern of `parameters` that matches nothing, DataError where the curvature can not be estimated,
    ParallelError where it would have to be of a model that is cut over processes.
    """
    kept = select(list(loaded.parameters), config.parameters)
    found, notes = loaded.preconditioner, {"parameters": kept}
    if reference is not None:
        found, about = _estimated(config, loaded, kept, reference, ctx, advance)
        notes |= about
    return (found if config.parameters == "all" else Selected(found, kept)), notes


def _estimated(
    config: InfluenceConfig,
    loaded: LoadedCheckpoint,
    kept: list[str],
    reference: Reference,
    ctx: ParallelContext,
    advance: Callable[[int], None],
) -> tuple[Preconditioner, dict[str, Any]]:
    if ctx.layout.model_parallel() > 1:
        raise ParallelError(
            expected=f"a whole model on every process for preconditioner {config.preconditioner}",
            found=f"one cut over {ctx.layout.model_parallel()}",
            fix="score under data parallelism alone, or take preconditioner: adam",
        )
    damping = config.curvature.damping
    made: DataInf | EKFAC
    if config.preconditioner == "datainf":
        parameters = {name: loaded.parameters[name] for name in kept}
        made, labels = DataInf(DocumentGradients(loaded.losses, parameters, reference, ctx.device, advance), damping), "true"
    else:
        made, labels = EKFAC(FisherDocuments(loaded.chunks, ctx, kept, reference, config.seed or 0, advance), damping), "sampled"
    return made, {"damping": made.damping, "labels": labels, "rule": made.RULE}
