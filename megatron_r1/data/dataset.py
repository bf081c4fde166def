"""Training batches as numpy arrays, each a pure function of the sample numbers asked for.

Legend: b rows of a batch, s tokens of a row. A batch holds tokens, labels, position_ids int64[b, s], loss_mask float32[b, s],
segment_ids int32[b, s] (number of the document within the row, from 0; padding -1), source_ids int32[b] (index into
`source_names`) and document_ids (a list of b int64 arrays: the numbers, in their shard, of the row's documents in order).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np

from megatron_r1.data.mixture_order import MixtureOrder
from megatron_r1.data.packing import best_fit_decreasing
from megatron_r1.data.shards import Shard
from megatron_r1.data.view import TokenStream
from megatron_r1.utils.errors import DataError
from megatron_r1.utils.seeding import derive_seed, generator

Batch = dict[str, Any]


def collate(rows: list[Batch]) -> Batch:
    """Rows [s] to a batch [b, s]."""
    batch: Batch = {key: np.stack([row[key] for row in rows]) for key in ("tokens", "labels", "loss_mask", "position_ids", "segment_ids")}
    batch["source_ids"] = np.asarray([row["source_id"] for row in rows], np.int32)
    batch["document_ids"] = [row["document_ids"] for row in rows]
    return batch


def restart(segments: np.ndarray) -> np.ndarray:
    """Positions counted from the beginning of each run of equal segment numbers: int64[s]."""
    positions = np.arange(len(segments), dtype=np.int64)
    starts = np.flatnonzero(np.diff(segments, prepend=segments[:1] - 1))
    return positions - np.repeat(starts, np.diff(np.append(starts, len(segments))))


class PretrainDataset:
    """Blocks of packed text, drawn from `streams` in the order of a mixture.

    Block i of a stream is its tokens i*s ... i*s + s: the first s are inputs, the last s labels, so every token is a target once.
    reset_documents: attention and positions restart at every document, and the first token of a document is no target
    (nothing it could be predicted from is visible); without it the row is one segment, as the original trained.
    """

    def __init__(self, streams: Mapping[str, TokenStream], order: MixtureOrder, seq_length: int, reset_documents: bool) -> None:
        self.streams, self.order, self.seq_length, self.reset_documents = dict(streams), order, int(seq_length), reset_documents
        self.source_names = list(self.streams)
        self._source_id = {name: i for i, name in enumerate(self.source_names)}
        for name in order.weights:
            have = self.streams[name].blocks(self.seq_length) if name in self.streams else 0
            if have < order.blocks[name]:
                raise DataError(
                    expected=f"{order.blocks[name]} blocks of {seq_length} tokens in {name}", found=f"{have}",
                    fix="count the mixture's blocks with TokenStream.blocks of the same streams and sequence length",
                )

    def sample(self, index: int) -> Batch:
        """Row `index` of the run (0-based), arrays [s]."""
        source, block, _ = self.order.locate(int(index))
        s = self.seq_length
        tokens, owner = self.streams[source].read(block * s, s + 1)
        segments = np.zeros(s + 1, np.int32)
        segments[1:] = np.cumsum(owner[1:] != owner[:-1])
        documents = owner[np.flatnonzero(np.diff(segments[:s], prepend=-1))]
        loss_mask, positions = np.ones(s, np.float32), np.arange(s, dtype=np.int64)
        if self.reset_documents:
            loss_mask[segments[1:] != segments[:-1]] = 0.0
            positions = restart(segments[:s])
        return {
            "tokens": tokens[:-1].astype(np.int64), "labels": tokens[1:].astype(np.int64), "loss_mask": loss_mask, "position_ids": positions,
            "segment_ids": segments[:s] if self.reset_documents else np.zeros(s, np.int32),
            "source_id": self._source_id[source], "document_ids": documents,
        }

    def batch(self, indices: Iterable[int]) -> Batch:
        """Rows `indices` of the run, arrays [b, s]."""
        return collate([self.sample(int(index)) for index in indices])


class SftDataset:
    """Conversations packed into rows of s tokens, whole where they fit.

    Each source is packed by best-fit decreasing, once; a conversation longer than s + 1 tokens loses its end (`truncated`
    counts them) and one without a token to learn is left out (`without_target`). weights: share of rows per source; None
    takes every row once per epoch. mask: learn assistant tokens, or all of them. Row numbers may exceed len(): each epoch has its own order.
    """

    def __init__(
        self, shards: Mapping[str, Shard], seq_length: int, seed: int, pad_id: int | None, weights: Mapping[str, float] | None = None,
        mask: Literal["assistant", "all"] = "assistant", start: Mapping[str, int] | None = None,
    ) -> None:
        self.shards, self.seq_length, self.mask = dict(shards), int(seq_length), mask
        self.pad_id = 0 if pad_id is None else int(pad_id)
        self.source_names = list(self.shards)
        self._source_id = {name: i for i, name in enumerate(self.source_names)}
        self.truncated: dict[str, int] = {}
        self.without_target: dict[str, int] = {}
        self.rows: dict[str, list[np.ndarray]] = {name: self._pack(name, seed) for name in self.source_names}
        blocks = {name: len(rows) for name, rows in self.rows.items()}
        shares: Mapping[str, float] = {name: count for name, count in blocks.items() if count} if weights is None else weights
        if not any(blocks.values()):
            raise DataError(expected="at least one conversation to learn from", found=f"none in {', '.join(self.source_names) or 'no source'}", fix="add chat sources to the corpus step")
        self.order = MixtureOrder(blocks, shares, derive_seed(seed, "sft"), start)

    def _targets(self, name: str, document: int) -> np.ndarray:
        """1 where the token is to be predicted, for all tokens but the first: [n - 1], cut to s."""
        mask = self.shards[name].mask(document)
        n = min(int(self.shards[name].lengths[document]), self.seq_length + 1)
        if self.mask == "all" or mask is None:
            return np.ones(max(n - 1, 0), np.uint8)
        return mask[1:n]

    def _pack(self, name: str, seed: int) -> list[np.ndarray]:
        shard = self.shards[name]
        # A shuffle first: equal lengths keep their order in the packing, and files are often sorted by topic.
        shuffled = generator(seed, "sft", "pack", name).permutation(len(shard))
        usable = [int(i) for i in shuffled if self._targets(name, int(i)).any()]
        self.without_target[name] = len(shard) - len(usable)
        lengths = np.asarray([shard.lengths[i] - 1 for i in usable], np.int64)
        self.truncated[name] = int((lengths > self.seq_length).sum())
        bins = best_fit_decreasing(np.minimum(lengths, self.seq_length), self.seq_length)
        return [np.asarray([usable[i] for i in row], np.int64) for row in bins]

    def __len__(self) -> int:
        """Rows of one epoch."""
        return sum(len(rows) for rows in self.rows.values())

    def sample(self, index: int) -> Batch:
        """Row `index` of the run (0-based), arrays [s]."""
        source, block, _ = self.order.locate(int(index))
        documents = self.rows[source][block]
        s = self.seq_length
        tokens, labels = np.full(s, self.pad_id, np.int64), np.full(s, self.pad_id, np.int64)
        loss_mask, segments = np.zeros(s, np.float32), np.full(s, -1, np.int32)
        positions = np.zeros(s, np.int64)
        at = 0
        for number, document in enumerate(documents):
            ids = self.shards[source].tokens(int(document))[: s + 1]
            n = len(ids) - 1
            tokens[at : at + n], labels[at : at + n] = ids[:-1], ids[1:]
            loss_mask[at : at + n] = self._targets(source, int(document))
            segments[at : at + n], positions[at : at + n] = number, np.arange(n)
            at += n
        return {
            "tokens": tokens, "labels": labels, "loss_mask": loss_mask, "position_ids": positions, "segment_ids": segments,
            "source_id": self._source_id[source], "document_ids": documents,
        }

    def batch(self, indices: Iterable[int]) -> Batch:
        """Rows `indices` of the run, arrays [b, s]."""
        return collate([self.sample(int(index)) for index in indices])
