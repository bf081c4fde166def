"""What is left of a running epoch after a change of kept documents or of the sequence length: nothing lost, nothing repeated.

Of every source the state is a `SourceCursor`: the epoch, and the legs of it, one for each list of documents or sequence length it
was read with. A leg is known by a handful of numbers, because its blocks were taken in a keyed order: which tokens they held is
computed again by counting them out. Once an epoch is over its legs are forgotten.

After a change, the rest of the running epoch is the stream of those tokens of the documents now kept that have not been targets in
this epoch; whole epochs of the documents now kept follow. So within an epoch a token is a target at most once whatever changes, and
by the end of the epoch every token of the documents kept by then has been one, but for two kinds: the first token of a leg's stream,
which nothing precedes, and the end of the last leg's stream that fills no block (at most as many tokens as a sequence is long). A
document that leaves the list is read no further; one that joins is read in the running epoch already, as far as it was not read in
this epoch before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from megatron_r1.artifacts.checkpoint import Leg, SourceCursor
from megatron_r1.data.mixture_order import Rest, block_key, permuted_many
from megatron_r1.data.shards import Shard
from megatron_r1.data.view import Ranges, TokenStream, union
from megatron_r1.utils.errors import DataError

Views = Callable[[str], "np.ndarray | None"]
"""Name of a list of documents (Leg.view) -> what TokenStream takes as `keep`."""


def consumed(shard: Shard, source: str, cursor: SourceCursor, seed: int, views: Views) -> Ranges:
    """Tokens of the shard that were targets in the running epoch. O(tokens / seq_length + documents).

    Raises DataError when a leg has another number of blocks than when it was begun: it was of other shards.
    """
    taken: Ranges | None = None
    for number, leg in enumerate(cursor.legs):
        stream = TokenStream(shard, views(leg.view), taken)
        if stream.blocks(leg.seq_length) != leg.blocks:
            raise DataError(
                expected=f"{leg.blocks} blocks of {leg.seq_length} tokens in leg {number} of epoch {cursor.epoch} of {source}", found=f"{stream.blocks(leg.seq_length)}",
                fix="go on with the shards the checkpoint was trained on, or set carry_cursors: false",
            )
        blocks = permuted_many(np.arange(leg.taken), leg.blocks, block_key(seed, source, cursor.epoch, number))
        part = stream.ranges_of(blocks, leg.seq_length)
        taken = part if taken is None else union(taken, part)
    return taken or (np.zeros(0, np.int64), np.zeros(0, np.int64))


class Continued:
    """A source that goes on from a cursor with a list of documents and a sequence length.

    stream: a whole epoch; rest: how the order is to begin (None: with a whole epoch or within one), with `rest_stream`; start: blocks of that
    already consumed, as MixtureOrder counts; legs: of the running epoch before the one read now.
    """

    def __init__(self, shard: Shard, source: str, cursor: SourceCursor, seed: int, view: str, views: Views, seq_length: int) -> None:
        self.source, self.shard, self.view, self.seq_length = source, shard, view, seq_length
        self.stream = TokenStream(shard, views(view))
        self.blocks = self.stream.blocks(seq_length)
        self.rest: Rest | None = None
        self.rest_stream: TokenStream | None = None
        self.legs = [leg for leg in cursor.legs if leg.taken]
        self.start = cursor.epoch * self.blocks
        last = self.legs[-1] if self.legs else None
        goes_on = last is not None and (last.view, last.seq_length) == (view, seq_length)
        if last is not None and goes_on:
            self.legs.pop()
        if not self.legs:
            self.start += last.taken if last is not None else 0
            if last is not None and last.blocks != self.blocks:
                raise DataError(
                    expected=f"{last.blocks} blocks of {seq_length} tokens in {source}", found=f"{self.blocks}",
                    fix="go on with the shards the checkpoint was trained on, or set carry_cursors: false",
                )
            return
        stream = TokenStream(shard, views(view), consumed(shard, source, SourceCursor(epoch=cursor.epoch, legs=self.legs), seed, views))
        blocks = stream.blocks(seq_length)
        if blocks:
            self.rest, self.rest_stream = Rest(cursor.epoch, len(self.legs), blocks), stream
            self.start = last.taken if last is not None and goes_on else 0
        else:
            self.start += self.blocks

    def limit(self, epochs: float) -> int:
        """Count of blocks, as MixtureOrder counts, at which the source has been passed through `epochs` times (rounded down to a block)."""
        whole = self.rest.epoch + 1 if self.rest is not None else 0
        return (self.rest.blocks if self.rest is not None else 0) + math.floor((epochs - whole) * self.blocks + 1e-9)

    def cursor(self, position: tuple[int, int, int]) -> SourceCursor:
        """The state after some samples; position: what MixtureOrder.position says."""
        epoch, leg, taken = position
        before: Sequence[Leg] = self.legs if leg else []
        blocks = self.rest.blocks if leg and self.rest is not None else self.blocks
        now = [Leg(view=self.view, seq_length=self.seq_length, blocks=blocks, taken=taken)] if taken else []
        return SourceCursor(epoch=epoch, legs=[*before, *now])
