"""Which kinds of parameters carry a score: leaving some out silently changes the ranking, so the shares are printed."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

GROUPS = (
    ("norm", "norm"),
    ("embedding", "embedding"),
    ("output_layer", "embedding"),
    ("attention", "attention"),
    ("mlp", "ffn"),
)


def group_of(name: str) -> str:
    """embedding (with the head it is tied to), norm, attention, ffn or other, by the parameter's name."""
    return next((group for mark, group in GROUPS if mark in name), "other")


def energy_shares(gradient: Mapping[str, Tensor], direction: Mapping[str, Tensor]) -> dict[str, float]:
    """Share of <G, P G> by group; the shares sum to 1."""
    parts: dict[str, float] = {}
    for name, part in gradient.items():
        group = group_of(name)
        parts[group] = parts.get(group, 0.0) + float((part.double() * direction[name].double()).sum())
    total = sum(parts.values())
    return {group: value / total for group, value in sorted(parts.items())}
