"""The definition of every op, in plain torch with automatic derivatives. Slow, obvious, and the oracle of all tests.

Legend: s tokens, b rows, h head size; S tokens of the whole sequence where a process has only a piece of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467, equation 4), computed in fp32 (fp64 for fp64)."""
    wide = x if x.dtype == torch.float64 else x.float()
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


def attention(q: Tensor, k: Tensor, v: Tensor, index: Tensor, documents: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(h)) v, causal and inside documents: q [s, b, heads, h], k and v [S, b, kv heads, h] -> as q.

    index [s]: which of the S tokens of the whole sequence each query is. documents [b, S]: their numbers, or None.
    """
    repeats, everyone = q.shape[2] // k.shape[2], torch.arange(k.shape[0], device=q.device)
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    visible = (everyone <= index[:, None]).unsqueeze(0)  # [1 or b, s, S]
    if documents is not None:
        visible = visible & (documents[:, index, None] == documents[:, None, :])
    q, k, v = (x.to(wide).permute(1, 2, 0, 3) for x in (q, k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)))
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return (scores.masked_fill(~visible.unsqueeze(1), float("-inf")).softmax(-1) @ v).permute(2, 0, 1, 3).to(dtype)
