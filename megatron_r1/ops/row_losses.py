"""Losses of single positions as functions of their logits, with derivatives: the formulas, each written once.

A row loss is called with the logits of some positions and overwrites them with the derivative of each position's loss: what
a chunked output head needs (`ops.linear_loss`), and what the losses on given logits use as well. The vocabulary may be cut
over ranks: `VocabPiece` says which part is here and how to reduce over the others.

Every loss here is a combination of the same few sums over a row's exponentials, so one pass over the logits makes the sums
(`softmax_rows.row_stats`), a second one the derivative (`softmax_rows.softmax_grad_`), also for a mixture of two losses.

Legend: c positions of a chunk, n positions in all, V vocabulary, p pieces it is cut into, k stored teacher entries, T
temperature; W fp32, or fp64 for fp64 logits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from megatron_r1.ops.softmax_rows import (
    CROSS,
    HARD_SUM,
    SUM,
    TEACHER_SUM,
    TEACHER_TOP,
    TOP,
    numbers,
    row_stats,
    softmax_grad_,
    wide_dtype,
)
from megatron_r1.utils.errors import DataError


class VocabPiece(Protocol):
    """Rows `start` to `end` of the vocabulary; `max` and `sum` reduce over the ranks that hold the other pieces.

    Both may overwrite what they are given.
    """

    start: int
    end: int

    @property
    def whole(self) -> bool: ...

    def max(self, x: Tensor) -> Tensor: ...

    def sum(self, x: Tensor) -> Tensor: ...


class RowLoss(Protocol):
    """`rows(z, a, b, shares)`: z [c, V/p], logits of positions a to b = a + c, any float type -> losses W [c].

    z is used up. With `shares` W [c] it holds share * d loss / d z afterwards, in its own type, rounded once. NaN among the
    logits of a position is its loss.
    """

    @property
    def piece(self) -> VocabPiece: ...

    def __call__(self, z: Tensor, a: int, b: int, shares: Tensor | None = None) -> Tensor: ...


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


class TeacherLogits(Protocol):
    """`teacher(a, b)`: the teacher's logits of positions a to b in this piece, [c, V/p], any float type; not kept."""

    def __call__(self, a: int, b: int) -> Tensor: ...


@dataclass(frozen=True)
class CrossEntropyRows:
    """-log softmax(z)[label]; derivative softmax(z) - onehot(label). labels int64 [n], whole-vocabulary ids.

    A label outside the vocabulary is an error: DataError on a CPU, a failed device assertion elsewhere.
    """

    labels: Tensor
    piece: VocabPiece

    def __call__(self, z: Tensor, a: int, b: int, shares: Tensor | None = None) -> Tensor:
        return _evaluate(z, a, b, shares, self.piece, self, None, 1.0)


@dataclass(frozen=True)
class DistillRows:
    """T^2 * KL(softmax(t/T) || softmax(z/T)); derivative T * (softmax(z/T) - softmax(t/T))."""

    teacher: TeacherLogits
    temperature: float
    piece: VocabPiece

    def __call__(self, z: Tensor, a: int, b: int, shares: Tensor | None = None) -> Tensor:
        return _evaluate(z, a, b, shares, self.piece, None, self, 0.0)


@dataclass(frozen=True)
class DistillTopKRows:
    """KL from a teacher known by its k likeliest tokens and the probability r of all others together, times T^2.

    With q = softmax(z/T) and p the stored probabilities: sum_K p (log p - log q) + r (log r - log(1 - sum_K q)). Derivative
    times T: q_v - p_v for v in K, q_v - r q_v / (1 - sum_K q) otherwise. indices int64 [n, k] (whole-vocabulary ids,
    distinct; one outside the vocabulary is an error as in CrossEntropyRows), logprobs [n, k].
    """

    indices: Tensor
    logprobs: Tensor
    temperature: float
    piece: VocabPiece
    vocab_size: int = field(default=0)

    def __call__(self, z: Tensor, a: int, b: int, shares: Tensor | None = None) -> Tensor:
        return _evaluate(z, a, b, shares, self.piece, None, self, 0.0)


