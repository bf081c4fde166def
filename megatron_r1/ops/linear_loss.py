"""Output head and loss in one operation, a chunk of positions at a time: the logits never exist as a whole.

At an 8192-token vocabulary the head and its loss are more than half of a small model's training step, most of it memory
traffic. Here a chunk's logits are made, turned into losses and derivatives in place (`ops.softmax_rows`), and multiplied into
the two gradients while they are in the cache. That takes the weight each position will have in the sum of losses: the caller
states what it expects (the loss mask), and the backward pass checks that the gradient that arrives is that weight times one
number; if it is not, the gradients are computed again from what did arrive. So the result is right in any case, and fast in
the usual one.

Legend: n positions, d hidden size, V vocabulary, p pieces it is cut into, K probe gradients; W fp32, or fp64 for fp64 weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_r1.ops.influence import wgrad_dot
from megatron_r1.ops.low_rank import Factors
from megatron_r1.ops.row_losses import RowLoss
from megatron_r1.ops.softmax_rows import wide_dtype
from megatron_r1.utils.errors import DataError

# Logits of one chunk: what fits a CPU's caches, and what keeps a GPU busy. Fewer rows than 128 cost more than caches save: every
# chunk reads and writes the whole gradient of the weight.
_CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
_FEWEST_ROWS = 128


def chunks(n: int, row: Tensor) -> Iterator[tuple[int, int]]:
    """Bounds of chunks of n positions, whose logits are each like `row`: as many as are held at a time."""
    step = max(_CHUNK_BYTES.get(row.device.type, 64 << 20) // (row.element_size() * row.numel()), _FEWEST_ROWS)
    return ((a, min(a + step, n)) for a in range(0, n, step))


def _logits(hidden: Tensor, weight: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """(a, b, logits of positions a to b), all in the same memory."""
    room = weight.new_empty(0)
    for a, b in chunks(hidden.shape[0], weight[:, 0]):
        room = room if room.numel() else weight.new_empty(b - a, weight.shape[0])
        yield a, b, torch.mm(hidden[a:b], weight.t(), out=room[: b - a])


def _losses(hidden: Tensor, weight: Tensor, rows: RowLoss) -> Tensor:
    """Losses W [n] without derivatives."""
    result = hidden.new_empty(hidden.shape[0], dtype=wide_dtype(weight.dtype))
    for a, b, z in _logits(hidden, weight):
        result[a:b] = rows(z, a, b)
    return result


class Scorer(Protocol):
    """Hears the derivatives of every chunk. `makes_gradient`: it also adds to the gradient of the weight."""

    makes_gradient: bool

    def add(self, dz: Tensor, hidden: Tensor, a: int, b: int, d_weight: Tensor | None) -> None:
        """Positions a to b: dz [b - a, V/p], derivatives by the logits, and hidden [b - a, d]."""
        ...


def _losses_and_gradients(
    hidden: Tensor, weight: Tensor, rows: RowLoss, shares: Tensor, weight_gradient: bool = True, scorer: Scorer | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Losses W [n] and the gradients of sum(shares * losses): for hidden [n, d] and weight W [V/p, d]."""
    wide = wide_dtype(weight.dtype)
    result = hidden.new_empty(hidden.shape[0], dtype=wide)
    d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=wide) if weight_gradient else None
    for a, b, z in _logits(hidden, weight):
        result[a:b] = rows(z, a, b, shares[a:b])
        torch.mm(z, weight, out=d_hidden[a:b])
        if scorer is not None:
            scorer.add(z, hidden[a:b], a, b, d_weight)
        if d_weight is None or (scorer is not None and scorer.makes_gradient):
            continue
        if weight.dtype == wide:
            d_weight.addmm_(z.t(), hidden[a:b])
        else:
            d_weight += torch.mm(z.t(), hidden[a:b])
    return result, d_hidden, d_weight


@dataclass(frozen=True)
class HeadScores:
    """How far the head's gradient points along K directions, beside the gradient itself, and whom to tell.

    lines: whole directions [K, V/p, d], or factors of them. `hear` is called in the backward pass, in units of the gradient that arrived
    there, with fp64 scores [n, K] of every position, or, along whole directions, [documents, K]: document i is positions cu_seqlens[i]
    to cu_seqlens[i + 1] (int64 on the host), and its scores come with the weight's gradient out of one product (`ops.influence`).
    With a vocabulary in pieces the scores are this piece's part.
    """

    lines: Tensor | Factors
    cu_seqlens: Tensor
    hear: Callable[[Tensor], None]

    def scorer(self, hidden: Tensor) -> _Positions | _Documents:
        """What adds them up."""
        return _Positions(self.lines, hidden) if isinstance(self.lines, Factors) else _Documents(self.lines, self.cu_seqlens, hidden)


class _Positions:
    """Along factors: what every position adds."""

    makes_gradient = False

    def __init__(self, lines: Factors, hidden: Tensor) -> None:
        self.lines = lines
        self.parts = hidden.new_zeros(hidden.shape[0], lines.probes, dtype=torch.float64)

    def add(self, dz: Tensor, hidden: Tensor, a: int, b: int, d_weight: Tensor | None) -> None:
        """See Scorer."""
        self.parts[a:b] = self.lines.scores(hidden, dz)


