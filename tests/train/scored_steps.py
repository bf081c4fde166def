"""Training steps that are listened to, under any layout, beside the same steps without: what the tests of in-training scores share."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "distributed"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "influence"))

from ghost_worker import _direction, _gain
from scenarios import MODEL

from megatron_r1.influence.rows import Row
from megatron_r1.model.build import build_model, global_names
from megatron_r1.model.config import ModelConfig
from megatron_r1.model.scores_in_training import ScoresInTraining
from megatron_r1.ops.low_rank import Factors, factor, stack
from megatron_r1.parallel import context
from megatron_r1.parallel.config import LayoutConfig
from megatron_r1.parallel.ddp import unwrap, wrap
from megatron_r1.parallel.optimizer import build_optimizer, set_lr, step
from megatron_r1.parallel.schedule import forward_backward
from megatron_r1.train.objectives import Objective
from megatron_r1.train.scores import ScoredNextToken, units_of

LENGTH, DIRECTIONS, SOURCES = 24, 2, 3
WHOLE_WIDTH = 10**6


def restart(segments: np.ndarray) -> np.ndarray:
    """Positions [b, s] counted from the beginning of each run of equal segment numbers."""
    columns = np.arange(segments.shape[1])
    begins = np.where(np.diff(segments, prepend=segments[:, :1] - 1, axis=1) != 0, columns, 0)
    return columns - np.maximum.accumulate(begins, axis=1)


def batches(micro_batch: int, count: int, apart: bool = True, seed: int = 0) -> list[dict[str, Any]]:
    """`count` micro-batches; documents of 1 to 12 tokens, of which the labels that belong to the next one are no targets."""
    draw = np.random.default_rng(seed)
    found = []
    for number in range(count):
        tokens = draw.integers(0, MODEL.vocab_size, (micro_batch, LENGTH + 1))
        segments = np.cumsum(draw.random((micro_batch, LENGTH + 1)) < 0.15, axis=1).astype(np.int32)
        segments -= segments[:, :1]
        mask = np.ones((micro_batch, LENGTH), np.float32)
        if apart:
            mask[segments[:, 1:] != segments[:, :-1]] = 0
        own = segments[:, :-1] if apart else np.zeros((micro_batch, LENGTH), np.int32)
        found.append({
            "tokens": np.ascontiguousarray(tokens[:, :-1]), "labels": np.ascontiguousarray(tokens[:, 1:]), "loss_mask": mask,
            "segment_ids": np.ascontiguousarray(own), "position_ids": restart(own),
            "source_ids": draw.integers(0, SOURCES, micro_batch).astype(np.int32), "first_sample": np.asarray(number * micro_batch, np.int64),
        })  # fmt: skip
    return found


def rows_of(batch: dict[str, Any]) -> list[Row]:
    """The units with targets, each as a row of its own; a label that is no target is the next document's and is left out."""
    units = units_of(batch)
    tokens, labels = batch["tokens"].ravel(), batch["labels"].ravel()
    rows = []
    for first, end, targets in zip(units.borders[:-1], units.borders[1:], units.tokens):
        if targets:
            rows.append(Row(len(rows), np.append(tokens[first : first + targets], labels[first + targets - 1])))
        assert targets in (end - first, end - first - 1)
    return rows


def factored(lines: Sequence[dict[str, Tensor]], rank: int | None) -> dict[str, Tensor | Factors]:
    """K directions as the engine takes them."""
    found: dict[str, Tensor | Factors] = {}
    for name, like in lines[0].items():
        parts = [line[name].float() for line in lines]
        found[name] = torch.stack(parts) if rank is None or like.ndim == 1 else stack([factor(part, rank)[:2] for part in parts])
    return found


def product(line: Tensor | Factors, number: int) -> Tensor:
    """The direction that factors stand for."""
    if isinstance(line, Tensor):
        return line[number]
    columns = slice(number * line.left.shape[1] // line.probes, (number + 1) * line.left.shape[1] // line.probes)
    return line.left[:, columns] @ line.right[:, columns].t()


def built(ctx: context.ParallelContext, model: ModelConfig, layout: LayoutConfig, recompute: bool, precision: str) -> tuple[list[nn.Module], Any]:
    """Chunks far from their start, and their optimizer."""
    chunks = build_model(model, ctx, seed=3, recompute=recompute, precision=precision)
    with torch.no_grad():
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                parameter.copy_(_gain(global_names(chunk)[name]).expand(parameter.shape) if parameter.ndim == 1 else parameter * 2)
    wrapped = wrap(chunks, layout, ctx, bucket_parameters=20_000 if layout.overlap else None)
    return wrapped, build_optimizer(wrapped, lr=1e-3, layout=layout, precision=precision, eps=1e-3)


def stepped(
    layout: LayoutConfig, rank: int | None = None, scored: bool = True, steps: int = 3, micro_batch: int = 2, micros: int = 2, tied: bool = True, recompute: bool = False,
    precision: str = "fp32", apart: bool = True,
) -> dict[str, Any]:
    """Some steps of training; scored from the second on. scores: of the last two steps, [rows, K] by (sample, place) of this model copy;
    losses: sums of each step here (0 where there is none); weights: by name, fp64 norms of what is here; gradient: the same of main_grad
    after the last backward pass, reduced as the layout does."""
    ctx = context.initialize(layout, seed=0)
    chunks, optimizer = built(ctx, MODEL.replace(tied_embeddings=tied), layout, recompute, precision)
    for chunk in chunks:
        chunk.train()
    engine = ScoresInTraining(chunks, ctx, full=rank is None)
    objective = ScoredNextToken(SOURCES, ctx.device, engine, DIRECTIONS) if scored else Objective(SOURCES, ctx.device)
    lines = factored([_direction([unwrap(chunk) for chunk in chunks], ctx, k) for k in range(DIRECTIONS)], rank)
    scores: dict[str, list[float]] = {}
    losses, norms = [], []
    with engine.attached():
        for number in range(steps):
            every = batches(micro_batch, micros * ctx.data_size, apart, seed=number)
            mine: Iterator[dict[str, Any]] = iter(every[ctx.data_rank :: ctx.data_size])
            reports = forward_backward(ctx, chunks, objective.forward_step, mine, micros, LENGTH, micro_batch)
            losses.append(sum(float(report["loss_sum"]) for report in reports))
            set_lr(optimizer, 1e-3)
            norms.append(step(optimizer).grad_norm)
            if scored and number == 0:
                engine.aim(lines, DIRECTIONS)
            elif scored:
                rows = objective.take(number, 0)
                scores |= {f"{number} {row['sample']} {row['place']}": row["scores"].tolist() for row in rows}
    names = {f"{i}.{name}": p for i, chunk in enumerate(chunks) for name, p in unwrap(chunk).named_parameters()}
    return {
        "scores": scores, "losses": losses, "norms": norms,
        "weights": {name: float(torch.linalg.vector_norm(p.detach().double())) for name, p in names.items()},
        "bytes": {name: p.detach().float().view(torch.int32).sum(dtype=torch.int64).item() for name, p in names.items()},
    }  # fmt: skip
