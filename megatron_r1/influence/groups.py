"""Kinds of parameters: which of them are scored, and what each contributes.

Leaving some out changes the ranking without a trace in the numbers, so a choice is made by name and every kind's share is
printed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import Tensor

from megatron_r1.influence.space import WHOLE, Space
from megatron_r1.model.precondition import Direction, Preconditioner
from megatron_r1.utils.errors import ConfigError, DataError

GROUPS = (
    ("norm", "norm"),
    ("embedding", "embedding"),
    ("output_layer", "embedding"),
    ("attention", "attention"),
    ("mlp", "ffn"),
)
EMBEDDINGS = "embedding"
KINDS = tuple(sorted({group for _, group in GROUPS}))
FEWEST = 3
"""Documents below which a share of their variance says nothing."""


def group_of(name: str) -> str:
    """embedding (with the head), norm, attention, ffn or other, by the parameter's name."""
    return next((group for mark, group in GROUPS if mark in name), "other")


def select(names: Sequence[str], wanted: str | Sequence[str]) -> list[str]:
    """The names that `wanted` asks for: "all", "embeddings", or patterns (fnmatch, case counts), in the order of `names`.

    "embeddings" is AutoMixer's choice (arXiv 2506.21910): token embedding and output head, one tensor where they are tied.
    Raises ConfigError when a pattern matches nothing.
    """
    if wanted == "all":
        return list(names)
    if wanted == "embeddings":
        return [name for name in names if group_of(name) == EMBEDDINGS]
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in names):
            (nearest,) = get_close_matches(pattern, names, n=1, cutoff=0.0)
            raise ConfigError(
                expected=f"influence's `parameters`: patterns that match a parameter, such as {nearest}",
                found=f"{pattern!r}, which matches none of {len(names)}",
                fix=f"correct it (the nearest name is {nearest}), or use all or embeddings",
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in wanted)]


class Selected(Preconditioner):
    """Some parameters only: the gradient of the others counts as zero. Equal before or after a block-diagonal P."""

    def __init__(self, inner: Preconditioner, kept: Iterable[str]) -> None:
        self.inner, self.kept = inner, frozenset(kept)

    def several(self, gradients: Sequence[Mapping[str, Tensor]]) -> list[Direction]:
        """P of each gradient with the other parameters set to zero. Raises DataError when nothing is left of one."""
        left = [only(gradient, self.kept) for gradient in gradients]
        if not all(any(bool(part.any()) for part in gradient.values()) for gradient in left):
            raise DataError(
                expected=f"a probe gradient that is not zero at the {len(self.kept)} chosen parameters",
                found="zero at every one of them",
                fix="choose parameters that the probe loss depends on, or parameters: all",
            )
        return self.inner.several(left)


def only(gradient: Mapping[str, Tensor], kept: Iterable[str]) -> Direction:
    """The gradient with every parameter that is not kept set to zero."""
    names = frozenset(kept)
    return {name: part if name in names else torch.zeros_like(part) for name, part in gradient.items()}


def energy_shares(gradient: Mapping[str, Tensor], direction: Mapping[str, Tensor], space: Space = WHOLE) -> dict[str, float]:
    """Share of <G, P G> by group; the shares sum to 1."""
    parts = {
        group: space.inner({name: part for name, part in gradient.items() if group_of(name) == group}, direction)
        for group in space.union(map(group_of, gradient))
    }
    total = sum(parts.values())
    return {group: value / total for group, value in sorted(parts.items())}


def by_group(direction: Mapping[str, Tensor], space: Space = WHOLE) -> dict[str, Direction]:
    """The direction cut into one for each group with an entry that is not zero. They sum to the whole."""
    groups = space.union(group_of(name) for name, part in direction.items() if bool(part.any()))
    return {group: only(direction, (name for name in direction if group_of(name) == group)) for group in groups}


def score_shares(scores: Mapping[str, np.ndarray]) -> dict[str, float] | None:
    """Share of each group in the variance of scores: cov(s_group, s) / var(s), s their sum; the shares sum to 1.

    scores: group -> float64 [n], scores per token along that group's part of the direction. A negative share: the group pulls
    against the others. None where fewer than 3 documents or no variance make it meaningless.
    """
    parts = np.stack(list(scores.values())) if scores else np.zeros((0, 0))
    total = parts.sum(axis=0)
    if total.size < FEWEST or not total.var() > 0:
        return None
    deviations = parts - parts.mean(axis=1, keepdims=True)
    return dict(zip(scores, (deviations @ (total - total.mean()) / total.size / total.var()).tolist()))
