"""The definition of every op, in plain torch with automatic derivatives. Slow, obvious, and the oracle of all tests.

Legend: s tokens, b rows, g key/value heads, r query heads per key/value head, h head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_r1.ops.rope import rope_table, rotate
from megatron_r1.ops.segments import SegmentPlan


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467, equation 4), computed in fp32."""
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return normed if weight is None else normed * weight


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up with [gate, up] the halves of the last dimension (arXiv 2002.05202, equation 5 without biases)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    norm: str,
    eps: float,
    interleaved: bool,
    grouped: bool,
    parity: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.qk_norm_rope.qk_norm_rope` by automatic derivatives: q [s, b, heads, h], k and v [s, b, kv heads, h]."""
    if grouped:
        heads = qkv.unflatten(-1, (num_kv_heads, -1, head_dim))
        q, k, v = heads[..., :-2, :].flatten(2, 3), heads[..., -2, :], heads[..., -1, :]
    else:
        q, k, v = qkv.unflatten(-1, (-1, head_dim)).split([num_heads, num_kv_heads, num_kv_heads], dim=-2)
    wide = torch.promote_types(qkv.dtype, torch.float32)
    # One row of the table per token, the same for all its heads: [s, 1 or b, 1, rot/2].
    at = positions if positions.dim() == 2 else positions[:, None]
    cos, sin = cos[at].unsqueeze(2), sin[at].unsqueeze(2)

    def normalise(x: Tensor) -> Tensor:
        if norm == "none":
            return x
        squares = x.pow(2)
        return x * torch.rsqrt((squares.mean(-1, keepdim=True) if norm == "rms" else squares.sum(-1, keepdim=True)) + eps)

    def turn(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
        rot = 2 * c.shape[-1]
        turned, rest = x[..., :rot], x[..., rot:]
        if interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
            return torch.cat([torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2), rest], -1)
        a, b = turned.chunk(2, -1)
        return torch.cat([a * c + -b * s, b * c + a * s, rest], -1)

    def one(x: Tensor, weight: Tensor | None) -> Tensor:
        if not parity:
            y = normalise(x.to(wide))
            return turn(y if weight is None else y * weight.to(wide), cos, sin).to(x.dtype)
        if interleaved:  # Llama4TextAttention
            return normalise(turn(x.to(wide), cos, sin).to(x.dtype).to(wide)).to(x.dtype)
        y = normalise(x.to(wide)).to(x.dtype)  # Qwen3Attention
        return turn(y if weight is None else weight.to(x.dtype) * y, cos.to(x.dtype), sin.to(x.dtype))

    return one(q, q_weight), one(k, k_weight), v


def qkv_prologue(qkv: Tensor, groups: int, head_dim: int, theta: float, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Packed qkv [s, b, g*(r+2)*h] -> q [b, g*r, s, h], k and v [b, g, s, h], with q and k normalised and rotated."""
    s, b, _ = qkv.shape
    heads = qkv.view(s, b, groups, -1, head_dim)
    q, k, v = heads[..., :-2, :], heads[..., -2, :], heads[..., -1, :]
    table = rope_table(s, head_dim, theta, qkv.device)
    q = rotate(rms_norm(q, None, eps).float(), table[:, None, None, None]).to(qkv.dtype)
    k = rotate(rms_norm(k, None, eps).float(), table[:, None, None]).to(qkv.dtype)
    return q.flatten(2, 3).permute(1, 2, 0, 3), k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3)


def attention(q: Tensor, k: Tensor, v: Tensor, plan: SegmentPlan | None) -> Tensor:
    """softmax(q k^T / sqrt(h)) v, causal and inside documents: q [b, g*r, s, h], k and v [b, g, s, h] -> [b, g*r, s, h]."""
    s, repeats = q.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    visible = torch.ones(s, s, dtype=torch.bool, device=q.device).tril()
    if plan is not None:
        visible = visible & (plan.starts[:, None, :, None] == plan.starts[:, None, None, :])
    scores = (q.float() @ k.float().transpose(-1, -2)) * q.shape[-1] ** -0.5
    return (scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v.float()).to(q.dtype)


def qknorm_rope_attention(qkv: Tensor, groups: int, head_dim: int, theta: float, eps: float, plan: SegmentPlan | None) -> Tensor:
    """`ops.attention.qknorm_rope_attention`, from the three definitions above."""
    out = attention(*qkv_prologue(qkv, groups, head_dim, theta, eps), plan)
    return out.permute(2, 0, 1, 3).flatten(2)
