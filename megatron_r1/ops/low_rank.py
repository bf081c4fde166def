"""Matrices of low rank in place of probe gradients: what a document's score along them costs falls by more than the rank's share.

    G ~ L R^T,   <G, sum over t of b_t a_t^T> ~ sum over t of (L^T b_t).(R^T a_t)          2 T r (dout + din) FLOP for 2 T dout din

and for a matrix g (a document's gradient) the error is at most |g|_F |G - L R^T|_F, which `factor` reports.

Legend: T tokens, K probes, r rank, din/dout width of the layer's input/output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SPARE = 8
_TURNS = 2


@dataclass(frozen=True)
class Factors:
    """K probe gradients: left [dout, K r], right [din, K r], probe after probe."""

    left: Tensor
    right: Tensor
    probes: int

    def sums(self, b: Tensor, a: Tensor) -> Tensor:
        """Products of projections, b [T, K r] and a [T, K r] -> [T, K]; fp32 or wider."""
        wide = torch.promote_types(a.dtype, torch.float32)
        return (a.to(wide) * b).view(len(a), self.probes, -1).sum(-1)

    def scores(self, a: Tensor, b: Tensor) -> Tensor:
        """What each token adds to its document's score, [T, K]: a [T, din] a layer's inputs, b [T, dout] the gradients of what comes out."""
        return self.sums(b @ self.left, a @ self.right)

    def to(self, like: Tensor) -> Factors:
        """On the device and in the type of a tensor."""
        return Factors(self.left.to(like), self.right.to(like), self.probes)


@torch.no_grad()
def factor(g: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """(L [dout, r], R [din, r], |g - L R^T|_F) with r = min(rank, dout, din): close to the best there is, and exact when r is the width.

    Randomised subspace iteration (Halko, Martinsson, Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1) with `_TURNS` power iterations
    and `_SPARE` spare columns: only products and thin QR decompositions. The draw depends on the shape alone and leaves torch's
    generators as they are. g [dout, din] fp32 or wider.
    """
    dout, din = g.shape
    if rank >= din:
        return g, torch.eye(din, dtype=g.dtype, device=g.device), 0.0
    if rank >= dout:
        return torch.eye(dout, dtype=g.dtype, device=g.device), g.t().contiguous(), 0.0
    columns = min(rank + _SPARE, dout, din)
    draw = torch.randn(din, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(g)
    basis = _basis(g @ draw)
    for _ in range(_TURNS):
        basis = _basis(g @ _basis(g.t() @ basis))
    small = basis.t() @ g
    _, turn = torch.linalg.eigh(small.double() @ small.double().t())
    turn = turn[:, -rank:].to(g)
    left, right = basis @ turn, (turn.t() @ small).t().contiguous()
    return left, right, float(torch.linalg.vector_norm(g - left @ right.t(), dtype=torch.float64))


def _basis(columns: Tensor) -> Tensor:
    return torch.linalg.qr(columns)[0]


def stack(pairs: Sequence[tuple[Tensor, Tensor]]) -> Factors:
    """K pairs (L, R) of one rank side by side."""
    left, right = (torch.cat(list(side), dim=1).contiguous() for side in zip(*pairs, strict=True))
    return Factors(left, right, len(pairs))
