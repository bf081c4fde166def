"""What shards hold: counts, lengths, duplicates, frequent tokens."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping

import numpy as np
from pydantic import Field

from megatron_r1.config.base import Frozen
from megatron_r1.data.shards import SPLITS, Shard, ShardSet
from megatron_r1.utils.errors import DataError

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
SPAN = 1 << 22
"""Tokens read at once."""
FREQUENT = 10
LARGEST = 1 << 24
"""Ids up to here are counted (one count each): no vocabulary is larger, damaged files are."""


class Statistics(Frozen):
    """Figures of one split of one source, or of all of them."""

    source: str = Field(description="source, or the name of a plain dataset")
    split: str = Field(description="split; empty for a plain dataset")
    documents: int = Field(description="documents")
    tokens: int = Field(description="tokens")
    bytes: int = Field(description="UTF-8 bytes of the text; 0 where it is not recorded")
    empty: int = Field(description="documents without a token")
    shortest: int = Field(description="tokens of the shortest document")
    longest: int = Field(description="tokens of the longest document")
    percentiles: dict[int, int] = Field(description="percent of the documents -> tokens that so many do not exceed (the nearest rank below)")
    duplicates: int | None = Field(None, description="documents whose tokens are those of an earlier one; None: not looked for")
    frequent: list[tuple[int, int]] | None = Field(None, description="most frequent token ids with their counts; None: not looked for")

    @property
    def mean(self) -> float:
        """Tokens a document."""
        return self.tokens / max(1, self.documents)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes a token."""
        return self.bytes / max(1, self.tokens)


def shards_of(shards: ShardSet, source: str | None = None, split: str | None = None) -> dict[tuple[str, str], Shard]:
    """The splits of a ShardSet, or those of one name. Raises DataError for unknown names."""
    sources = [source] if source else list(shards.sources)
    return {(name, part): shards.split(name, part) for name in sources for part in ([split] if split else SPLITS)}


def statistics(shards: Mapping[tuple[str, str], Shard], content: bool = False) -> list[Statistics]:
    """Figures of every (source, split) and, last, of all together (source "all").

    content: read the tokens too, for duplicates and frequent tokens. Memory: a few bytes a document, none a token.
    """
    rows: list[Statistics] = []
    lengths = [shard.lengths for shard in shards.values()]
    hashes: list[np.ndarray] = []
    counts = np.zeros(0, np.int64)
    for (source, split), shard in shards.items():
        own, tally = (_hashes(shard), _tally(shard)) if content else (None, None)
        rows.append(_row(source, split, shard.lengths, shard.n_bytes, own, tally))
        if own is not None and tally is not None:
            hashes.append(own)
            counts = _add(counts, tally)
    every = np.concatenate(lengths) if lengths else np.zeros(0, np.int32)
    rows.append(_row("all", "", every, sum(row.bytes for row in rows), np.concatenate([np.zeros(0, np.uint64), *hashes]) if content else None, counts if content else None))
    return rows


def _row(source: str, split: str, lengths: np.ndarray, n_bytes: int, hashes: np.ndarray | None, counts: np.ndarray | None) -> Statistics:
    n = len(lengths)
    ranks = {percent: max(0, -(-percent * n // 100) - 1) for percent in PERCENTILES} if n else {}
    ordered = np.partition(lengths, sorted({0, n - 1, *ranks.values()})) if n else lengths
    frequent = None
    if counts is not None:
        top = np.argsort(-counts, kind="stable")[:FREQUENT]
        frequent = [(int(token), int(counts[token])) for token in top if counts[token]]
    return Statistics(
        source=source, split=split, documents=n, tokens=int(lengths.sum(dtype=np.int64)), bytes=n_bytes, empty=int((lengths == 0).sum()),
        shortest=int(ordered[0]) if n else 0, longest=int(ordered[-1]) if n else 0, percentiles={percent: int(ordered[rank]) for percent, rank in ranks.items()},
        duplicates=None if hashes is None else n - len(np.unique(hashes)), frequent=frequent,
    )


def _hashes(shard: Shard) -> np.ndarray:
    """64 bits for the tokens of every document: two of 2^32 different documents are taken for equal once in two trials."""
    width = np.dtype(np.int64)

    def one(tokens: np.ndarray) -> int:
        # The same ids are the same document whatever type they were stored in.
        return int.from_bytes(hashlib.blake2b(tokens.astype(width).tobytes(), digest_size=8).digest(), "little")

    return np.fromiter((one(tokens) for tokens in _documents(shard)), np.uint64, len(shard))


def _documents(shard: Shard) -> Iterable[np.ndarray]:
    for first in range(0, len(shard), 1024):
        edges = shard.edges(first, min(first + 1024, len(shard))).tolist()
        for start, end in itertools.pairwise(edges):
            yield shard.read(start, end - start)


def _tally(shard: Shard) -> np.ndarray:
    counts = np.zeros(0, np.int64)
    for start in range(0, shard.n_tokens, SPAN):
        tokens = shard.read(start, min(SPAN, shard.n_tokens - start))
        if tokens.min() < 0 or tokens.max() >= LARGEST:
            raise DataError(
                expected=f"token ids from 0 to {LARGEST - 1} in {shard.label}", found=f"ids from {tokens.min()} to {tokens.max()}", fix="ask for statistics without the content"
            )
        counts = _add(counts, np.bincount(tokens))
    return counts


def _add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    total = longer.astype(np.int64)
    total[: len(shorter)] += shorter
    return total