@dataclass(frozen=True)
class MixedRows:
    """weight * first + (1 - weight) * second. Cross-entropy first and a distillation second cost one pass, not two."""

    first: RowLoss
    second: RowLoss
    weight: float

    @property
    def piece(self) -> VocabPiece:
        """The piece of the vocabulary both losses are of."""
        return self.first.piece

    def __call__(self, z: Tensor, a: int, b: int, shares: Tensor | None = None) -> Tensor:
        if isinstance(self.first, CrossEntropyRows) and isinstance(self.second, DistillRows | DistillTopKRows):
            return _evaluate(z, a, b, shares, self.piece, self.first, self.second, self.weight)
        other = z.clone()
        one, two = self.first(z, a, b, shares), self.second(other, a, b, shares)
        if shares is not None:
            z.mul_(self.weight).add_(other, alpha=1.0 - self.weight)
        return self.weight * one + (1.0 - self.weight) * two


def _locate(ids: Tensor, piece: VocabPiece) -> tuple[Tensor, Tensor]:
    """Whole-vocabulary ids -> (column in this piece, or 0; whether it is here)."""
    here = (ids >= piece.start) & (ids < piece.end)
    return (ids - piece.start).where(here, 0), here


def _expect_found(found: Tensor, ids: Tensor, argument: str) -> None:
    """`found`: how many pieces have each of `ids`."""
    fine = found == 1
    if ids.device.type != "cpu":
        # Not waited for: a check on the host would stop the stream at every chunk.
        torch._assert_async(fine.all(), f"{argument}: an id outside the vocabulary")
    elif not bool(fine.all()):
        raise DataError(
            expected=f"{argument}: ids of the vocabulary",
            found=f"{int(ids[~fine][0])}, which no part of the vocabulary has",
            fix="tokenize with the model's own tokenizer, and mask positions by the loss mask, not by a label",
        )


def _gather(z: Tensor, column: Tensor, here: Tensor) -> Tensor:
    """z at `column`, W, 0 where it is not in this piece."""
    return z.gather(-1, column).to(wide_dtype(z.dtype)).masked_fill_(~here, 0.0)


def _teacher_logits(soft: DistillRows, z: Tensor, a: int, b: int) -> Tensor:
    t = soft.teacher(a, b)
    if t.shape != z.shape:
        raise DataError(
            expected=f"teacher: logits of the student's shape {tuple(z.shape)} for positions {a} to {b}",
            found=f"{tuple(t.shape)}",
            fix="distil from a teacher with the same tokenizer and vocabulary, on the same batch",
        )
    if (t.dtype == torch.float64) != (z.dtype == torch.float64):
        t = t.to(z.dtype)
    return t if t.stride(-1) == 1 else t.contiguous()


def _reduce(stats: Tensor, extra: Tensor, piece: VocabPiece, inv_temperature: float) -> tuple[Tensor, Tensor]:
    """`row_stats` of this piece -> of the whole vocabulary; `extra` [c, e] -> its sum over the pieces."""
    if piece.whole:
        return stats, extra
    local = stats[:, [TOP, TEACHER_TOP]]
    tops = piece.max(local.clone())
    # How far this piece's largest entries lie below the largest of all; -inf minus -inf is no distance.
    fall = (local - tops).masked_fill_(local == tops, 0.0)
    student, teacher = torch.exp(fall * inv_temperature).unbind(1)
    sums = torch.stack([stats[:, SUM] * student, stats[:, HARD_SUM] * torch.exp(fall[:, 0]), stats[:, TEACHER_SUM] * teacher, stats[:, CROSS] * teacher], 1)
    sums, extra = piece.sum(torch.cat([sums, extra], 1)).split([4, extra.shape[1]], 1)
    return torch.cat([tops[:, :1], sums[:, :2], tops[:, 1:], sums[:, 2:]], 1), extra


