"""QK-norm and RoPE on packed qkv against eager, PyTorch's own rms_norm and torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.harness import Case, relative_error
from megatron_r1.ops.qk_norm_rope import qk_norm_rope
from megatron_r1.ops.rope import cos_sin

HEADS, KV, DIM, THETA, EPS = 24, 6, 64, 5e5, 1e-5
ALLOWED = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def _eager(qkv: Tensor, cos: Tensor, sin: Tensor, norm: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """What a model in plain torch does: split, normalise, rotate in adjacent pairs."""
    s, b, _ = qkv.shape
    heads = qkv.view(s, b, KV, HEADS // KV + 2, DIM)
    rotated = []
    for x in (heads[..., :-2, :].flatten(2, 3), heads[..., -2, :]):
        x = norm(x).float()
        even, odd = x[..., 0::2], x[..., 1::2]
        c, n = cos[:, None, None], sin[:, None, None]
        rotated.append(torch.stack((even * c - odd * n, even * n + odd * c), -1).flatten(-2).to(qkv.dtype))
    return rotated[0], rotated[1]


def _own_norm(x: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def _library_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (DIM,), eps=EPS)


def cases(device: str, quick: bool) -> Iterator[Case]:
    """Forward and forward plus backward; 2048 tokens on a CPU, 2k, 8k and 32k on a GPU."""
    lengths = (2048,) if device == "cpu" else (2048, 8192, 32768)
    for tokens in lengths[:1] if quick else lengths:
        for dtype in (torch.bfloat16, torch.float32):
            for backward in (False, True):
                yield _case(device, tokens, dtype, backward)


def _case(device: str, tokens: int, dtype: torch.dtype, backward: bool) -> Case:
    qkv = torch.randn(tokens, 1, (HEADS + 2 * KV) * DIM, device=device).to(dtype).requires_grad_(backward)
    cos, sin = cos_sin(tokens, DIM, THETA, torch.device(device))
    positions = torch.arange(tokens, device=device)
    dq, dk = (torch.randn(tokens, 1, heads, DIM, device=device).to(dtype) for heads in (HEADS, KV))

    def ours(implementation: str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        return lambda x: qk_norm_rope(
            x, num_heads=HEADS, num_kv_heads=KV, head_dim=DIM, cos=cos, sin=sin, positions=positions, eps=EPS, implementation=implementation
        )[:2]

    compiled = torch.compile(lambda x: _eager(x, cos, sin, _own_norm), fullgraph=True)
    functions = {
        "csrc": ours("csrc"),
        "analytic": ours("analytic"),
        "eager": lambda x: _eager(x, cos, sin, _own_norm),
        "eager, F.rms_norm": lambda x: _eager(x, cos, sin, _library_norm),
        "torch.compile": compiled,
    }

    def call(function: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        q, k = function(qkv)
        return (q, k, torch.autograd.grad((q, k), qkv, (dq, dk))[0]) if backward else (q, k)

    wide = qkv.detach().double().requires_grad_(backward)
    want = _eager_double(wide, cos, sin)
    if backward:
        want = (*want, torch.autograd.grad(want, wide, (dq.double(), dk.double()))[0])

    def check(name: str) -> float:
        error = max(relative_error(g, w) for g, w in zip(call(functions[name]), want, strict=True))
        if error > ALLOWED[dtype]:
            raise SystemExit(f"qk_norm_rope {name} {dtype}: error {error:.2g} against fp64, at most {ALLOWED[dtype]:.0e} allowed")
        return error

    size = qkv.element_size()
    # Forward: q and k are read and written. Backward: dq, dk and raw q, k are read, dqkv is written whole (dv: zeros here).
    forward_bytes = 2 * tokens * (HEADS + KV) * DIM * size
    backward_bytes = tokens * (2 * (HEADS + KV) + (HEADS + 2 * KV)) * DIM * size
    return Case(
        op="qk_norm_rope" + (" forward+backward" if backward else " forward"),
        shape=f"{tokens} tokens, {HEADS}/{KV} heads of {DIM}",
        dtype=dtype,
        contestants={name: (lambda f=f: call(f)) for name, f in functions.items()},
        check=check,
        bytes=forward_bytes + (backward_bytes if backward else 0),
        target=_target(device, tokens, backward),
    )


def _eager_double(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The definition in fp64, by complex numbers: another way than the contestants."""
    s, b, _ = qkv.shape
    heads = qkv.view(s, b, KV, HEADS // KV + 2, DIM)
    turn = torch.complex(cos.double(), sin.double())[:, None, None]
    result = []
    for x in (heads[..., :-2, :].flatten(2, 3), heads[..., -2, :]):
        x = x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
        result.append(torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2))
    return result[0], result[1]


def _target(device: str, tokens: int, backward: bool) -> str:
    if device == "cpu":
        return "eager >= 5x, torch.compile >= 1.3x" if backward else ""
    return "<= 1.25x floor, ahead of torch.compile" if tokens == 32768 else "ahead of torch.compile"
