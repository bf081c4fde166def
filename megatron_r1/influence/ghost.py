"""The ghost engine: scores of all rows of a batch along K directions from one forward and one backward pass.

    s[i, k] = <grad L_i, d_k> = sum over the parameters' uses and the tokens t of row i of

        linear       b_t^T D a_t            (Column- and RowParallelLinear: fused qkv, fused gate and up, ...)
        norm gain    (b_t * x_t / rms).d
        embedding    b_t . D[token_t]
        head         dz_t^T D h_t           (inside the chunked loss: the logits never exist as a whole)

where a_t goes into a layer, b_t is the gradient of the loss at what comes out, and D is the direction's part for that weight. The
weights are frozen, so that product takes the place of the one for the weight's gradient, which is never formed. A tied embedding
is one parameter: both of its uses meet the same, whole D, and what they have in common is counted once.

Row i has to be on its own for this: where attention looks across rows, a token's contribution to b reaches the parameters at
another row's positions, and a sum over positions is no longer the gradient of L_i (off by half, measured). Such batches are
refused.

Layouts: every process adds up its uses (`model.taps` counts each once); the sums of a whole model copy are joined by one
all-reduce of [rows, K] at the end.

Legend: T tokens and n rows of a batch, K directions, d hidden size, V/p rows of the vocabulary here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron_r1.influence.rows import Batch, PackedBatch, Row, packed
from megatron_r1.model.build import R1Model
from megatron_r1.model.forward import positions_here
from megatron_r1.model.tally import Tally, embedding_scores, norm_scores
from megatron_r1.model.taps import Listener, Use, parameters_of
from megatron_r1.ops.influence import grad_dot
from megatron_r1.ops.linear_loss import linear_loss_scores
from megatron_r1.ops.row_losses import CrossEntropyRows
from megatron_r1.parallel.context import ParallelContext
from megatron_r1.parallel.schedule import forward_backward
from megatron_r1.parallel.sequence import context_piece
from megatron_r1.utils.errors import CheckpointError, DataError


@dataclass
class _Micro:
    """A batch on its way, and what was heard of it."""

    tensors: Batch
    cu_seqlens: Tensor  # of the whole rows
    tally: Tally


@dataclass(frozen=True)
class _Lines:
    """The directions' parts for one parameter, [k, ...], and the k columns of the scores they belong to: a direction that is zero
    there costs nothing."""

    parts: Tensor
    columns: list[int]


class Ghost:
    """Scores packed rows along directions. The weights are left alone; any float type of theirs will do (bf16 rounds as training in
    bf16 does)."""

    def __init__(self, chunks: Sequence[nn.Module], ctx: ParallelContext) -> None:
        """`chunks`: this process' part of the model, wrapped or not. Raises DataError when a parameter can not be heard."""
        self.chunks, self.ctx = list(chunks), ctx
        self._listener = Listener(chunks, ctx, self._hear)
        self.parameters = parameters_of(chunks)
        self._lines: dict[str, _Lines] = {}

    def pack(self, rows: Sequence[Row], batch_tokens: int) -> list[PackedBatch]:
        """Rows packed as this layout needs them: cut sequences in equal pieces, a pipeline's batches of one length."""
        layout = self.ctx.layout
        return packed(rows, batch_tokens, self.ctx.device, multiple=layout.sequence_multiple, even=layout.pipeline > 1)

    @torch.enable_grad()
    def scores(
        self,
        directions: Sequence[Mapping[str, Tensor]],
        batches: Sequence[PackedBatch],
        advance: Callable[[int], None] = lambda _: None,
        name: Callable[[int], str] = "row {}".format,
    ) -> np.ndarray:
        """<grad of a row's summed loss, direction>: float64 [rows, K], rows as before they were packed; positive = benefit. Collective.

        directions: parameter name -> this process' part. advance: told the tokens of each batch when it is done. `name`: how to
        call row i in an error. Raises DataError when rows of a batch could see each other or a score is not a number,
        CheckpointError when a direction lacks a parameter.
        """
        for batch in batches:
            require_separate(batch.tensors, batch.cu_seqlens)
        self._lines = self._stack(directions)
        micros = [self._micro(batch.tensors, batch.cu_seqlens, len(directions)) for batch in batches]
        try:
            with self._listener.attached():
                self._run(micros, advance)
        finally:
            self._lines = {}
        found = np.zeros((sum(len(batch.positions) for batch in batches), len(directions)))
        if micros:
            sums = self.ctx.all_reduce_sum(torch.cat([micro.tally.total() for micro in micros]), over="model").cpu().numpy()
            ends = np.cumsum([len(micro.tally.cu_seqlens) - 1 for micro in micros])
            for batch, last, micro in zip(batches, ends, micros):
                first = last - len(micro.tally.cu_seqlens) + 1
                found[batch.positions] = sums[first : first + len(batch.positions)]
        _require_numbers(found, name)
        return found

    def _micro(self, tensors: Batch, cu_seqlens: Tensor, directions: int) -> _Micro:
        piece = context_piece()
        # Of every row the tokens that are here: they stand together, in order.
        here = cu_seqlens if piece is None else torch.searchsorted(piece.places(int(cu_seqlens[-1])), cu_seqlens)
        return _Micro(tensors, cu_seqlens, Tally(here, directions, tensors["tokens"].device))

    def _run(self, micros: list[_Micro], advance: Callable[[int], None]) -> None:
        first = self.chunks[0]

        def step(stream: Iterator[_Micro], chunk: nn.Module) -> tuple[Tensor, Any]:
            micro = next(stream)
            self._listener.begin(micro, micro.tensors["segment_ids"])
            out = chunk(micro.tensors["tokens"], micro.tensors["segment_ids"], lambda bare, states: self._head(bare, states, micro))
            if chunk is first:
                advance(micro.tensors["tokens"].numel())
            nothing = torch.zeros((), dtype=torch.int, device=out.device)
            return out, lambda total: (total, nothing, {})

        if not micros:
            return
        if self.ctx.layout.virtual_pipeline:
            # The interleaved schedule wants a multiple of the stages: batches in which nothing counts fill it up.
            micros = micros + [self._blank(micros[-1]) for _ in range(-len(micros) % self.ctx.pipeline_size)]
        length = micros[0].tensors["tokens"].shape[1]
        forward_backward(self.ctx, self.chunks, step, iter(micros), len(micros), length, 1)

    def _blank(self, like: _Micro) -> _Micro:
        tensors = {name: tensor.clone() for name, tensor in like.tensors.items()}
        tensors["loss_mask"].zero_()
        return self._micro(tensors, like.cu_seqlens, like.tally.directions)

    def _head(self, chunk: R1Model, states: Tensor, micro: _Micro) -> Tensor:
        """Sum of the losses; its backward is what adds the head's scores."""
        name = next(tap.name for tap in self._listener.taps if tap.kind == "head")
        rows = CrossEntropyRows(positions_here(micro.tensors["labels"]).flatten(), chunk.vocabulary)
        hidden = chunk.to_head(states).flatten(0, 1)
        return chunk.with_head_weight(
            lambda weight: _ScoredLoss.apply(hidden, weight, rows, self._lines[name].parts, micro, self.ctx.tensor_rank == 0)
        )

    def _hear(self, use: Use) -> None:
        lines, columns, tally = self._lines[use.tap.name].parts, self._lines[use.tap.name].columns, use.ticket.tally
        if not columns:
            return
        if use.tap.kind == "linear":
            tally.units[:, columns] += grad_dot(use.inputs, use.gradient, lines, tally.cu_seqlens)
            return
        if use.tap.kind == "norm":
            heard = norm_scores(use.inputs, use.gradient, lines, use.tap.module.eps)
        else:
            heard = embedding_scores(use.inputs, use.gradient, lines, self._listener.chunks[0].vocabulary)
        tally.tokens[use.first : use.first + len(heard), columns] += heard

    def _stack(self, directions: Sequence[Mapping[str, Tensor]]) -> dict[str, _Lines]:
        """For every parameter, in its type."""
        absent = [name for name in self.parameters if any(name not in direction for direction in directions)]
        if absent or not directions:
            raise CheckpointError(
                expected="at least one direction, with a part for every parameter",
                found=f"none for {len(absent)}, such as {absent[0]}" if absent else "no direction",
                fix="score along gradients of this very model",
            )
        # The head's scores are summed over pieces of the vocabulary, so that all processes must have the same columns there.
        whole = {tap.name for tap in self._listener.taps if tap.kind == "head"}
        found = {}
        for name, parameter in self.parameters.items():
            columns = [k for k, direction in enumerate(directions) if name in whole or bool(direction[name].any())]
            parts = [directions[k][name].to(parameter) for k in columns]
            # A single one is not copied.
            stacked = torch.stack(parts) if len(parts) > 1 else parts[0].unsqueeze(0) if parts else parameter.new_empty(0)
            found[name] = _Lines(stacked, columns)
        return found


