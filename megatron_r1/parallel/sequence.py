"""Sequences cut over processes (context parallelism): what `ops.attention` gathers keys and values with.

With p processes a sequence is cut into 2p equal chunks; process i holds chunks i and 2p-1-i, in this order. Under causal
attention a chunk's work grows with its place, so the pairs all have the same amount of it (megatron-core's order).

Legend: s tokens of one process, S = p*s tokens of the whole sequence, p processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1.parallel.mcore import parallel_state
from megatron_r1.utils.errors import ParallelError


@dataclass(frozen=True)
class SequencePiece:
    """Process `rank` of the `size` that share sequences; tokens are the first dimension."""

    rank: int
    size: int
    group: dist.ProcessGroup | None = None

    def gather(self, x: Tensor) -> Tensor:
        """[s, ...] of every process -> [S, ...] in the order of the sequence. Not differentiable."""
        if self.size == 1:
            return x
        self._halves(x.shape[0], 2, "tokens of one process")
        everyone = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(everyone, x.contiguous(), group=self.group)
        chunks = everyone.unflatten(0, (self.size, 2, -1))
        return torch.cat([chunks[:, 0], chunks[:, 1].flip(0)]).flatten(0, 1)

    def scatter_sum(self, x: Tensor) -> Tensor:
        """[S, ...] of every process -> the sum over processes of this one's chunks [s, ...]: the adjoint of `gather`."""
        if self.size == 1:
            return x
        chunks = self._chunks(x)
        ordered = torch.stack([chunks[: self.size], chunks[self.size :].flip(0)], dim=1).flatten(0, 2)
        mine = x.new_empty(x.shape[0] // self.size, *x.shape[1:])
        dist.reduce_scatter_tensor(mine, ordered, group=self.group)
        return mine

    def cut(self, x: Tensor) -> Tensor:
        """This process's chunks [s, ...] of a whole sequence [S, ...]."""
        if self.size == 1:
            return x
        chunks = self._chunks(x)
        return torch.cat([chunks[self.rank], chunks[2 * self.size - 1 - self.rank]])

    def places(self, length: int, device: torch.device | None = None) -> Tensor:
        """Where this process's tokens stand in a whole sequence of `length` tokens: int64 [s], rising."""
        return self.cut(torch.arange(length, device=device))

    def spread(self, x: Tensor) -> Tensor:
        """This process's [s, ...] at its places in a whole sequence [S, ...] of zeros. Differentiable; summed over processes: `gather`."""
        length = self.size * x.shape[0]
        return x.new_zeros(length, *x.shape[1:]).index_copy(0, self.places(length, x.device), x)

    def _chunks(self, x: Tensor) -> Tensor:
        """[S, ...] -> [2p, S / 2p, ...]."""
        self._halves(x.shape[0], 2 * self.size, "tokens of the whole sequence")
        return x.unflatten(0, (2 * self.size, x.shape[0] // (2 * self.size)))

    def _halves(self, tokens: int, parts: int, what: str) -> None:
        if tokens % parts:
            raise ParallelError(
                expected=f"{what} in {parts} equal chunks, with sequences cut over {self.size} processes",
                found=f"{tokens} tokens",
                fix=f"pad the sequence to a multiple of {2 * self.size}",
            )


def context_piece() -> SequencePiece | None:
    """This process's piece of sequences under the present layout; None where sequences are not cut."""
    if not parallel_state.model_parallel_is_initialized() or parallel_state.get_context_parallel_world_size() == 1:
        return None
    return sequence_piece(parallel_state.get_context_parallel_group())


def sequence_piece(group: dist.ProcessGroup | None = None) -> SequencePiece:
    """This process's piece of sequences cut over `group` (None: over all processes)."""
    return SequencePiece(dist.get_rank(group), dist.get_world_size(group), group)
