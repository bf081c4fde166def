"""Documents on rows of their own: no attention and no position ever crosses from one document to another.

Legend: b rows in a batch, s predicted tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Batch = dict[str, Tensor]
TokenLosses = Callable[[Batch], Tensor]
"""A frozen model seen from here: batch -> negative log-likelihood in nats of every label, [b, s], fp32 or wider."""


@dataclass(frozen=True)
class Row:
    """A window of one document and the unit its score belongs to."""

    unit: int
    tokens: np.ndarray  # int [n], n >= 2; the first is context only

    @property
    def targets(self) -> int:
        """Predicted tokens."""
        return len(self.tokens) - 1


@dataclass(frozen=True)
class RowBatch:
    """Rows padded to one length."""

    positions: list[int]  # places of the rows in the sequence the batches were made from
    tensors: Batch

    @property
    def padded_tokens(self) -> int:
        """Tokens a forward over this batch processes."""
        return int(self.tensors["tokens"].numel())


def plan(rows: Sequence[Row], batch_tokens: int) -> list[list[int]]:
    """Group rows of like length, longest first, so that little is padded. Pure: a resumed run groups alike."""
    order = sorted(range(len(rows)), key=lambda i: (-rows[i].targets, i))
    groups: list[list[int]] = []
    for i in order:
        if groups and (len(groups[-1]) + 1) * rows[groups[-1][0]].targets <= batch_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def padded_tokens(rows: Sequence[Row], batch_tokens: int) -> int:
    """Tokens one pass over the rows processes, padding included."""
    return sum(len(group) * rows[group[0]].targets for group in plan(rows, batch_tokens))


def batches(rows: Sequence[Row], batch_tokens: int, device: torch.device) -> list[RowBatch]:
    """Pad the groups of `plan`. Padding comes last in its row, so a causal model's real positions never see it."""
    return [RowBatch(group, collate([rows[i] for i in group], device)) for group in plan(rows, batch_tokens)]


def collate(rows: Sequence[Row], device: torch.device) -> Batch:
    """tokens, labels int64 [b, s]; loss_mask float32 [b, s]. No segment ids: one document per row, padding last."""
    b, s = len(rows), max(row.targets for row in rows)
    tokens, labels = np.zeros((b, s), np.int64), np.zeros((b, s), np.int64)
    mask = np.zeros((b, s), np.float32)
    for i, row in enumerate(rows):
        tokens[i, : row.targets], labels[i, : row.targets], mask[i, : row.targets] = row.tokens[:-1], row.tokens[1:], 1
    arrays = {"tokens": tokens, "labels": labels, "loss_mask": mask}
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def row_sums(losses: Tensor, mask: Tensor) -> Tensor:
    """Loss of each row over its real tokens, float64 [b]: differences of nearly equal losses need the digits."""
    return torch.where(mask > 0, losses.double(), 0.0).sum(dim=1)
