"""Documents as one long stream of tokens, without copying them."""

from __future__ import annotations

import numpy as np

from megatron_r1.data.shards import Shard
from megatron_r1.utils.errors import DataError


class TokenStream:
    """The (kept) documents of a shard, end to end.

    keep: None for all documents, a bool array [documents], or an int array of document numbers in the wanted order.
    """

    def __init__(self, shard: Shard, keep: np.ndarray | None = None) -> None:
        self.shard = shard
        if keep is None:
            self.documents: np.ndarray | None = None
            lengths = shard.lengths
        else:
            keep = np.asarray(keep)
            if keep.dtype == bool and len(keep) != len(shard):
                raise DataError(
                    expected=f"one keep flag for each of the {len(shard)} documents of {shard.label}", found=f"{len(keep)} flags",
                    fix="use the mixture together with the shards it was made for",
                )
            self.documents = np.flatnonzero(keep) if keep.dtype == bool else keep.astype(np.int64)
            lengths = shard.lengths[self.documents]
        self.offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        """First token of every document in the stream, and the end: int64[documents + 1]."""

    @property
    def n_tokens(self) -> int:
        """Tokens in the stream."""
        return int(self.offsets[-1])

    def blocks(self, seq_length: int) -> int:
        """How many blocks of `seq_length` targets the stream holds (a block reads one token more than it predicts)."""
        return max(0, (self.n_tokens - 1) // seq_length)

    def read(self, start: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int32[n] from `start`, and the number int64[n] of the document (in the shard) each belongs to.

        O(log documents) to find the place. Raises DataError outside the stream.
        """
        if start < 0 or n < 0 or start + n > self.n_tokens:
            raise DataError(
                expected=f"a range inside the {self.n_tokens} tokens of {self.shard.label}", found=f"tokens {start} to {start + n}",
                fix="count blocks with TokenStream.blocks",
            )
        if n == 0:
            return np.zeros(0, np.int32), np.zeros(0, np.int64)
        first = int(np.searchsorted(self.offsets, start, side="right")) - 1
        last = int(np.searchsorted(self.offsets, start + n, side="left"))
        edges = np.clip(self.offsets[first : last + 1], start, start + n) - start
        numbers = np.arange(first, last) if self.documents is None else self.documents[first:last]
        owner = np.repeat(numbers, np.diff(edges))
        if self.documents is None:
            return self.shard.read(start, n).astype(np.int32), owner
        tokens = np.empty(n, np.int32)
        for i, document in enumerate(numbers):
            begin = max(0, start - int(self.offsets[first + i]))
            where = int(self.shard.offsets[document]) + begin
            tokens[edges[i] : edges[i + 1]] = self.shard.read(where, int(edges[i + 1] - edges[i]))
        return tokens, owner