class _Documents:
    """Along whole directions: sums over documents."""

    makes_gradient = True

    def __init__(self, lines: Tensor, cu_seqlens: Tensor, hidden: Tensor) -> None:
        self.lines, self.ends = lines, cu_seqlens
        self.parts = hidden.new_zeros(len(cu_seqlens) - 1, len(lines), dtype=torch.float64)

    def add(self, dz: Tensor, hidden: Tensor, a: int, b: int, d_weight: Tensor | None) -> None:
        """See Scorer. A document may go on in the next chunk."""
        first, last = int(torch.searchsorted(self.ends, a, right=True)) - 1, int(torch.searchsorted(self.ends, b))
        borders = self.ends[first : last + 1].clamp(a, b) - a
        assert d_weight is not None
        self.parts[first:last] += wgrad_dot(hidden, dz, self.lines, borders, d_weight)


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, rows: RowLoss, expected: Tensor, scores: HeadScores | None) -> Tensor:
        scorer = None if scores is None else scores.scorer(hidden)
        losses, d_hidden, d_weight = _losses_and_gradients(hidden, weight, rows, expected, True, scorer)
        ctx.save_for_backward(hidden, weight, expected, d_hidden, d_weight)
        ctx.rows, ctx.scores, ctx.scorer = rows, scores, scorer
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, expected, d_hidden, d_weight = ctx.saved_tensors
        scores, scorer = ctx.scores, ctx.scorer
        if grad.numel() == 0:
            return d_hidden, d_weight.to(weight.dtype), None, None, None
        largest = expected.abs().argmax()
        factor = grad[largest] / expected[largest]
        if not torch.equal(grad, expected * factor):  # also when nothing was expected: 0/0 equals nothing
            scorer = None if scores is None else scores.scorer(hidden)
            _, d_hidden, d_weight = _losses_and_gradients(hidden, weight, ctx.rows, grad, True, scorer)
        elif factor != 1.0:
            d_hidden, d_weight = d_hidden * factor, d_weight * factor
            if scorer is not None:
                scorer.parts *= factor
        if scores is not None and scorer is not None:
            scores.hear(scorer.parts)
        return d_hidden, d_weight.to(weight.dtype), None, None, None


def linear_loss(hidden: Tensor, weight: Tensor, rows: RowLoss, expected: Tensor | None = None, scores: HeadScores | None = None) -> Tensor:
    """Losses W [n] of the logits hidden @ weight^T, differentiable with respect to both.

    hidden [n, d], weight [V/p, d], any float type, any strides. `expected` [n]: the weights the losses are about to be summed
    with (a loss mask), up to one common factor; None means equal weights. A wrong guess costs time, not correctness.
    With a vocabulary in pieces the gradient of hidden is this piece's part of it. `scores`: told in the backward pass how far
    the weight's gradient points along given directions. Raises DataError on arguments that do not
    fit each other and, on a CPU, on labels outside the vocabulary.
    """
    _check(hidden, weight, rows, expected)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearLoss.apply(hidden.contiguous(), weight.contiguous(), rows, _shares(hidden, weight, expected), scores)
    return _losses(hidden.detach().contiguous(), weight.detach().contiguous(), rows)


