"""Losses of single positions as functions of their logits, with derivatives: the formulas, each written once.

A row loss is called with the logits of some positions and overwrites them with the derivative of each position's loss: what
a chunked output head needs (`ops.linear_loss`), and what the losses on given logits use as well. The vocabulary may be cut
over ranks: `VocabPiece` says which part is here and how to reduce over the others.

Legend: c positions of a chunk, n positions in all, V vocabulary, p pieces it is cut into, k stored teacher entries.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


class VocabPiece(Protocol):
    """Rows `start` to `end` of the vocabulary; `max` and `sum` reduce over the ranks that hold the other pieces."""

    start: int
    end: int

    @property
    def whole(self) -> bool: ...

    def max(self, x: Tensor) -> Tensor: ...

    def sum(self, x: Tensor) -> Tensor: ...


class RowLoss(Protocol):
    """`rows(z, a, b, derive)`: z fp32 [c, V/p], logits of positions a to b = a + c -> losses fp32 [c].

    z is used up; with `derive` it holds d loss / d z afterwards.
    """

    def __call__(self, z: Tensor, a: int, b: int, derive: bool) -> Tensor: ...


@dataclass(frozen=True)
class WholeVocabulary:
    """The piece that is everything."""

    end: int
    start: int = 0
    whole: bool = True

    def max(self, x: Tensor) -> Tensor:
        """x itself."""
        return x

    def sum(self, x: Tensor) -> Tensor:
        """x itself."""
        return x


def _softmax_(z: Tensor, piece: VocabPiece) -> tuple[Tensor, Tensor]:
    """z [c, V/p] becomes exp(z - max); returns (max, sum of the exponentials) [c, 1], over the whole vocabulary."""
    top = piece.max(z.amax(dim=-1, keepdim=True))
    z.sub_(top).exp_()
    return top, piece.sum(z.sum(dim=-1, keepdim=True))


def _locate(ids: Tensor, piece: VocabPiece) -> tuple[Tensor, Tensor]:
    """Whole-vocabulary ids -> (column in this piece, or 0; whether it is here)."""
    here = (ids >= piece.start) & (ids < piece.end)
    return (ids - piece.start).where(here, torch.zeros_like(ids)), here


@dataclass(frozen=True)
class CrossEntropyRows:
    """-log softmax(z)[label]; derivative softmax(z) - onehot(label). labels int64 [n], whole-vocabulary ids."""

    labels: Tensor
    piece: VocabPiece

    def __call__(self, z: Tensor, a: int, b: int, derive: bool) -> Tensor:
        column, here = _locate(self.labels[a:b, None], self.piece)
        picked = self.piece.sum(z.gather(-1, column).masked_fill_(~here, 0.0))
        top, total = _softmax_(z, self.piece)
        if derive:
            z.div_(total).scatter_add_(-1, column, -here.to(z.dtype))
        return (total.log() + top - picked).squeeze(-1)


class TeacherLogits(Protocol):
    """`teacher(a, b)`: the teacher's logits of positions a to b in this piece, [c, V/p], any float type; not kept."""

    def __call__(self, a: int, b: int) -> Tensor: ...


@dataclass(frozen=True)
class DistillRows:
    """T^2 * KL(softmax(t/T) || softmax(z/T)); derivative T * (softmax(z/T) - softmax(t/T))."""

    teacher: TeacherLogits
    temperature: float
    piece: VocabPiece

    def __call__(self, z: Tensor, a: int, b: int, derive: bool) -> Tensor:
        given = self.teacher(a, b)
        t = given.float() if given.dtype != torch.float32 else given.clone()
        if self.temperature != 1.0:
            z.div_(self.temperature)
            t.div_(self.temperature)
        gap = t - z
        top_t, total_t = _softmax_(t, self.piece)
        t.div_(total_t)  # the teacher's probabilities
        gap = self.piece.sum(torch.linalg.vecdot(t, gap).unsqueeze(-1))
        top_s, total_s = _softmax_(z, self.piece)
        if derive:
            z.div_(total_s).sub_(t)
            if self.temperature != 1.0:
                z.mul_(self.temperature)
        kl = gap + (total_s.log() + top_s) - (total_t.log() + top_t)
        return kl.squeeze(-1) * self.temperature**2


@dataclass(frozen=True)
class DistillTopKRows:
    """KL from a teacher known by its k likeliest tokens and the probability r of all others together, times T^2.

    With q = softmax(z/T) and p the stored probabilities: sum_K p (log p - log q) + r (log r - log(1 - sum_K q)). Derivative
    times T: q_v - p_v for v in K, q_v - r q_v / (1 - sum_K q) otherwise. indices int64 [n, k] (whole-vocabulary ids,
    distinct), logprobs [n, k].
    """

    indices: Tensor
    logprobs: Tensor
    temperature: float
    piece: VocabPiece
    vocab_size: int = field(default=0)

    def __call__(self, z: Tensor, a: int, b: int, derive: bool) -> Tensor:
        column, here = _locate(self.indices[a:b], self.piece)
        log_p = self.logprobs[a:b].float()
        p = log_p.exp()
        stated = p.sum(-1, keepdim=True)
        rest = (1.0 - stated).clamp_(min=0.0)
        if self.temperature != 1.0:
            z.div_(self.temperature)
        picked = self.piece.sum(z.gather(-1, column).masked_fill_(~here, 0.0))
        top, total = _softmax_(z, self.piece)
        # Mass outside the stored tokens: added up without them, because subtracting them would lose it to rounding.
        mine = z.gather(-1, column).masked_fill_(~here, 0.0)
        z.scatter_add_(-1, column, -mine)
        others = self.piece.sum(z.sum(dim=-1, keepdim=True)).clamp_(min=torch.finfo(torch.float32).tiny)
        if self.indices.shape[-1] == self.vocab_size:
            rest.zero_()
        log_total = total.log()
        kl = (p * (log_p - picked + top + log_total)).sum(-1, keepdim=True) + torch.xlogy(rest, rest) - rest * (others.log() - log_total)
        if derive:
            # (stated + rest) is 1 but for the rounding of what was stored.
            z.mul_((stated + rest) / total - rest / others)
            z.scatter_add_(-1, column, (mine * ((stated + rest) / total) - p).masked_fill_(~here, 0.0))
            if self.temperature != 1.0:
                z.mul_(self.temperature)
        return kl.squeeze(-1) * self.temperature**2


@dataclass(frozen=True)
class MixedRows:
    """weight * first + (1 - weight) * second."""

    first: RowLoss
    second: RowLoss
    weight: float

    def __call__(self, z: Tensor, a: int, b: int, derive: bool) -> Tensor:
        other = z.clone()
        one, two = self.first(z, a, b, derive), self.second(other, a, b, derive)
        if derive:
            z.mul_(self.weight).add_(other, alpha=1.0 - self.weight)
        return self.weight * one + (1.0 - self.weight) * two