class _ScoredLoss(torch.autograd.Function):
    """The head and its loss: [T, d] -> sum of the losses that count. Weight and directions are constants."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, rows: CrossEntropyRows, lines: Tensor, micro: _Micro, counts: bool) -> Tensor:
        mask = positions_here(micro.tensors["loss_mask"]).flatten()
        losses, scores, d_hidden, _ = linear_loss_scores(hidden, weight, rows, lines, micro.tally.cu_seqlens, mask, weight_gradient=False)
        ctx.save_for_backward(scores, d_hidden)
        ctx.micro, ctx.counts = micro, counts
        return (losses * mask).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scores, d_hidden = ctx.saved_tensors
        if ctx.counts:
            # Summed over the pieces of the vocabulary already: one process counts it.
            ctx.micro.tally.units += scores
        return d_hidden * gradient.to(d_hidden.dtype), None, None, None, None, None


def require_separate(batch: Batch, cu_seqlens: Tensor) -> None:
    """Refuse a batch whose rows could see each other. Raises DataError with the way out."""
    shape, segments = tuple(batch["tokens"].shape), batch.get("segment_ids")
    fix = (
        "pack with influence.rows.packed, which numbers the rows; or score with engine: finite_differences, which counts the loss of a "
        "row's tokens whatever they could see"
    )
    if shape[0] != 1:
        raise DataError(expected="one row of tokens [1, T] with documents one behind the other", found=f"tokens {list(shape)}", fix=fix)
    if len(cu_seqlens) < 3:
        return
    if segments is None:
        raise DataError(
            expected="attention that stops where documents meet (segment_ids [1, T])",
            found=f"{len(cu_seqlens) - 1} documents in a row, and no segment_ids: each sees all before it",
            fix=fix,
        )
    ids = segments.flatten().cpu()
    borders = cu_seqlens[1:-1]
    leaking = (ids[borders] == ids[borders - 1]).nonzero().flatten()
    if len(leaking):
        at = int(leaking[0])
        raise DataError(
            expected="a new segment id where a document begins",
            found=f"documents {at} and {at + 1} of a row with the same one: they see each other ({len(leaking)} such places)",
            fix=fix,
        )


def _require_numbers(scores: np.ndarray, name: Callable[[int], str]) -> None:
    bad = np.flatnonzero(~np.isfinite(scores).all(axis=1)).tolist()
    if bad:
        every = len(bad) == len(scores)
        raise DataError(
            expected="gradients that are numbers",
            found=f"a score of {scores[bad[0]].tolist()} for {name(bad[0])}" + (", and for all others" if every else f" ({len(bad)} of {len(scores)} rows)"),
            fix="check that the checkpoint's training did not diverge" if every else "leave the document out, or look for what is wrong with it",
        )
