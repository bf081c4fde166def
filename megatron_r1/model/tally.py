"""Scores of the units (documents) of a micro-batch, added up use by use: what every engine that listens has in common.

    s[u, k] = sum over the parameters' uses and the tokens t of unit u of what the use adds:
        norm gain    (b_t * x_t / rms).d_k
        embedding    b_t . D_k[token_t]
    (linear layers: `ops.influence` and `ops.low_rank`; the head: `ops.linear_loss`)

Legend: T = s*b tokens of a micro-batch of b rows of s tokens, u units, K directions, d hidden size, V/p rows of the vocabulary here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_r1.ops.low_rank import Factors
from megatron_r1.ops.row_losses import VocabPiece


@dataclass
class Tally:
    """Sums of one micro-batch. `cu_seqlens` int64 [u + 1] on the host: first token of each unit, row after row, then T. fp64, because
    a score is a sum over thousands of tokens of either sign."""

    cu_seqlens: Tensor
    directions: int
    device: torch.device
    rows: int = 1
    units: Tensor = field(init=False)  # [u, K]: what comes as a sum over a unit's tokens
    tokens: Tensor = field(init=False)  # [T, K]: what comes token by token, position by position as the model has them ([s, b])
    lengths: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.lengths = self.cu_seqlens.diff().to(self.device)
        count, size = len(self.cu_seqlens) - 1, int(self.cu_seqlens[-1])
        self.units, self.tokens = (torch.zeros(n, self.directions, dtype=torch.float64, device=self.device) for n in (count, size))

    def row_after_row(self, t: Tensor) -> Tensor:
        """[s*b, ...] -> [b*s, ...], in which every unit is in one piece."""
        return t if self.rows == 1 else t.view(-1, self.rows, *t.shape[1:]).transpose(0, 1).reshape(t.shape)

    def total(self) -> Tensor:
        """[u, K]"""
        return self.units + torch.segment_reduce(self.row_after_row(self.tokens), "sum", lengths=self.lengths, axis=0, initial=0.0)


def norm_scores(x: Tensor, b: Tensor, lines: Tensor, eps: float) -> Tensor:
    """[T, K] of a gain: x [T, d] what goes into the norm, b [T, d] the gradient of what comes out, lines [K, d]."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.linalg.vector_norm(x, dim=-1).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return ((x * b) @ lines.to(x.dtype).t()).mul_(scale.unsqueeze(-1))


def embedding_scores(tokens: Tensor, b: Tensor, lines: Tensor | Factors, piece: VocabPiece) -> Tensor:
    """[T, K] of the table: tokens [T], b [T, d], lines [K, V/p, d] or factors of them. Tokens of other processes' pieces of the
    vocabulary are theirs to count."""
    here = (tokens >= piece.start) & (tokens < piece.end)
    index = (tokens - piece.start).where(here, torch.zeros_like(tokens))
    wide = torch.promote_types(b.dtype, torch.float32)
    if isinstance(lines, Factors):
        found = lines.sums(lines.left[index], b @ lines.right)
    else:
        found = torch.stack([torch.linalg.vecdot(b.to(wide), line[index].to(wide)) for line in lines], dim=-1)
    return found if piece.whole else found * here.unsqueeze(-1)
