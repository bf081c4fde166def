"""Output head and loss in one operation, a chunk of positions at a time: the logits never exist as a whole.

At an 8192-token vocabulary the head and its loss are more than half of a small model's training step, most of it memory
traffic. Here a chunk's logits are made, turned into losses and derivatives, and multiplied into the two gradients while they
are in the cache. That takes the weight each position will have in the sum of losses: the caller states what it expects (the
loss mask), and the backward pass checks that the gradient that arrives is that weight times one number; if it is not, the
gradients are computed again from what did arrive. So the result is right in any case, and fast in the usual one.

Legend: n positions, d hidden size, V vocabulary, p pieces it is cut into.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_r1.ops.row_losses import RowLoss

# Logits of one chunk: what fits a CPU core's caches, and what keeps a GPU busy.
_CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
_FEWEST_ROWS = 64


def _chunk_rows(weight: Tensor) -> int:
    return max(_CHUNK_BYTES.get(weight.device.type, 64 << 20) // (4 * weight.shape[0]), _FEWEST_ROWS)


def _logits(hidden: Tensor, weight: Tensor, buffer: Tensor | None) -> Tensor:
    """fp32 [c, V/p], in `buffer` when the product is fp32 already."""
    if buffer is None:
        return torch.mm(hidden, weight.t()).float()
    return torch.mm(hidden, weight.t(), out=buffer[: hidden.shape[0]])


def _buffer(weight: Tensor, rows: int) -> Tensor | None:
    return torch.empty(rows, weight.shape[0], device=weight.device) if weight.dtype == torch.float32 else None


def _losses(hidden: Tensor, weight: Tensor, rows: RowLoss) -> Tensor:
    """Losses [n] without derivatives."""
    step = min(_chunk_rows(weight), hidden.shape[0])
    buffer, result = _buffer(weight, step), torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    for a in range(0, hidden.shape[0], step):
        b = min(a + step, hidden.shape[0])
        result[a:b] = rows(_logits(hidden[a:b], weight, buffer), a, b, False)
    return result


def _losses_and_gradients(hidden: Tensor, weight: Tensor, rows: RowLoss, shares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [n] and the gradients of sum(shares * losses): for hidden [n, d] and weight [V/p, d] (fp32)."""
    step = min(_chunk_rows(weight), hidden.shape[0])
    buffer, result = _buffer(weight, step), torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    d_hidden, d_weight = torch.empty_like(hidden), torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    for a in range(0, hidden.shape[0], step):
        b = min(a + step, hidden.shape[0])
        z = _logits(hidden[a:b], weight, buffer)
        result[a:b] = rows(z, a, b, True)
        dz = z.mul_(shares[a:b, None]).to(weight.dtype)
        torch.mm(dz, weight, out=d_hidden[a:b])
        if weight.dtype == torch.float32:
            d_weight.addmm_(dz.t(), hidden[a:b])
        else:
            d_weight += torch.mm(dz.t(), hidden[a:b])
    return result, d_hidden, d_weight


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, rows: RowLoss, expected: Tensor) -> Tensor:
        losses, d_hidden, d_weight = _losses_and_gradients(hidden, weight, rows, expected)
        ctx.save_for_backward(hidden, weight, expected, d_hidden, d_weight)
        ctx.rows = rows
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, weight, expected, d_hidden, d_weight = ctx.saved_tensors
        largest = expected.abs().argmax()
        factor = grad[largest] / expected[largest]
        if not torch.equal(grad, expected * factor):  # also when nothing was expected: 0/0 equals nothing
            _, d_hidden, d_weight = _losses_and_gradients(hidden, weight, ctx.rows, grad)
        elif factor != 1.0:
            d_hidden, d_weight = d_hidden * factor, d_weight * factor
        return d_hidden, d_weight.to(weight.dtype), None, None


def linear_loss(hidden: Tensor, weight: Tensor, rows: RowLoss, expected: Tensor | None = None) -> Tensor:
    """Losses fp32 [n] of the logits hidden @ weight^T, differentiable with respect to both.

    hidden [n, d], weight [V/p, d]. `expected` [n]: the weights the losses are about to be summed with (a loss mask), up to
    one common factor; None means equal weights. A wrong guess costs time, not correctness.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        if expected is None:
            expected = torch.ones(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        return _LinearLoss.apply(hidden.contiguous(), weight, rows, expected.detach().float())
    return _losses(hidden.detach(), weight.detach(), rows)


class _LogitsLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: RowLoss, derive: bool) -> Tensor:
        z = logits.flatten(0, -2).float()
        z = z.clone() if z.data_ptr() == logits.data_ptr() else z
        losses = rows(z, 0, z.shape[0], derive)
        if derive:
            ctx.save_for_backward(z)
        ctx.shape, ctx.dtype = logits.shape, logits.dtype
        return losses.view(logits.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (z,) = ctx.saved_tensors
        return (z * grad.reshape(-1, 1)).view(ctx.shape).to(ctx.dtype), None, None


def logits_loss(logits: Tensor, rows: RowLoss) -> Tensor:
    """The same losses from given logits [..., V/p] -> fp32 [...]; differentiable."""
    return _LogitsLoss.apply(logits, rows, torch.is_grad_enabled() and logits.requires_grad)