def _evaluate(
    z: Tensor,
    a: int,
    b: int,
    shares: Tensor | None,
    piece: VocabPiece,
    hard: CrossEntropyRows | None,
    soft: DistillRows | DistillTopKRows | None,
    weight: float,
) -> Tensor:
    """weight * hard + (1 - weight) * soft, and z becomes shares times the derivative; see RowLoss."""
    t = soft.temperature if soft is not None else 1.0
    teacher = _teacher_logits(soft, z, a, b) if isinstance(soft, DistillRows) else None
    stored = _Stored(soft, z, a, b) if isinstance(soft, DistillTopKRows) else None
    labels = column = None
    extra = [z.new_empty(z.shape[0], 0, dtype=wide_dtype(z.dtype))]
    if hard is not None:
        labels = hard.labels[a:b, None]
        column, here = _locate(labels, piece)
        extra += [_gather(z, column, here), here.to(extra[0].dtype)]
        column = column.where(here, -1).squeeze(-1)
    if stored is not None:
        extra += [stored.mine, stored.here.to(stored.mine.dtype)]
        stored.take_out(z)
    apart = hard is not None and t != 1.0  # whether the two losses have exponentials of their own
    stats, summed = _reduce(row_stats(z, teacher, 1.0 / t, apart), torch.cat(extra, 1), piece, 1.0 / t)

    top, total, hard_total = stats[:, TOP], stats[:, SUM], stats[:, HARD_SUM if apart else SUM]
    whole_top = top
    if hard is not None:
        picked, found = summed[:, 0], summed[:, 1:2]
        _expect_found(found, labels, "labels")
        summed = summed[:, 2:]
    if stored is not None:
        found = stored.join(summed, top, total, hard_total if apart else None)
        _expect_found(found, stored.indices, "indices")
        whole_top, total, hard_total = stored.top, stored.total, stored.hard_total if apart else stored.total

    losses = 0.0
    if hard is not None:
        losses = weight * (hard_total.log() + (whole_top - picked))
    if stored is not None:
        losses = losses + (1.0 - weight) * t**2 * stored.divergence()
    elif soft is not None:
        kl = stats[:, CROSS] / stats[:, TEACHER_SUM] + (top - stats[:, TEACHER_TOP]) / t + total.log() - stats[:, TEACHER_SUM].log()
        losses = losses + (1.0 - weight) * t**2 * kl
    if shares is None:
        return losses

    pick = shares * weight if hard is not None else None
    soft_share = shares * ((1.0 - weight) * t)
    # Scales of exp((z - top) / T) and exp(z - top), `top` being the largest entry the kernel will see.
    soft_scale, hard_scale = (soft_share / total if soft is not None else None), (pick / hard_total if hard is not None else None)
    if stored is not None:
        soft_scale, hard_scale = stored.scales(soft_share, pick, apart)
        column = stored.not_among(labels, column)
    scale = hard_scale if soft_scale is None else soft_scale if hard_scale is None or apart else soft_scale + hard_scale
    teaching = (stats[:, TEACHER_TOP], soft_share / stats[:, TEACHER_SUM]) if teacher is not None else (None, None)
    softmax_grad_(z, numbers(top, scale, hard_scale if apart else None, *teaching, pick), teacher, column, 1.0 / t, apart)
    if stored is not None:
        stored.put_in(z, soft_share, pick, labels, apart)
    return losses


