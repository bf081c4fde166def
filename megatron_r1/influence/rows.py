"""Documents on rows of their own, or one behind the other on one row: no attention ever crosses from one to another.

Legend: b rows in a batch, s predicted tokens of the longest row; T tokens and n rows of a packed batch.
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


@dataclass(frozen=True)
class PackedBatch:
    """Rows one behind the other, told apart by their numbers: attention stops where they meet, and nothing is padded.

    tensors: tokens, labels, segment_ids int64, loss_mask float32, all [1, T]. cu_seqlens: int64 [m + 1] on the host, the first
    token of each row, then T; m = n, or n + 1 where masked tokens fill the end.
    """

    positions: list[int]  # places of the rows in the sequence the batches were made from
    tensors: Batch
    cu_seqlens: Tensor

    @property
    def padded_tokens(self) -> int:
        """Tokens a forward over this batch processes."""
        return int(self.tensors["tokens"].numel())


def pack_plan(rows: Sequence[Row], batch_tokens: int) -> list[list[int]]:
    """Rows of each packed batch: longest first, as many as fit. Pure: a resumed run packs alike."""
    groups: list[list[int]] = []
    room = 0
    for i in sorted(range(len(rows)), key=lambda i: (-rows[i].targets, i)):
        if rows[i].targets > room:
            groups.append([])
            room = batch_tokens
        groups[-1].append(i)
        room -= rows[i].targets
    return groups


def packed(rows: Sequence[Row], batch_tokens: int, device: torch.device, multiple: int = 1, even: bool = False) -> list[PackedBatch]:
    """The groups of `pack_plan`. The number of tokens is made a multiple of `multiple` (a row cut into as many pieces), and with
    `even` the same in all batches (a pipeline passes on tensors of one shape): masked tokens fill up the end."""
    groups = pack_plan(rows, batch_tokens)
    sizes = [-(-sum(rows[i].targets for i in group) // multiple) * multiple for group in groups]
    return [
        PackedBatch(group, *pack([rows[i] for i in group], max(sizes) if even else size, device)) for group, size in zip(groups, sizes)
    ]


def pack(rows: Sequence[Row], length: int, device: torch.device) -> tuple[Batch, Tensor]:
    """(tensors, cu_seqlens) of a packed batch of `length` tokens, at least as many as the rows have."""
    ends = np.cumsum([0] + [row.targets for row in rows], dtype=np.int64)
    used = int(ends[-1])
    ends = np.append(ends, length) if length > used else ends
    tokens, labels, mask = np.zeros(length, np.int64), np.zeros(length, np.int64), np.zeros(length, np.float32)
    tokens[:used] = np.concatenate([row.tokens[:-1] for row in rows])
    labels[:used] = np.concatenate([row.tokens[1:] for row in rows])
    mask[:used] = 1
    ids = np.repeat(np.arange(len(ends) - 1), np.diff(ends))
    arrays = {"tokens": tokens, "labels": labels, "loss_mask": mask, "segment_ids": ids}
    return {name: torch.from_numpy(array[None]).to(device) for name, array in arrays.items()}, torch.from_numpy(ends)


def row_sums(losses: Tensor, mask: Tensor) -> Tensor:
    """Loss of each row over its real tokens, float64 [b]: differences of nearly equal losses need the digits."""
    return torch.where(mask > 0, losses.double(), 0.0).sum(dim=1)
