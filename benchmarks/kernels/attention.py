"""From packed qkv to attention output, forward and backward: one op against the parts in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kernels.harness import Case, relative_error
from megatron_r1.ops.attention import qknorm_attention

HEADS, KV, DIM = 24, 6, 64
ALLOWED = {torch.float32: 5e-6, torch.bfloat16: 1.5e-2}


def cases(device: str, quick: bool) -> Iterator[Case]:
    """Plain causal, and eight documents."""
    shapes = [(1024, 1)] if device == "cpu" else [(2048, 4), (8192, 1)]
    for s, b in shapes[:1] if quick else shapes:
        for documents in (1, 8):
            for dtype in (torch.float32, torch.bfloat16):
                yield _case(device, s, b, documents, dtype)


def _case(device: str, s: int, b: int, documents: int, dtype: torch.dtype) -> Case:
    qkv = torch.randn(s, b, (HEADS + 2 * KV) * DIM, device=device).to(dtype).requires_grad_()
    grad = torch.randn(s, b, HEADS * DIM, device=device).to(dtype)
    ids = None if documents == 1 else (torch.arange(s, device=device) // (s // documents)).expand(b, s).contiguous()

    def whole(x: Tensor, implementation: str) -> Tensor:
        return qknorm_attention(x, num_kv_heads=KV, head_dim=DIM, rope_theta=5e5, eps=1e-5, segment_ids=ids, implementation=implementation)

    ways: dict[str, Callable[[Tensor], Tensor]] = {name: (lambda x, n=name: whole(x, n)) for name in ("csrc", "analytic", "reference")}

    def call(name: str) -> tuple[Tensor, Tensor]:
        out = ways[name](qkv)
        return out.detach(), torch.autograd.grad(out, qkv, grad)[0]

    wide = qkv.detach().double().requires_grad_()
    exact = whole(wide, "reference")
    want = (exact.detach(), torch.autograd.grad(exact, wide, grad.double())[0])

    def check(name: str) -> float:
        error = max(relative_error(got, right) for got, right in zip(call(name), want, strict=True))
        if error > ALLOWED[dtype]:
            raise SystemExit(f"qknorm_attention {name} {dtype}: error {error:.2g} against fp64, at most {ALLOWED[dtype]:.0e} allowed")
        return error

    # Causal: half of s x s; 2 products forward, 5 backward, for every document.
    flops = 7 * 2 * 0.5 * (s / documents) ** 2 * documents * b * HEADS * DIM
    return Case(
        op="qknorm_attention forward+backward", shape=f"{s} tokens x {b}, {documents} document{'s' * (documents > 1)} a row, {HEADS}/{KV} heads of {DIM}",
        dtype=dtype, contestants={name: (lambda n=name: call(n)) for name in ways}, check=check, flops=flops,
    )  # fmt: skip
