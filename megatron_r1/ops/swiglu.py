"""SwiGLU with a written-out backward that keeps only its input."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_r1.ops import reference
from megatron_r1.ops.dispatch import Op


class _SwiGLU(torch.autograd.Function):
    """`reference.swiglu`: d gate = dy * up * silu'(gate), d up = dy * silu(gate), written into one packed gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        dx = torch.empty_like(x)
        d_gate, d_up = dx.chunk(2, dim=-1)
        torch.mul(dy, F.silu(gate), out=d_up)
        torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=d_gate)
        return dx


SWIGLU = Op("swiglu")
SWIGLU.register("analytic", _SwiGLU.apply)
SWIGLU.register("reference", reference.swiglu)


def swiglu(x: Tensor, implementation: str | None = None) -> Tensor:
    """x [..., 2f] = [gate, up] -> silu(gate) * up [..., f]."""
    return SWIGLU(x, implementation=implementation)
