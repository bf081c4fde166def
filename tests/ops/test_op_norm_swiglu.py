"""RMSNorm and SwiGLU: written-out derivatives against automatic ones and torch's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from megatron_r1.ops.norm import RMS_NORM, rms_norm
from megatron_r1.ops.swiglu import SWIGLU, swiglu


def both(function: Callable[..., torch.Tensor], oracle: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> None:
    results = []
    for f in (function, oracle):
        out = f(*tensors)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
        results.append([out.detach(), *torch.autograd.grad(out, tensors, grad)])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("implementation", RMS_NORM.names())
@pytest.mark.parametrize("shape", [(1, 8), (3, 5, 32), (2, 1, 1, 128)])
def test_rms_norm(implementation: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(shape, generator=generator)).requires_grad_()
    w = torch.rand(shape[-1], generator=generator).requires_grad_()
    both(lambda x, w: rms_norm(x, w, 1e-3, implementation), lambda x, w: F.rms_norm(x, shape[-1:], w, 1e-3), x, w)


def test_rms_norm_of_zeros_is_zero_with_finite_gradient() -> None:
    x, w = torch.zeros(4, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    out = rms_norm(x, w, 1e-5)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(4, 8))
    assert torch.isfinite(x.grad).all()


def test_rms_norm_bf16_rounds_once_per_factor() -> None:
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    w = torch.ones(64)
    out = rms_norm(x.bfloat16(), w.bfloat16(), 1e-5)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), rms_norm(x.bfloat16().float(), w, 1e-5), atol=0.02, rtol=0.01)


@pytest.mark.parametrize("implementation", SWIGLU.names())
@pytest.mark.parametrize("shape", [(1, 2), (3, 5, 64)])
def test_swiglu(implementation: str, shape: tuple[int, ...]) -> None:
    x = (4 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).requires_grad_()
    half = shape[-1] // 2
    both(lambda x: swiglu(x, implementation), lambda x: torch.sigmoid(x[..., :half]) * x[..., :half] * x[..., half:], x)


def test_gradients_in_double_precision() -> None:
    x = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: swiglu(t, "analytic"), (x,))
