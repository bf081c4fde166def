"""P of the score, from the settings: ready-made ones, and those that are first estimated from documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_r1.influence.config import InfluenceConfig
from megatron_r1.influence.datainf import DataInf
from megatron_r1.influence.groups import Selected, select
from megatron_r1.influence.precondition import Preconditioner
from megatron_r1.influence.reference import DocumentGradients, Reference
from megatron_r1.influence.rows import TokenLosses

ESTIMATED = ("datainf",)
"""Preconditioners that are estimated from documents."""
NO_ADVANCE: Callable[[int], None] = lambda _: None  # noqa: E731


def preconditioner_of(
    config: InfluenceConfig,
    ready: Preconditioner,
    losses: TokenLosses,
    parameters: Mapping[str, Tensor],
    reference: Reference | None,
    device: torch.device,
    advance: Callable[[int], None] = NO_ADVANCE,
) -> tuple[Preconditioner, dict[str, Any]]:
    """P and what the artifact records about it at this checkpoint.

    ready: P of `none` and `adam`. Raises ConfigError for a pattern of `parameters` that matches nothing, DataError where the
    curvature can not be estimated.
    """
    kept = select(list(parameters), config.parameters)
    notes: dict[str, Any] = {"parameters": kept}
    if config.preconditioner == "datainf" and reference is not None:
        gradients = DocumentGradients(losses, {name: parameters[name] for name in kept}, reference, device, advance)
        ready = DataInf(gradients, config.curvature.damping)
        notes |= {"damping": ready.damping, "labels": "true", "rule": DataInf.RULE}
    return (ready if config.parameters == "all" else Selected(ready, kept)), notes
