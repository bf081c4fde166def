"""Effective rank of a set of hidden states: RankMe (Garrido et al. 2023; MobileLLM-R1 v1, Eq. 9)."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-7


def rankme(states: Tensor, epsilon: float = EPSILON) -> float:
    """exp(-sum_k p_k log p_k), p_k = sigma_k / sum_i sigma_i + epsilon, over the singular values sigma of states [N, K].

    No centring, as in the original: values are comparable only within one protocol. Between 1 and min(N, K) (up to epsilon).
    Singular values in fp64: the small ones are what the measure is about. When N > 4 K they come from the Gram matrix,
    whose eigenvalues are their squares, at a fraction of the cost; in fp64 that loses nothing above 1e-8 of the largest.
    """
    matrix = states.detach().double()
    rows, columns = matrix.shape
    if rows > 4 * columns:
        sigma = torch.linalg.eigvalsh(matrix.T @ matrix).clamp_min(0).sqrt()
    else:
        sigma = torch.linalg.svdvals(matrix)
    p = sigma / sigma.sum() + epsilon
    return float(torch.exp(-(p * p.log()).sum()))
