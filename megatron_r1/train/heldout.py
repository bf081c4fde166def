"""Held-out documents packed into fixed rows: what validation and RankMe look at, the same tokens every time. Numpy only.

Legend: r rows, s sequence length. Documents never attend to each other here, whatever the training batches allow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_r1.artifacts.probe import ProbeSet
from megatron_r1.utils.seeding import generator

SPLITS = ("probe", "test")
_OPEN_ROWS = 64
"""How far back packing looks for room: all rows would be quadratic in the number of documents."""


@dataclass(frozen=True)
class Document:
    """Tokens [n] of one held-out document (or its beginning) and which of its tokens are targets, [n] (None: all)."""

    curve: str
    tokens: np.ndarray
    mask: np.ndarray | None = None


@dataclass(frozen=True)
class Rows:
    """Packed documents.

    batch: tokens, labels, position_ids int64[r,s], loss_mask float32[r,s], segment_ids int32[r,s] (-1 = padding),
    source_ids int32[r] (0). places: (row, first column, inputs) of every document, in order. curve_ids int64[r,s]
    indexes `curves` at every target (0 elsewhere, where loss_mask is 0).
    """

    batch: dict[str, np.ndarray]
    places: list[tuple[int, int, int]]
    curve_ids: np.ndarray
    curves: list[str]

    def __len__(self) -> int:
        return len(self.batch["tokens"])

    def part(self, rows: slice) -> dict[str, np.ndarray]:
        """The batch of some rows."""
        return {key: value[rows] for key, value in self.batch.items()}


def pack(documents: list[Document], seq_length: int) -> Rows:
    """Documents into the first of the newest rows that has room; a document longer than seq_length + 1 tokens is cut to that.

    A document of n tokens takes n - 1 columns: input i predicts token i + 1, so its first token is context only.
    """
    curves = sorted({document.curve for document in documents})
    free: list[int] = []
    places = []
    for document in documents:
        inputs = min(len(document.tokens) - 1, seq_length)
        row = next((index for index in range(max(0, len(free) - _OPEN_ROWS), len(free)) if free[index] >= inputs), len(free))
        if row == len(free):
            free.append(seq_length)
        places.append((row, seq_length - free[row], inputs))
        free[row] -= inputs
    shape = (len(free), seq_length)
    batch = {key: np.zeros(shape, np.int64) for key in ("tokens", "labels", "position_ids")}
    batch["loss_mask"], batch["segment_ids"] = np.zeros(shape, np.float32), np.full(shape, -1, np.int32)
    batch["source_ids"] = np.zeros(shape[0], np.int32)
    curve_ids = np.zeros(shape, np.int64)
    segments = [0] * len(free)
    for document, (row, start, inputs) in zip(documents, places):
        columns = slice(start, start + inputs)
        batch["tokens"][row, columns] = document.tokens[:inputs]
        batch["labels"][row, columns] = document.tokens[1 : inputs + 1]
        batch["position_ids"][row, columns] = np.arange(inputs)
        batch["loss_mask"][row, columns] = 1.0 if document.mask is None else document.mask[1 : inputs + 1]
        batch["segment_ids"][row, columns] = segments[row]
        curve_ids[row, columns] = curves.index(document.curve)
        segments[row] += 1
    return Rows(batch, places, curve_ids, curves)


def _take(documents: Iterable[Document], tokens: int, seq_length: int) -> Iterator[Document]:
    """Documents until their targets reach `tokens`; the last one is cut to fit."""
    for document in documents:
        if tokens <= 0:
            return
        length = min(len(document.tokens), tokens + 1, seq_length + 1)
        if length >= 2:
            yield Document(document.curve, document.tokens[:length], None if document.mask is None else document.mask[:length])
            tokens -= length - 1


def interleaved(groups: Iterable[Iterable[Document]]) -> Iterator[Document]:
    """One document of every group in turn, so that a token budget is shared between sources. Reads no further than asked."""
    waiting = [iter(group) for group in groups]
    while waiting:
        still = []
        for group in waiting:
            document = next(group, None)
            if document is not None:
                still.append(group)
                yield document
        waiting = still


def _documents(shards: Any, source: str, split: str, curve: str, seed: int) -> Iterator[Document]:
    """The documents of one split, in an order drawn from the seed (files are often sorted by topic)."""
    shard = shards.split(source, split)
    for index in generator(seed, "heldout", source, split).permutation(len(shard)):
        yield Document(curve, np.asarray(shard.tokens(int(index))), shard.mask(int(index)))


def validation_documents(shards: Any, probe: ProbeSet | None, tokens: int, seq_length: int, seed: int) -> list[Document]:
    """Documents of all validation curves, at most `tokens` targets each.

    Curves: `probe/<capability>` from the probe set, or without one `probe/<domain>` from the shards' probe split; and always
    `test/<domain>` from their test split (distractors and noise are left out: nobody wants their loss low).
    """
    chosen: list[Document] = []
    for capability, record in sorted(probe.capabilities.items()) if probe is not None else ():
        by_source: dict[str, list[Document]] = {}
        for reference in record.documents:
            document = Document(f"probe/{capability}", np.asarray(reference.tokens(shards)))
            by_source.setdefault(reference.source, []).append(document)
        chosen += _take(interleaved(by_source.values()), tokens, seq_length)
    for split in SPLITS if probe is None else SPLITS[1:]:
        domains: dict[str, list[str]] = {}
        for name, source in sorted(shards.sources.items()):
            if not source.distractor and source.domain != "noise":
                domains.setdefault(source.domain, []).append(name)
        for domain, names in sorted(domains.items()):
            groups = [_documents(shards, name, split, f"{split}/{domain}", seed) for name in names]
            chosen += _take(interleaved(groups), tokens, seq_length)
    return chosen


def source_documents(shards: Any, sources: Iterable[str], tokens: int, seq_length: int, seed: int) -> list[Document]:
    """Documents of the curves `source/<name>`, at most `tokens` targets each: from the probe split of every one of `sources`, whatever it is."""
    return [
        document for name in sources if tokens for document in _take(_documents(shards, name, "probe", f"source/{name}", seed), tokens, seq_length)
    ]


def rankme_documents(shards: Any, samples: int, seq_length: int, seed: int) -> tuple[list[Document], np.ndarray]:
    """`samples` held-out documents (probe split, all sources but distractors in turn; fewer if there are not as many) and one
    random token of each, never the first: positions int64[n]. The documents are cut behind that token, which causal
    attention cannot see past anyway."""
    names = [name for name, source in sorted(shards.sources.items()) if not source.distractor and source.domain != "noise"]
    groups = [_documents(shards, name, "probe", "rankme", seed) for name in names]
    documents, positions = [], []
    draw = generator(seed, "rankme")
    for document in interleaved(groups):
        if len(documents) == samples:
            break
        if len(document.tokens) >= 3:
            position = int(draw.integers(1, min(len(document.tokens) - 1, seq_length)))
            documents.append(Document("rankme", document.tokens[: position + 2]))
            positions.append(position)
    return documents, np.asarray(positions, np.int64)
