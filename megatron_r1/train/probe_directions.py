"""Directions D_c = P G_c that documents are scored along while training: G_c the gradient of capability c's probe loss at the weights
as they are, P what the trainer's own AdamW makes of a gradient; whole or cut down to a low rank.

Legend: c capability, K capabilities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megatron_r1.artifacts.probe import ProbeSet
from megatron_r1.model.precondition import Adam, Direction, Identity, Preconditioner
from megatron_r1.model.scores_in_training import Lines
from megatron_r1.model.taps import parameters_of
from megatron_r1.ops.low_rank import factor, stack
from megatron_r1.parallel.context import ParallelContext
from megatron_r1.parallel.ddp import owned
from megatron_r1.parallel.optimizer import adam_step, second_moments
from megatron_r1.train.config import OptimizerConfig, ScoresConfig
from megatron_r1.train.heldout import Document, Rows, interleaved, pack
from megatron_r1.train.measure import gradient_of_rows


@dataclass
class Directions:
    """`lines`: for `ScoresInTraining.aim`; empty when a gradient was not a number. `notes`: capability -> what is recorded."""

    lines: Lines = field(default_factory=dict)
    notes: dict[str, dict[str, float]] = field(default_factory=dict)


def probe_rows(shards: Any, probe: ProbeSet, documents: int | None, seq_length: int) -> dict[str, Rows]:
    """For each capability (sorted) its windows packed into rows. `loss_mask` holds each token's weight in the probe loss: the mean over
    windows of a window's mean token loss. A window longer than a sequence loses its end."""
    found = {}
    for capability, record in sorted(probe.capabilities.items()):
        by_source: dict[str, list[Document]] = {}
        for reference in record.documents:
            by_source.setdefault(reference.source, []).append(Document(capability, np.asarray(reference.tokens(shards))))
        rows = pack(list(interleaved(by_source.values()))[:documents], seq_length)
        for row, start, inputs in rows.places:
            rows.batch["loss_mask"][row, start : start + inputs] = 1.0 / (inputs * len(rows.places))
        found[capability] = rows
    return found


def take_directions(
    ctx: ParallelContext, chunks: Sequence[nn.Module], optimizer: Any, settings: OptimizerConfig, rows: Mapping[str, Rows], micro_batch: int, config: ScoresConfig,
) -> Directions:
    """Probe gradients of the weights as they are, preconditioned and cut down. Collective; the next step clears what is left behind
    in the gradient buffers. One whole gradient is held at a time (with rank none: all K)."""
    parameters = parameters_of(chunks)
    counted = owned(chunks, ctx)
    precondition: Preconditioner = Identity()
    if config.preconditioner == "adam":
        moments = second_moments(optimizer, chunks, ctx)
        precondition = Adam({name: moments[id(p)] for name, p in parameters.items()}, adam_step(optimizer), settings.beta2, settings.eps)
    pieces: dict[str, list[Any]] = {name: [] for name in parameters}
    found = Directions()
    for capability, probe in rows.items():
        gradients, loss = gradient_of_rows(ctx, chunks, probe, micro_batch)
        gradient = {name: gradients.pop(id(p)) for name, p in parameters.items()}
        size = _norm(gradient, parameters, counted, ctx)
        direction = precondition(gradient)
        missing = {name: _cut_down(name, part, config.rank, pieces) for name, part in direction.items()}
        note = _note(direction, missing, parameters, counted, ctx)
        found.notes[capability] = {"loss": loss, "gradient_norm": size, **note}
    if all(np.isfinite(list(note.values())).all() and note["norm"] > 0 for note in found.notes.values()):
        found.lines = {name: torch.stack(each) if isinstance(each[0], Tensor) else stack(each) for name, each in pieces.items()}
    return found


def _cut_down(name: str, part: Tensor, rank: int | None, pieces: dict[str, list[Any]]) -> float:
    """Keep a direction's part for one parameter; returns the norm of what is lost."""
    if rank is None or part.ndim == 1 or not bool(torch.isfinite(part).all()):
        pieces[name].append(part)
        return 0.0
    left, right, lost = factor(part, rank)
    pieces[name].append((left, right))
    return lost


def _note(direction: Direction, missing: Mapping[str, float], parameters: Mapping[str, Tensor], counted: set[int], ctx: ParallelContext) -> dict[str, float]:
    """norm: of the direction; error: |D - L R^T| / |D| over all parameters, which times |D| and the norm of a document's gradient bounds
    the error of its score; largest: of a single parameter."""
    own = [name for name in direction if id(parameters[name]) in counted]
    lost = ctx.all_reduce_sum(torch.tensor(sum(missing[name] ** 2 for name in own), dtype=torch.float64, device=ctx.device), over="model")
    norm = _norm(direction, parameters, counted, ctx)
    shares = [missing[name] / size if (size := float(torch.linalg.vector_norm(direction[name], dtype=torch.float64))) else 0.0 for name in own]
    largest = ctx.all_reduce_max(torch.tensor(max(shares, default=0.0), dtype=torch.float64, device=ctx.device), over="model")
    return {"norm": norm, "error": float(lost) ** 0.5 / norm if norm else 0.0, "largest": float(largest)}


def _norm(direction: Direction, parameters: Mapping[str, Tensor], counted: set[int], ctx: ParallelContext) -> float:
    total = sum(float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2 for name, part in direction.items() if id(parameters[name]) in counted)
    return float(ctx.all_reduce_sum(torch.tensor(total, dtype=torch.float64, device=ctx.device), over="model")) ** 0.5
