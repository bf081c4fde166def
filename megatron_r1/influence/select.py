"""Which checkpoints and which documents are scored: pure functions of the settings, so a resumed run chooses alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_r1.artifacts.checkpoint import CheckpointInfo
from megatron_r1.influence.config import InfluenceConfig
from megatron_r1.influence.rows import Row
from megatron_r1.utils.errors import ConfigError, DataError
from megatron_r1.utils.seeding import generator


def evenly(checkpoints: Sequence[CheckpointInfo], count: int) -> list[CheckpointInfo]:
    """`count` checkpoints nearest to evenly spaced steps N/count, 2N/count ... N, the last one included.

    checkpoints: ascending by step. Raises ConfigError when there are fewer than `count`.
    """
    if count > len(checkpoints):
        raise ConfigError(
            expected=f"at least {count} trained checkpoints",
            found=f"{len(checkpoints)}",
            fix="lower influence's `checkpoints`, or let the train step keep more (checkpoints.evenly)",
        )
    chosen: list[int] = []
    for i in range(count):
        wanted = checkpoints[-1].step * (i + 1) / count
        # Leave enough later checkpoints for the rest.
        allowed = range(chosen[-1] + 1 if chosen else 0, len(checkpoints) - (count - 1 - i))
        chosen.append(min(allowed, key=lambda k: abs(checkpoints[k].step - wanted)))
    return [checkpoints[k] for k in chosen]


def alphas(steps: Sequence[int]) -> list[float]:
    """Checkpoint weights of Eq. 5: proportional to the step, summing to 1."""
    return [step / sum(steps) for step in steps]


@dataclass(frozen=True)
class Chosen:
    """The documents of one source to score. Legend: n documents."""

    source: str
    index: np.ndarray  # int64 [n]
    start: np.ndarray  # int64 [n]
    ids: list[str]
    rows: list[Row]  # row.unit is the place in `index`
    n_tokens: np.ndarray  # int64 [n], predicted tokens

    def part(self, first: int, last: int) -> list[Row]:
        """Rows of documents first..last-1, units counted from 0."""
        return [Row(row.unit - first, row.tokens) for row in self.rows if first <= row.unit < last]


def windows(tokens: np.ndarray, size: int) -> list[np.ndarray]:
    """Cut a document so that every token but the first is predicted once, at most `size` in a row."""
    return [tokens[first : first + size + 1] for first in range(0, len(tokens) - 1, size)]


def choose(config: InfluenceConfig, source: str, shard: Any, purpose: str = "influence") -> Chosen:
    """Draw documents of a training split in keyed order: asking for more later keeps those drawn now.

    purpose: part of the key. Raises DataError when none is long enough.
    """
    order = generator(config.seed or 0, f"{purpose} documents", source).permutation(len(shard))
    places = generator(config.seed or 0, f"{purpose} windows", source).random(len(shard))
    fits = np.asarray(shard.lengths)[order] >= config.min_tokens if len(shard) else np.zeros(0, bool)
    if not fits.any():
        raise DataError(
            expected=f"training documents of {source!r} with at least {config.min_tokens} tokens",
            found=f"none among {len(shard)}",
            fix="leave the source out of influence's `sources`, or lower min_tokens",
        )
    index, places = order[fits][: config.documents], places[fits][: config.documents]
    starts, rows = [], []
    size = config.tokens_per_document
    for unit, (i, place) in enumerate(zip(index.tolist(), places.tolist())):
        tokens = np.array(shard.tokens(i))
        if config.score_unit == "document":
            starts.append(0)
            rows += [Row(unit, window) for window in windows(tokens, size)]
            continue
        start = int(place * (max(len(tokens) - (size + 1), 0) + 1)) if config.window == "random" else 0
        starts.append(start)
        rows.append(Row(unit, tokens[start : start + size + 1]))
    n_tokens = np.bincount(
        [row.unit for row in rows], weights=[row.targets for row in rows], minlength=len(index)
    ).astype(np.int64)
    return Chosen(
        source,
        index.astype(np.int64),
        np.array(starts, np.int64),
        shard.ids.take(index.tolist()),
        rows,
        n_tokens,
    )
