"""G = gradient of a capability's probe loss at a checkpoint, over every parameter (a tied embedding is one parameter).

Recipe: v_c = mean over probe samples of the gradient of the sample's mean token loss (weighting `documents`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_r1.influence.rows import Row, TokenLosses, batches
from megatron_r1.influence.space import WHOLE, Space
from megatron_r1.model.precondition import Direction
from megatron_r1.utils.errors import CheckpointError, DataError


@dataclass(frozen=True)
class ProbeGradient:
    """Gradient of the (weighted) mean loss of some rows."""

    gradient: Direction
    loss: float  # nats per token
    weight: float  # share of the whole probe these rows carry


def require_full_precision(parameters: Mapping[str, Tensor]) -> None:
    """Refuse weights whose differences would be rounding: finite differences in bf16 have relative error 0.1."""
    low = {
        name: parameter.dtype
        for name, parameter in parameters.items()
        if parameter.dtype not in (torch.float32, torch.float64)
    }
    if low:
        name, dtype = next(iter(low.items()))
        raise CheckpointError(
            expected="fp32 weights for finite differences",
            found=f"{name} in {dtype} (and {len(low) - 1} more)",
            fix="load the checkpoint's fp32 master weights (precision fp32)",
        )


def row_weights(rows: Sequence[Row], weighting: str) -> list[float]:
    """Weight of each row's *summed* token loss in the probe loss."""
    if weighting == "tokens":
        return [1.0 / sum(row.targets for row in rows)] * len(rows)
    return [1.0 / (len(rows) * row.targets) for row in rows]


def gradient(
    losses: TokenLosses,
    parameters: Mapping[str, Tensor],
    rows: Sequence[Row],
    weights: Sequence[float],
    batch_tokens: int,
    device: torch.device,
    advance: Callable[[int], None] = lambda _: None,
    space: Space = WHOLE,
) -> tuple[Direction, float]:
    """Gradient and value of sum_i weights[i] * (summed token loss of row i); fp32, or fp64 for fp64 weights."""
    total = {name: torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32)) for name, leaf in parameters.items()}
    value = 0.0
    for batch in batches(rows, batch_tokens, device):
        parts, loss = space.differentiate(losses, parameters, batch.tensors, [weights[i] for i in batch.positions])
        for mine, part in zip(total.values(), parts):
            mine.add_(part)
        value += loss
        advance(3 * batch.padded_tokens)
    return total, value


def probe_gradients(
    losses: TokenLosses,
    parameters: Mapping[str, Tensor],
    rows: Sequence[Row],
    folds: int,
    weighting: str,
    batch_tokens: int,
    device: torch.device,
    advance: Callable[[int], None] = lambda _: None,
) -> list[ProbeGradient]:
    """The probe's gradient, split into `folds` parts whose weighted mean is the whole: see `fold_gradient`."""
    return [
        fold_gradient(losses, parameters, rows, fold, folds, weighting, batch_tokens, device, advance)
        for fold in range(folds)
    ]


def fold_gradient(
    losses: TokenLosses,
    parameters: Mapping[str, Tensor],
    rows: Sequence[Row],
    fold: int,
    folds: int,
    weighting: str,
    batch_tokens: int,
    device: torch.device,
    advance: Callable[[int], None] = lambda _: None,
    space: Space = WHOLE,
) -> ProbeGradient:
    """One part of the probe's gradient (of one part: the whole).

    Raises DataError when there are fewer rows than folds or the gradient is zero or not a number.
    """
    if len(rows) < folds:
        raise DataError(
            expected=f"at least {folds} probe windows for {folds} folds",
            found=f"{len(rows)}",
            fix="lower probe_folds or raise the probe's documents",
        )
    weights = row_weights(rows, weighting)
    # Every folds-th row: the windows stand source by source, so each fold holds all sources.
    chosen = list(range(fold, len(rows), folds))
    share = sum(weights[i] * rows[i].targets for i in chosen)
    found, loss = gradient(
        losses,
        parameters,
        [rows[i] for i in chosen],
        [weights[i] / share for i in chosen],
        batch_tokens,
        device,
        advance,
        space,
    )
    size = space.norm(found)
    if not 0 < size < float("inf"):
        raise DataError(
            expected="a finite probe gradient that is not zero",
            found=f"a gradient of norm {size} (probe loss {loss})",
            fix="check that the checkpoint's training did not diverge and that the probe is not empty",
        )
    return ProbeGradient(found, loss, share)


def norm(direction: Mapping[str, Tensor]) -> float:
    """Euclidean norm over all parameters."""
    return WHOLE.norm(direction)


def dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Inner product over all parameters."""
    return WHOLE.inner(a, b)
