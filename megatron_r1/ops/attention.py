"""From packed qkv to attention output: QK-norm, RoPE, causal grouped-query attention that can stop at documents.

The prologue (norm and rotation of q and k, in place in the packed layout) is ours; the core is the library's
(`scaled_dot_product_attention`). One function, `qknorm_rope_attention`, is what models call; other implementations
register themselves on `ATTENTION`.

Positions count from the start of the row, also when documents are reset: RoPE only ever shows differences of positions,
and within a document these are the same whether or not counting starts anew.

Legend: s tokens, b rows, g key/value heads, r query heads per key/value head, h head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_r1.ops import reference
from megatron_r1.ops.dispatch import Op
from megatron_r1.ops.rope import rope_table
from megatron_r1.ops.segments import SegmentPlan, plan_of


class _Prologue(torch.autograd.Function):
    """`reference.qkv_prologue` for q and k at once, with the backward written out.

    Saves qkv and one number per head and token instead of every intermediate, and the backward fills the gradient of the
    packed qkv directly. With n = x / rms(x) and y = R n (R a rotation): dn = R^T dy, dx = (dn - n * mean(n * dn)) / rms(x).
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, groups: int, head_dim: int, theta: float, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        s, b, _ = qkv.shape
        heads = qkv.view(s, b, groups, -1, head_dim)
        qk = heads[..., :-1, :].float()
        scale = torch.rsqrt(torch.linalg.vector_norm(qk, dim=-1, keepdim=True).square_().div_(head_dim).add_(eps))
        table = rope_table(s, head_dim, theta, qkv.device)[:, None, None, None]
        turned = torch.view_as_complex((qk * scale).unflatten(-1, (-1, 2))).mul_(table)
        turned = torch.view_as_real(turned).flatten(-2).to(qkv.dtype)
        ctx.save_for_backward(qkv, scale, table)
        ctx.groups, ctx.head_dim = groups, head_dim
        q, k = turned[..., :-1, :].flatten(2, 3), turned[..., -1, :]
        return q.permute(1, 2, 0, 3), k.permute(1, 2, 0, 3), heads[..., -1, :].permute(1, 2, 0, 3)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        dq, dk, dv = grads
        qkv, scale, table = ctx.saved_tensors
        s, b, _ = qkv.shape
        heads = qkv.view(s, b, ctx.groups, -1, ctx.head_dim)
        out = torch.empty_like(heads)
        dy = torch.empty(*scale.shape[:-1], ctx.head_dim, dtype=torch.float32, device=qkv.device)
        dy[..., :-1, :] = dq.permute(2, 0, 1, 3).unflatten(2, (ctx.groups, -1))
        dy[..., -1, :] = dk.permute(2, 0, 1, 3)
        torch.view_as_complex(dy.unflatten(-1, (-1, 2))).mul_(table.conj())
        normed = heads[..., :-1, :].float() * scale
        shared = (normed * dy).mean(-1, keepdim=True)
        out[..., :-1, :] = torch.addcmul(dy, normed, shared, value=-1).mul_(scale)
        out[..., -1, :] = dv.permute(2, 0, 1, 3)
        return out.view(qkv.shape), None, None, None, None


def core(q: Tensor, k: Tensor, v: Tensor, plan: SegmentPlan | None) -> Tensor:
    """`reference.attention` by the library's kernel."""
    if plan is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    if plan.dense:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=plan.mask(q.dtype), enable_gqa=True)
    rows = [
        torch.cat(
            [
                F.scaled_dot_product_attention(
                    q[i : i + 1, :, a:z], k[i : i + 1, :, a:z], v[i : i + 1, :, a:z], is_causal=True, enable_gqa=True
                )
                for a, z in spans
            ],
            dim=2,
        )
        for i, spans in enumerate(plan.spans)
    ]
    return torch.cat(rows)


def _analytic(qkv: Tensor, groups: int, head_dim: int, theta: float, eps: float, plan: SegmentPlan | None) -> Tensor:
    out = core(*_Prologue.apply(qkv, groups, head_dim, theta, eps), plan)
    return out.permute(2, 0, 1, 3).flatten(2)


ATTENTION = Op("qknorm_rope_attention")
ATTENTION.register("analytic", _analytic)
ATTENTION.register("reference", reference.qknorm_rope_attention)


def qknorm_rope_attention(
    qkv: Tensor,
    *,
    num_kv_heads: int,
    head_dim: int,
    rope_theta: float,
    eps: float,
    segment_ids: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """QK-norm (weightless RMS per head), RoPE in adjacent pairs, causal grouped-query attention.

    qkv [s, b, g*(r+2)*h]: per key/value head its r query heads, its key, its value (megatron-core's layout).
    segment_ids [b, s]: tokens attend only within a run of equal ids; None or one id per row is plain causal attention.
    Returns [s, b, g*r*h]. Differentiable with respect to qkv. `implementation`: see `ops.dispatch.Op.choose`.
    """
    plan = plan_of(segment_ids)
    return ATTENTION(qkv, num_kv_heads, head_dim, rope_theta, eps, plan, implementation=implementation)