class _Stored:
    """The k stored tokens of a chunk's positions, whose logits are handled apart from the rest of the row.

    They are taken out of the row (set to -inf) before the sums are made, so that the mass of all other tokens is a sum of its
    own: as a difference of two sums it would be lost to rounding where the k have nearly all the mass.
    """

    def __init__(self, loss: DistillTopKRows, z: Tensor, a: int, b: int) -> None:
        wide = wide_dtype(z.dtype)
        self.t, self.all = loss.temperature, loss.indices.shape[-1] == loss.vocab_size
        self.indices, self.log_p = loss.indices[a:b], loss.logprobs[a:b].to(wide)
        self.column, self.here = _locate(self.indices, loss.piece)
        self.mine = _gather(z, self.column, self.here)
        self.p = self.log_p.exp()
        self.stated = self.p.sum(-1)

    def take_out(self, z: Tensor) -> None:
        """z becomes -inf at the stored tokens, NaN where it was NaN or +inf."""
        z.scatter_add_(-1, self.column, torch.zeros_like(self.mine).masked_fill_(self.here, -torch.inf).to(z.dtype))

    def join(self, summed: Tensor, other_top: Tensor, other_total: Tensor, other_hard: Tensor | None) -> Tensor:
        """The sums of the whole row, from those of the other tokens and the stored ones; returns how many pieces have each."""
        logits, found = summed.chunk(2, 1)
        self.top = torch.maximum(other_top, logits.amax(-1))
        self.below = other_top - self.top  # of the others' largest
        self.others, self.shrink = other_total, torch.exp(self.below / self.t)
        self.x = (logits - self.top.unsqueeze(-1)) / self.t
        self.e = self.x.exp()
        self.total = other_total * self.shrink + self.e.sum(-1)
        if other_hard is not None:
            self.hard_shrink, self.hard_e = torch.exp(self.below), torch.exp(self.x * self.t)
            self.hard_total = other_hard * self.hard_shrink + self.hard_e.sum(-1)
        # The teacher's mass on other tokens; there is none where there are no others.
        rest = (1.0 - self.stated).clamp_(min=0.0)
        self.rest = torch.zeros_like(rest) if self.all else rest.masked_fill(other_total == 0, 0.0)
        return found

    def divergence(self) -> Tensor:
        """KL [c] without the factor T^2."""
        log_total = self.total.log()
        inside = (torch.xlogy(self.p, self.p) - self.p * (self.x - log_total.unsqueeze(-1))).sum(-1)
        outside = self.rest * (self.rest.log() - (self.others.log() + self.below / self.t - log_total))
        return inside + outside.masked_fill(self.rest == 0, 0.0)

    def scales(self, soft_share: Tensor, hard_share: Tensor | None, apart: bool) -> tuple[Tensor, Tensor | None]:
        """Scales of exp((z - t) / T) and exp(z - t) for the other tokens, t being the largest among them."""
        # (stated + rest) is 1 but for the rounding of what was stored.
        others = self.others.clamp(min=torch.finfo(self.others.dtype).tiny)
        soft = soft_share * ((self.stated + self.rest) * self.shrink / self.total - self.rest / others)
        if hard_share is None:
            return soft, None
        return soft, hard_share * self.hard_shrink / self.hard_total if apart else hard_share * self.shrink / self.total

    def not_among(self, labels: Tensor | None, column: Tensor | None) -> Tensor | None:
        """Labels' columns without those of stored tokens, whose derivative `put_in` makes as a whole."""
        return None if labels is None else column.masked_fill((self.indices == labels).any(-1), -1)

    def put_in(self, z: Tensor, soft_share: Tensor, hard_share: Tensor | None, labels: Tensor | None, apart: bool) -> None:
        """The derivative at the stored tokens, where the kernel left 0."""
        stated = (self.stated + self.rest) / self.total
        made = soft_share.unsqueeze(-1) * (self.e * stated.unsqueeze(-1) - self.p)
        if hard_share is not None:
            e, total = (self.hard_e, self.hard_total) if apart else (self.e, self.total)
            made += hard_share.unsqueeze(-1) * (e / total.unsqueeze(-1) - (self.indices == labels).to(e.dtype))
        z.scatter_add_(-1, self.column, made.masked_fill_(~self.here, 0.0).to(z.dtype))
