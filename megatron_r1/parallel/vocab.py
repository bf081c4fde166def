"""The slice of the vocabulary a tensor-parallel rank holds, and the two reductions its softmax needs.

Losses are written against this small interface, so that they need not know about process groups. With tensor: 1 the slice
is everything and the reductions cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1.parallel.mcore import (
    gather_from_tensor_model_parallel_region,
    parallel_state,
    reduce_from_tensor_model_parallel_region,
)


@dataclass(frozen=True)
class VocabShard:
    """Rows `start` to `end` of a vocabulary cut into `parts` pieces; this rank holds piece number start // (end - start)."""

    start: int
    end: int
    parts: int

    @property
    def whole(self) -> bool:
        """Whether this rank holds all of it."""
        return self.parts == 1

    def max(self, x: Tensor) -> Tensor:
        """Elementwise maximum over the pieces. Not differentiable."""
        return self._reduce(x, dist.ReduceOp.MAX)

    def sum(self, x: Tensor) -> Tensor:
        """Elementwise sum over the pieces. Not differentiable (the losses bring their own backward)."""
        return self._reduce(x, dist.ReduceOp.SUM)

    def gather(self, logits: Tensor) -> Tensor:
        """[..., V / parts] of every piece -> [..., V] on every rank; differentiable."""
        return logits if self.whole else gather_from_tensor_model_parallel_region(logits)

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """-log softmax(logits)[label], fp32, differentiable: logits [..., V / parts], labels [...] (whole ids) -> [...].

        For logits that are there anyway; `model.loss.cross_entropy` and the chunked head do the same with less memory.
        """
        z = logits.float()
        z = z - self.max(z.detach().amax(dim=-1, keepdim=True))
        here = (labels >= self.start) & (labels < self.end)
        column = (labels - self.start).where(here, torch.zeros_like(labels))
        picked = z.gather(-1, column.unsqueeze(-1)).squeeze(-1).where(here, torch.zeros((), device=z.device))
        total = z.exp().sum(dim=-1)
        if not self.whole:
            # Summed over the pieces; the gradient of each piece is its own, so it passes unchanged.
            picked, total = reduce_from_tensor_model_parallel_region(picked), reduce_from_tensor_model_parallel_region(total)
        return total.log() - picked

    def _reduce(self, x: Tensor, op: dist.ReduceOp) -> Tensor:
        if not self.whole:
            x = x.contiguous()
            dist.all_reduce(x, op=op, group=parallel_state.get_tensor_model_parallel_group())
        return x


def vocab_shard(vocab_size: int) -> VocabShard:
    """This rank's piece of `vocab_size` rows under the current layout (whole when no layout was set up)."""
    if not parallel_state.model_parallel_is_initialized():
        return VocabShard(0, vocab_size, 1)
    parts = parallel_state.get_tensor_model_parallel_world_size()
    each = vocab_size // parts
    start = parallel_state.get_tensor_model_parallel_rank() * each
    return VocabShard(start, start + each, parts)
