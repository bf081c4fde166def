"""Scores of the documents a training step is about to learn from, taken from its own forward and backward passes.

    s[u, k] = <grad L_u, D_k>,  L_u: summed loss of unit u at the weights of the step,  D_k: a direction from some steps ago

by the same sums over uses as the ghost engine's (`model.taps`, `model.tally`), with the weights' gradients made as ever:

    low rank    D_k ~ L_k R_k^T for every matrix: two thin products beside each layer's own; training's arithmetic is untouched
    full rank   the layer's weight gradient and the scores in one pass over its inputs and output gradients (`ops.influence.wgrad_dot`)

Scores are in units of the plain sum of a unit's losses: megatron-core divides by the number of tokens after the backward passes.
A unit has to be on its own in attention; where documents of a row see each other the row is one unit.

Layouts: every process adds up its uses, one all-reduce of [units, K] per step joins those of a model copy. Under tensor parallelism
low-rank factors are of each process' part.

Legend: b rows of s tokens of a micro-batch, u units, K directions, d hidden size, V/p rows of the vocabulary here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megatron_r1.model.tally import Tally, embedding_scores, norm_scores
from megatron_r1.model.taps import Listener, Use, parameters_of
from megatron_r1.ops.influence import wgrad_dot
from megatron_r1.ops.linear_loss import HeadScores
from megatron_r1.ops.low_rank import Factors
from megatron_r1.parallel.context import ParallelContext
from megatron_r1.parallel.ddp import gradient_added
from megatron_r1.utils.errors import CheckpointError, ParallelError

Lines = dict[str, "Tensor | Factors"]
"""Parameter name -> K directions' parts [K, ...], or factors of them."""


class ScoresInTraining:
    """Listens to training steps. `aim` first; then, for every micro-batch, `begin` before its forward pass; `take` after the step."""

    def __init__(self, chunks: Sequence[nn.Module], ctx: ParallelContext, full: bool) -> None:
        """`chunks`: wrapped for training. `full`: directions come whole, not as factors. Raises DataError as `taps.find_taps`,
        ParallelError where sequences are cut over processes."""
        if ctx.layout.context > 1:
            raise ParallelError(
                expected="whole sequences for scores in training", found=f"context: {ctx.layout.context}",
                fix="set layout.context to 1, or score checkpoints with an influence step, which takes cut sequences",
            )
        self.chunks, self.ctx, self.full = list(chunks), ctx, full
        self.parameters = parameters_of(chunks)
        self._listener = Listener(chunks, ctx, self._hear)
        self._head = next((tap.name for tap in self._listener.taps if tap.kind == "head"), None)
        self._lines: Lines = {}
        self._directions = 0
        self._tallies: dict[int, Tally] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Steps inside of the block can be heard."""
        with self._listener.attached("left to hear" if self.full else "trained"):
            yield

    @property
    def aimed(self) -> bool:
        """Whether there are directions."""
        return bool(self._lines)

    def aim(self, lines: Mapping[str, Tensor | Factors], directions: int) -> None:
        """Score along these from now on; along nothing with an empty mapping. Raises CheckpointError when a parameter has no part."""
        absent = [name for name in self.parameters if name not in lines]
        if lines and absent:
            raise CheckpointError(
                expected="directions with a part for every parameter", found=f"none for {len(absent)}, such as {absent[0]}",
                fix="score along gradients of this very model",
            )
        self._lines = {name: line.to(self.parameters[name]) for name, line in lines.items()}
        self._directions = directions

    def begin(self, number: int, segment_ids: Tensor, cu_seqlens: Tensor) -> HeadScores | None:
        """A micro-batch is about to go through a chunk. `number` tells it from others of the step; segment_ids [b, s], the very tensor
        the chunk gets; cu_seqlens int64 [u + 1] on the host: first token of each unit in [b*s], then b*s. Returns what the loss is to
        tell, where there is one."""
        if number not in self._tallies:
            self._tallies[number] = Tally(cu_seqlens, self._directions, segment_ids.device, len(segment_ids))
        tally = self._tallies[number]
        self._listener.begin(tally, segment_ids)
        if self._head is None:
            return None
        lines = self._lines[self._head]

        def hear(parts: Tensor) -> None:
            if isinstance(lines, Factors):
                tally.tokens += parts
            else:
                tally.units += parts

        return HeadScores(lines, cu_seqlens, hear)

    def take(self) -> list[tuple[int, Tensor]]:
        """(number, scores fp64 [u, K]) of the micro-batches since the last call, by number. Collective over a model copy."""
        self._listener.end()
        tallies, self._tallies = dict(sorted(self._tallies.items())), {}
        if not tallies:
            return []
        sums = self.ctx.all_reduce_sum(torch.cat([tally.total() for tally in tallies.values()]), over="model")
        return list(zip(tallies, sums.split([len(tally.units) for tally in tallies.values()])))

    def _hear(self, use: Use) -> None:
        lines, tally = self._lines[use.tap.name], use.ticket
        if use.tap.kind == "linear" and isinstance(lines, Tensor):
            self._hear_whole(use, lines, tally)
            return
        if use.tap.kind == "linear":
            assert isinstance(lines, Factors)
            heard = lines.scores(use.inputs, use.gradient)
        elif use.tap.kind == "norm":
            assert isinstance(lines, Tensor)
            heard = norm_scores(use.inputs, use.gradient, lines, use.tap.module.eps)
        else:
            heard = embedding_scores(use.inputs, use.gradient, lines, self._listener.chunks[0].vocabulary)
        tally.tokens[use.first : use.first + len(heard)] += heard

    def _hear_whole(self, use: Use, lines: Tensor, tally: Tally) -> None:
        weight = use.tap.module.weight
        a, b = tally.row_after_row(use.inputs), tally.row_after_row(use.gradient)
        tally.units += wgrad_dot(a, b, lines, tally.cu_seqlens, weight.main_grad)
        gradient_added(self.chunks, weight)