def linear_loss_scores(
    hidden: Tensor,
    weight: Tensor,
    rows: RowLoss,
    probes: Tensor,
    cu_seqlens: Tensor,
    expected: Tensor | None = None,
    weight_gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Losses, and how far each document's gradient of the head's weight points along K probe gradients, in one pass.

    Document i is positions cu_seqlens[i] to cu_seqlens[i + 1]; cu_seqlens [documents + 1] int32 or int64, from 0 to n.
    Returns (losses W [n], scores W [documents, K], gradient of hidden [n, d], gradient of weight W [V/p, d], or None without
    `weight_gradient`); gradients and scores are of sum(expected * losses), all ones when None. Not differentiable.
        scores[i, k] = <probes[k], sum over the positions of i of dz^T hidden>,  dz = d(expected * loss)/d(logits)
                     = sum over the positions of i of (dz @ probes[k]) . hidden
    which needs one more product per probe, as large as one of the head's own, and neither the gradient of a document nor a
    second set of logits. probes [K, V/p, d], the rows of this piece; in another type than weight's, dz is converted first.
    With a vocabulary in pieces the scores are summed over them; the gradient of hidden is this piece's part.
    Raises DataError on arguments that do not fit each other.
    """
    _check(hidden, weight, rows, expected)
    with torch.no_grad():
        hidden, weight = hidden.detach().contiguous(), weight.detach().contiguous()
        scorer = _Scorer(hidden, weight, probes.detach(), cu_seqlens)
        shares = _shares(hidden, weight, expected)
        losses, d_hidden, d_weight = _losses_and_gradients(hidden, weight, rows, shares, weight_gradient, scorer)
        return losses, rows.piece.sum(scorer.scores()), d_hidden, d_weight


class _Scorer:
    """Adds up the scores of `linear_loss_scores`, chunk by chunk."""

    makes_gradient = False

    def __init__(self, hidden: Tensor, weight: Tensor, probes: Tensor, cu_seqlens: Tensor) -> None:
        if probes.dim() != 3 or probes.shape[1:] != weight.shape or probes.device != weight.device:
            raise DataError(
                expected=f"probes: [probes, {weight.shape[0]}, {weight.shape[1]}] on {weight.device}, gradients of the head's weight",
                found=f"{tuple(probes.shape)} on {probes.device}",
                fix="pass this rank's rows of the probe gradients of the same weight",
            )
        ends = cu_seqlens.cpu()
        fits = ends.dim() == 1 and ends.dtype in (torch.int32, torch.int64) and ends.numel() > 0
        if not (fits and ends[0] == 0 and ends[-1] == hidden.shape[0] and bool((ends.diff() >= 0).all())):
            raise DataError(
                expected=f"cu_seqlens: whole numbers from 0 to the {hidden.shape[0]} positions, none smaller than the one before it",
                found=f"{ends.dtype} {ends.tolist() if ends.numel() < 9 else tuple(ends.shape)}",
                fix="pass each document's first position, and the number of positions at the end",
            )
        self.probes, self.lengths = probes.contiguous(), ends.long().diff().to(hidden.device)
        # fp64: a document's score is a sum over thousands of positions of either sign.
        self.parts = hidden.new_zeros(hidden.shape[0], probes.shape[0], dtype=torch.float64)
        self.wide = wide_dtype(weight.dtype)

    def add(self, dz: Tensor, hidden: Tensor, a: int, b: int, d_weight: Tensor | None) -> None:
        """Positions a to b, dz [c, V/p] and hidden [c, d]."""
        dz = dz.to(self.probes.dtype)
        for k, probe in enumerate(self.probes):
            self.parts[a:b, k] = torch.linalg.vecdot(torch.mm(dz, probe).to(self.wide), hidden.to(self.wide))

    def scores(self) -> Tensor:
        """W [documents, K]; a document without positions has 0."""
        if self.lengths.numel() == 0:
            return self.parts[:0].to(self.wide)
        return torch.segment_reduce(self.parts, "sum", lengths=self.lengths, axis=0, initial=0.0).to(self.wide)


def _shares(hidden: Tensor, weight: Tensor, expected: Tensor | None) -> Tensor:
    if expected is None:
        return hidden.new_ones(hidden.shape[0], dtype=wide_dtype(weight.dtype))
    return expected.detach().to(wide_dtype(weight.dtype)).contiguous()


def _check(hidden: Tensor, weight: Tensor, rows: RowLoss, expected: Tensor | None) -> None:
    size = rows.piece.end - rows.piece.start
    if weight.dim() != 2 or weight.shape[0] != size or not weight.is_floating_point():
        raise DataError(
            expected=f"weight: [{size}, hidden size], floating point, a row for each token of the piece of the vocabulary",
            found=f"{tuple(weight.shape)} {weight.dtype}",
            fix="pass the output head's weight, and row losses made for its piece of the vocabulary",
        )
    if hidden.dim() != 2 or hidden.shape[1] != weight.shape[1] or hidden.dtype != weight.dtype or hidden.device != weight.device:
        raise DataError(
            expected=f"hidden: [positions, {weight.shape[1]}] {weight.dtype} on {weight.device}, like weight",
            found=f"{tuple(hidden.shape)} {hidden.dtype} on {hidden.device}",
            fix="flatten batch and sequence, and convert to weight's type",
        )
    if expected is not None and expected.shape != hidden.shape[:1]:
        raise DataError(
            expected=f"expected: one number for each of {hidden.shape[0]} positions",
            found=f"shape {tuple(expected.shape)}",
            fix="pass the flattened loss mask, or None",
        )


class _LogitsLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: RowLoss) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.rows = rows
        return _losses_of(logits, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        dz = logits.clone(memory_format=torch.contiguous_format)
        flat, shares = dz.view(-1, dz.shape[-1]), grad.to(wide_dtype(dz.dtype)).reshape(-1)
        if flat.numel():
            for a, b in chunks(flat.shape[0], flat[0]):
                ctx.rows(flat[a:b], a, b, shares[a:b])
        return dz, None


def _losses_of(logits: Tensor, rows: RowLoss) -> Tensor:
    flat = logits.flatten(0, -2)
    result = flat.new_empty(flat.shape[0], dtype=wide_dtype(flat.dtype))
    if flat.numel():
        for a, b in chunks(flat.shape[0], flat[0]):
            result[a:b] = rows(flat[a:b].clone(memory_format=torch.contiguous_format), a, b)
    return result.view(logits.shape[:-1])


def logits_loss(logits: Tensor, rows: RowLoss) -> Tensor:
    """The same losses from given logits [..., V/p] -> W [...]; differentiable. The logits are left alone."""
    if torch.is_grad_enabled() and logits.requires_grad:
        return _LogitsLoss.apply(logits, rows)
    return _losses_of(logits.detach(), rows)
