"""Rotary position embedding in adjacent pairs (arXiv 2104.09864, equation 34), as Llama 4 applies it.

Elements 2i and 2i+1 of a head are one complex number, multiplied by exp(j * position * theta^(-2i/h)).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def rope_table(length: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """exp(j * angle) for positions 0 to length-1: complex64 [length, head_dim/2].

    Cut from a cached table, which serves every layer and every shorter sequence. The angles are made in fp32 in the order
    transformers makes them: they are multiplied by positions, so a last bit of a frequency shows in long sequences.
    """
    return _table(max(256, 1 << (length - 1).bit_length()), head_dim, theta, device)[:length]


def cos_sin(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the same angles, as the kernels read them: fp32 [length, head_dim/2] each, contiguous, the bits of
    `rope_table`. Cut from cached tables."""
    cos, sin = _cos_sin(max(256, 1 << (length - 1).bit_length()), head_dim, theta, device)
    return cos[:length], sin[:length]


@lru_cache(maxsize=8)
def _cos_sin(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    table = torch.view_as_real(_table(length, head_dim, theta, device))
    return table[..., 0].contiguous(), table[..., 1].contiguous()


@lru_cache(maxsize=8)
def _table(length: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    angles = torch.outer(torch.arange(length, dtype=torch.float32), 1.0 / (theta**exponents))
    return torch.polar(torch.ones_like(angles), angles).to(device)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """x [..., h] fp32, table [..., h/2] complex, broadcastable over leading dimensions -> [..., h]."""
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * table).flatten(-2)
