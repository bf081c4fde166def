"""Semantic de-duplication: of two windows whose embeddings point the same way, the better one stays.

Exact, without clustering: every window is compared with every kept one, a block of windows at a time.
"""

from __future__ import annotations

import numpy as np

BLOCK = 1024


def directions(embeddings: np.ndarray) -> np.ndarray:
    """Embeddings [n, d] less their mean, of length 1, float32. Hidden states of a language model share one large direction, which
    would make any two texts look alike."""
    centred = embeddings - embeddings.mean(0, dtype=np.float64).astype(np.float32)
    return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)


def distinct(embeddings: np.ndarray, scores: np.ndarray, cosine: float) -> np.ndarray:
    """bool [n]: the windows that stay when they are taken by falling score (of equal ones the first) and one whose cosine with an
    already taken one is above `cosine` is dropped. Memory: two copies of the embeddings [n, d] and blocks of 1024 x 1024."""
    order = np.argsort(-scores, kind="stable")
    rows = directions(embeddings)[order]
    stays = np.zeros(len(rows), bool)
    kept = 0
    for first in range(0, len(rows), BLOCK):
        block = rows[first : first + BLOCK].copy()
        fresh = np.ones(len(block), bool)
        for other in range(0, kept, BLOCK):
            fresh &= (block @ rows[other : min(other + BLOCK, kept)].T <= cosine).all(1)
        block, places = block[fresh], first + np.flatnonzero(fresh)
        alike = block @ block.T > cosine
        taken = np.zeros(len(block), bool)
        for i in range(len(block)):
            taken[i] = not alike[i, :i][taken[:i]].any()
        stays[places[taken]] = True
        # The kept rows move to the front: they are never behind the block they came from.
        rows[kept : kept + taken.sum()] = block[taken]
        kept += int(taken.sum())
    found = np.zeros(len(rows), bool)
    found[order] = stays
    return found
