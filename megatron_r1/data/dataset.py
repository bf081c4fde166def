"""Training batches as numpy arrays, each a pure function of the sample numbers asked for.

Legend: b rows of a batch, s tokens of a row. A batch holds tokens, labels, position_ids int32[b, s], loss_mask float32[b, s],
segment_ids int32[b, s] (number of the document within the row, from 0; padding -1), source_ids int32[b] (index into
`source_names`) and document_ids (a list of b int64 arrays: the numbers, in their shard, of the row's documents in order).
Token numbers are 32 bits wide until they are where the model is: half the memory to write, and half to upload.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np

from megatron_r1.data.mixture_order import MixtureOrder
from megatron_r1.data.packing import Rows, best_fit_decreasing
from megatron_r1.data.schedule import Order
from megatron_r1.data.shards import Shard
from megatron_r1.data.view import TokenStream
from megatron_r1.utils.errors import DataError, R1Error
from megatron_r1.utils.seeding import derive_seed, generator

Batch = dict[str, Any]
PER_TOKEN = ("tokens", "labels", "loss_mask", "position_ids", "segment_ids")
MASK_PIECE = 1 << 22
"""Loss masks are looked through in pieces of about so many tokens."""


def row_of(batch: Batch) -> Batch:
    """The row of a batch of one: arrays [s], `source_id` and `document_ids` of this row."""
    return {**{key: batch[key][0] for key in PER_TOKEN}, "source_id": int(batch["source_ids"][0]), "document_ids": batch["document_ids"][0]}


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Errors say what was being read when they came up: a batch is read by another thread, long before it is needed."""
    try:
        yield
    except R1Error as error:
        raise type(error)(expected=error.expected, found=f"{error.found} (while reading {what})", fix=error.fix) from error
    except OSError as error:
        raise DataError(expected=f"{what} to be readable", found=f"{type(error).__name__}: {error}", fix="look at the disk or file system the shards are on, then run the same command again") from error


class PretrainDataset:
    """Blocks of packed text, drawn from `streams` in the order of a mixture.

    Block i of a stream is its tokens i*s ... i*s + s: the first s are inputs, the last s labels, so every token is a target once.
    rests: the streams of sources whose order begins with the rest of an epoch (data/carry.py).
    reset_documents: attention and positions restart at every document, and the first token of a document is no target
    (nothing it could be predicted from is visible); without it the row is one segment, as the original trained.
    """

    def __init__(
        self, streams: Mapping[str, TokenStream], order: Order, seq_length: int, reset_documents: bool, rests: Mapping[str, TokenStream] | None = None
    ) -> None:
        self.streams, self.order, self.seq_length, self.reset_documents = dict(streams), order, int(seq_length), reset_documents
        self.rests = dict(rests or {})
        self.source_names = list(self.streams)
        for name in order.weights:
            for what, wanted in (("", order.blocks[name]), (" (rest of an epoch)", order.rest[name].blocks if name in order.rest else 0)):
                stream = (self.rests if what else self.streams).get(name)
                have = 0 if stream is None else stream.blocks(self.seq_length)
                if have < wanted:
                    raise DataError(
                        expected=f"{wanted} blocks of {seq_length} tokens in {name}{what}", found=f"{have}",
                        fix="count the mixture's blocks with TokenStream.blocks of the same streams and sequence length",
                    )
        numbers = {name: i for i, name in enumerate(self.source_names)}
        self._numbers = np.asarray([numbers[name] for name in order.names], np.int32)
        self._rest_epoch = np.asarray([order.rest[name].epoch if name in order.rest else -1 for name in self.source_names], np.int64)

    def stream(self, source: str, epoch: int) -> TokenStream:
        """What a source's blocks of an epoch are blocks of."""
        rest = self.order.rest.get(source)
        return self.rests[source] if rest is not None and epoch == rest.epoch else self.streams[source]

    def sample(self, index: int) -> Batch:
        """Row `index` of the run (0-based), arrays [s]."""
        return row_of(self.batch([index]))

    def batch(self, indices: Iterable[int]) -> Batch:
        """Rows `indices` of the run, arrays [b, s]. Raises DataError, which names source and blocks, when a file is damaged."""
        numbers, blocks, epochs = self.order.locate_many(np.fromiter(indices, np.int64))
        sources = self._numbers[numbers]
        b, s = len(sources), self.seq_length
        # One piece of memory for all: large enough for the system to back it by large pages, which are far fewer to touch first.
        memory = np.empty(b * (4 * s + 1), np.int32)
        window, rest = memory[: b * (s + 1)].reshape(b, s + 1), memory[b * (s + 1) :].reshape(3, b, s)
        segment_ids, position_ids, loss_mask = rest[0], rest[1], rest[2].view(np.float32)
        streams = 2 * sources + (self._rest_epoch[sources] == epochs)
        order = np.argsort(streams, kind="stable")
        pieces = []
        for rows in np.split(order, np.flatnonzero(np.diff(streams[order])) + 1):
            name = self.source_names[sources[rows[0]]]
            with reading(f"blocks {', '.join(map(str, blocks[rows].tolist()))} of {name}"):
                found = self.stream(name, int(epochs[rows[0]])).windows(blocks[rows] * s, s + 1)
            window[rows] = found.tokens
            pieces.append((rows[found.row], found.begin, found.document, found.repeated))
        row, begin, document, repeated = (np.concatenate(parts) for parts in zip(*pieces))
        loss_mask.fill(1.0)
        # The label at column c is the token after input c: context that was a target before is none again.
        untargeted = (begin > 0) & (repeated | self.reset_documents)
        loss_mask[row[untargeted], begin[untargeted] - 1] = 0.0
        # From here on in the order of rows, and without documents that begin with the last token, which is a label only.
        inside = np.argsort(row, kind="stable")
        inside = inside[begin[inside] < s]
        row, begin, document = row[inside], begin[inside], document[inside]
        first = np.searchsorted(row, np.arange(b + 1))
        if self.reset_documents:
            lengths = np.diff(np.append(row * s + begin, b * s))
            segment_ids.reshape(-1)[:] = np.repeat((np.arange(len(row)) - first[row]).astype(np.int32), lengths)
            np.subtract(np.arange(s, dtype=np.int32), np.repeat(begin.astype(np.int32), lengths).reshape(b, s), out=position_ids)
        else:
            segment_ids.fill(0)
            position_ids[:] = np.arange(s, dtype=np.int32)
        edges = first.tolist()
        return {
            "tokens": window[:, :-1], "labels": window[:, 1:], "loss_mask": loss_mask, "position_ids": position_ids, "segment_ids": segment_ids,
            "source_ids": sources, "document_ids": [document[edges[i] : edges[i + 1]] for i in range(b)],
        }


