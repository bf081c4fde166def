"""Passes over held-out rows under any layout: what validation, RankMe and probe gradients are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from megatron_r1.model.build import R1Model
from megatron_r1.model.forward import mask_here, token_losses
from megatron_r1.parallel.context import ParallelContext
from megatron_r1.parallel.ddp import collected_gradients
from megatron_r1.parallel.schedule import LossFunction, forward_backward, reduce_reports
from megatron_r1.parallel.sequence import context_piece
from megatron_r1.train.heldout import Rows

# consume(output of the last stage [b, s, ...], numbers of the rows int64[b]; -1 for filler rows)
Consume = Callable[[Tensor, np.ndarray], None]


def run_rows(ctx: ParallelContext, chunks: Sequence[nn.Module], rows: Rows, micro_batch: int, output: Literal["losses", "hidden"], consume: Consume) -> None:
    """Run every row once, somewhere, without gradients, and hand the results to `consume`. Collective.

    `output`: "losses" [b, s] or "hidden" [b, s, d]. `consume` is called on the last stage only, and there on one
    tensor-parallel rank, so that a sum over the world counts every row once (where sequences are cut, results are 0 at
    the positions of other processes). Filler rows make the number of micro-batches equal on all ranks.
    """
    mine = _shared_out(ctx, len(rows), micro_batch)

    def forward_step(batches: Iterator[np.ndarray], chunk: nn.Module) -> tuple[Tensor, LossFunction]:
        chosen = next(batches)
        batch = {key: torch.from_numpy(_take(rows.batch[key], chosen)).to(ctx.device) for key in ("tokens", "labels", "segment_ids")}
        result = token_losses(chunk, batch) if output == "losses" else chunk(batch["tokens"], batch["segment_ids"], _states)

        def loss(out: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            if ctx.tensor_rank == 0:
                consume(out, chosen)
            return torch.zeros((), device=ctx.device), torch.ones((), dtype=torch.int, device=ctx.device), {}

        return result, loss

    forward_backward(ctx, chunks, forward_step, iter(mine), len(mine), rows.batch["tokens"].shape[1], micro_batch, forward_only=True)


def _shared_out(ctx: ParallelContext, rows: int, micro_batch: int) -> np.ndarray:
    """Numbers of the rows of each of this rank's micro-batches, [n, b]; -1 for filler rows."""
    per_round = micro_batch * ctx.data_size * (ctx.pipeline_size if ctx.layout.virtual_pipeline else 1)
    numbers = np.arange(-(-rows // per_round) * per_round)
    numbers[rows:] = -1
    return numbers.reshape(-1, ctx.data_size, micro_batch)[:, ctx.data_rank]


def gradient_of_rows(ctx: ParallelContext, chunks: Sequence[nn.Module], rows: Rows, micro_batch: int) -> tuple[dict[int, Tensor], float]:
    """Gradient (by id() of the parameter, this process' part, fp32) and value of the sum of all rows' losses times their `loss_mask`.

    The rows are shared among the data-parallel ranks. Chunks wrapped for training: their gradient buffers are used, and are to be
    cleared before the next step, as a step does. Collective.
    """

    def forward_step(batches: Iterator[np.ndarray], chunk: nn.Module) -> tuple[Tensor, LossFunction]:
        chosen = next(batches)
        arrays = {key: _take(rows.batch[key], chosen) for key in ("tokens", "labels", "segment_ids", "loss_mask")}
        arrays["loss_mask"][chosen < 0] = 0
        batch = {key: torch.from_numpy(array).to(ctx.device) for key, array in arrays.items()}
        nothing = torch.zeros((), dtype=torch.int, device=ctx.device)
        return token_losses(chunk, batch), lambda out: ((out * batch["loss_mask"]).sum(), nothing, {})

    mine = _shared_out(ctx, len(rows), micro_batch)
    reports = forward_backward(ctx, chunks, forward_step, iter(mine), len(mine), rows.batch["tokens"].shape[1], micro_batch, gather=False)
    return collected_gradients(chunks, ctx), reduce_reports(ctx, reports)["loss_sum"]


def _states(model: R1Model, hidden: Tensor) -> Tensor:
    """Head of the model that stops after the final norm: [b, s, d], 0 at the positions of other processes."""
    states, piece = model.whole_sequence(hidden), context_piece()
    return (states if piece is None else piece.spread(states)).transpose(0, 1)


def _take(array: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Rows of an array; a filler row is a copy of the first one (its results are thrown away)."""
    return np.ascontiguousarray(array[np.maximum(chosen, 0)])


def curve_sums(ctx: ParallelContext, chunks: Sequence[nn.Module], rows: Rows, micro_batch: int) -> tuple[list[float], list[float]]:
    """Per curve: sum of -log p (nats) over its targets, and number of targets. Equal on every rank. Collective."""
    sums = torch.zeros(2, len(rows.curves), dtype=torch.float64, device=ctx.device)

    def consume(losses: Tensor, chosen: np.ndarray) -> None:
        real = chosen[chosen >= 0]
        ids = torch.from_numpy(rows.curve_ids[real]).to(ctx.device).flatten()
        mask = mask_here(torch.from_numpy(rows.batch["loss_mask"][real]).to(ctx.device)).double().flatten()
        kept = losses[: len(real)].double().flatten()
        sums[0].index_add_(0, ids, kept * mask)
        sums[1].index_add_(0, ids, mask)

    run_rows(ctx, chunks, rows, micro_batch, "losses", consume)
    ctx.all_reduce_sum(sums, over="world")
    return sums[0].tolist(), sums[1].tolist()


def states_at(ctx: ParallelContext, chunks: Sequence[nn.Module], rows: Rows, positions: np.ndarray, width: int, micro_batch: int) -> Tensor:
    """Final-norm states [n, width] fp32, one per document of `rows`, at `positions` [n] within it. Equal on every rank. Collective."""
    states = torch.zeros(len(rows.places), width, dtype=torch.float32, device=ctx.device)
    of_row: dict[int, list[tuple[int, int]]] = {}
    for number, ((row, start, _), position) in enumerate(zip(rows.places, positions)):
        of_row.setdefault(row, []).append((number, start + int(position)))

    def consume(hidden: Tensor, chosen: np.ndarray) -> None:
        for b, row in enumerate(chosen):
            for number, column in of_row.get(int(row), ()):
                states[number] = hidden[b, column].float()

    run_rows(ctx, chunks, rows, micro_batch, "hidden", consume)
    return ctx.all_reduce_sum(states, over="world")


def target_bytes(tokenizer: Any, tokens: np.ndarray, mask: np.ndarray | None) -> int:
    """UTF-8 bytes of the text whose tokens are targets; special tokens stand for none."""
    info = tokenizer.info
    special = {info.bos_id, info.eos_id, info.pad_id, *info.chat_ids.values()}

    def count(ids: Sequence[int]) -> int:
        return len(tokenizer.decode([int(i) for i in ids if int(i) not in special]).encode("utf-8"))

    if mask is not None:
        return count(tokens[1:][np.asarray(mask[1:], bool)])
    # A difference of two prefixes: a tokenizer may write the first token of a text differently (a space less).
    return count(tokens) - count(tokens[:1])