class SftDataset:
    """Conversations packed into rows of s tokens, whole where they fit.

    Each source is packed by best-fit decreasing, once; a conversation longer than s + 1 tokens loses its end (`truncated`
    counts them) and one without a token to learn is left out (`without_target`). weights: share of rows per source; None
    takes every row once per epoch. mask: learn assistant tokens, or all of them. Row numbers may exceed len(): each epoch has its own order.
    Memory: a few numbers per conversation; masks are read once, in pieces.
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
        self.rows: dict[str, Rows] = {name: self._pack(name, seed) for name in self.source_names}
        blocks = {name: len(rows) for name, rows in self.rows.items()}
        shares: Mapping[str, float] = {name: count for name, count in blocks.items() if count} if weights is None else weights
        if not any(blocks.values()):
            raise DataError(expected="at least one conversation to learn from", found=f"none in {', '.join(self.source_names) or 'no source'}", fix="add chat sources to the corpus step")
        self.order = MixtureOrder(blocks, shares, derive_seed(seed, "sft"), start)

    def _pack(self, name: str, seed: int) -> Rows:
        shard = self.shards[name]
        # A shuffle first: equal lengths keep their order in the packing, and files are often sorted by topic.
        shuffled = generator(seed, "sft", "pack", name).permutation(len(shard))
        usable = shuffled[self._learnable(shard)[shuffled]]
        self.without_target[name] = len(shard) - len(usable)
        lengths = shard.lengths[usable].astype(np.int64) - 1
        self.truncated[name] = int((lengths > self.seq_length).sum())
        rows = best_fit_decreasing(lengths, self.seq_length)
        return Rows(usable[rows.items], rows.offsets)

    def _learnable(self, shard: Shard) -> np.ndarray:
        """Whether a document has a token to predict among its first s + 1: bool[documents]."""
        ends = shard.offsets[:-1] + np.minimum(shard.lengths, self.seq_length + 1)
        if self.mask == "all" or not shard.masked:
            return ends > shard.offsets[:-1] + 1
        found = np.zeros(len(shard), bool)
        first = 0
        while first < len(shard):
            last = max(first + 1, int(np.searchsorted(shard.offsets, shard.offsets[first] + MASK_PIECE, side="right")) - 1)
            begin = int(shard.offsets[first])
            learnt = begin + np.flatnonzero(shard.read_mask(begin, int(ends[last - 1]) - begin))
            found[first:last] = np.searchsorted(learnt, shard.offsets[first:last] + 1) < np.searchsorted(learnt, ends[first:last])
            first = last
        return found

    def __len__(self) -> int:
        """Rows of one epoch."""
        return sum(len(rows) for rows in self.rows.values())

    def sample(self, index: int) -> Batch:
        """Row `index` of the run (0-based), arrays [s]."""
        return row_of(self.batch([index]))

    def batch(self, indices: Iterable[int]) -> Batch:
        """Rows `indices` of the run, arrays [b, s]. Raises DataError, which names the conversation, when a file is damaged."""
        located = [self.order.locate(int(index)) for index in indices]
        shape = (len(located), self.seq_length)
        batch: Batch = {
            "tokens": np.full(shape, self.pad_id, np.int32), "labels": np.full(shape, self.pad_id, np.int32), "loss_mask": np.zeros(shape, np.float32),
            "position_ids": np.zeros(shape, np.int32), "segment_ids": np.full(shape, -1, np.int32),
            "source_ids": np.asarray([self._source_id[found.source] for found in located], np.int32),
            "document_ids": [self.rows[found.source][found.block] for found in located],
        }
        for row, (found, documents) in enumerate(zip(located, batch["document_ids"])):
            self._fill({key: batch[key][row] for key in PER_TOKEN}, found.source, documents)
        return batch

    def _fill(self, row: Batch, source: str, documents: np.ndarray) -> None:
        shard = self.shards[source]
        inputs = np.minimum(shard.lengths[documents], self.seq_length + 1).astype(np.int64) - 1
        ends = np.cumsum(inputs)
        total = int(ends[-1])
        row["segment_ids"][:total] = np.repeat(np.arange(len(documents)), inputs)
        row["position_ids"][:total] = np.arange(total) - np.repeat(ends - inputs, inputs)
        learn_all = self.mask == "all" or not shard.masked
        if learn_all:
            row["loss_mask"][:total] = 1.0
        for document, start, end, n in zip(documents.tolist(), shard.offsets[documents].tolist(), ends.tolist(), inputs.tolist()):
            with reading(f"conversation {document} of {source}"):
                ids = shard.read(start, n + 1)
                row["tokens"][end - n : end], row["labels"][end - n : end] = ids[:-1], ids[1:]
                if not learn_all:
                    row["loss_mask"][end - n : end] = shard.read_mask(start + 1, n)
