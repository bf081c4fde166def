"""Which tokens may see each other, worked out once per batch for all layers: causal, inside a document, from a piece of a sequence.

Documents are given as numbers per token (`segment_ids` [b, S]: equal neighbours belong together, and a value that comes back
after another one is a new document) or as boundaries of one row (`cu_seqlens` [n+1], from 0 to S).

A `Plan` is a list of bands: rows and runs of queries and keys that a kernel can take in one go. Inside a band, document i has
queries query_cuts[i] to query_cuts[i+1] and keys key_cuts[i] to key_cuts[i+1], and its last query sees its last key ("bottom
right" causal): a document whose beginning lies in another piece of the sequence has more keys than queries.

Legend: b rows, S tokens of the whole sequence, s tokens here (S without context parallelism), n documents.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_r1.utils.errors import DataError


class Band(NamedTuple):
    """Rows `rows[0]` to `rows[1]`, which have the same documents there."""

    rows: tuple[int, int]
    queries: tuple[int, int]
    keys: tuple[int, int]
    query_cuts: tuple[int, ...]
    key_cuts: tuple[int, ...]

    @property
    def square(self) -> bool:
        """Whether every document has all its queries here."""
        return self.query_cuts == self.key_cuts


class Cuts(NamedTuple):
    """A band's boundaries as variable-length kernels take them: int32 on their device, and the longest document."""

    queries: Tensor
    keys: Tensor
    longest_query: int
    longest_key: int


@dataclass(frozen=True, eq=False)
class Plan:
    """Every query [s] of every row is in exactly one band. `length` S; `pieces` the number of pieces a sequence is cut into."""

    rows: int
    queries: int
    length: int
    pieces: int
    bands: tuple[Band, ...]
    _cuts: dict[tuple[int, str], Cuts] = field(default_factory=dict)

    @property
    def documents(self) -> bool:
        """Whether a band has several documents."""
        return any(len(band.query_cuts) > 2 for band in self.bands)

    @property
    def square(self) -> bool:
        """Whether every document is here as a whole."""
        return all(band.square for band in self.bands)

    @property
    def whole(self) -> bool:
        """Whether all is one band of one document per row: plain causal attention."""
        return self.pieces == 1 and len(self.bands) == 1 and not self.documents

    def cuts(self, index: int, device: torch.device) -> Cuts:
        """Boundaries of band number `index` on a device; made once."""
        key = (index, str(device))
        if key not in self._cuts:
            band = self.bands[index]
            self._cuts[key] = Cuts(
                torch.tensor(band.query_cuts, dtype=torch.int32, device=device), torch.tensor(band.key_cuts, dtype=torch.int32, device=device),
                longest(band.query_cuts), longest(band.key_cuts),
            )  # fmt: skip
        return self._cuts[key]


def longest(cuts: tuple[int, ...]) -> int:
    """Size of the largest piece."""
    return max((z - a for a, z in pairwise(cuts)), default=0)


def plan_of(documents: Tensor | None, rows: int, length: int, rank: int = 0, pieces: int = 1) -> Plan:
    """The plan for `rows` rows of `length` tokens (the whole sequence), made at the first call and kept with the tensor.

    documents: `segment_ids` [rows, length], or `cu_seqlens` [n+1] for one row, or None for plain causal attention.
    With `pieces` > 1 the queries are chunks `rank` and 2*pieces-1-rank of 2*pieces equal chunks, in this order.
    Raises DataError naming the argument when it does not fit.
    """
    if documents is None:
        return _plain(rows, length, rank, pieces)
    version, plans = getattr(documents, "_r1_plans", (None, {}))
    if version != _version(documents):
        plans = {}
        documents._r1_plans = (_version(documents), plans)  # type: ignore[attr-defined]
    key = (rows, length, rank, pieces)
    if key not in plans:
        cuts = _cuts_of_ids(documents, rows, length) if documents.dim() == 2 else [_cuts_of_boundaries(documents, rows, length)]
        plans[key] = _plan(cuts, length, rank, pieces)
    return plans[key]


def document_numbers(documents: Tensor, rows: int, length: int) -> Tensor:
    """Documents numbered within their row, from 0: int64 [rows, length], never decreasing along a row."""
    if documents.dim() == 2:
        change = torch.zeros_like(documents, dtype=torch.bool)
        change[:, 1:] = documents[:, 1:] != documents[:, :-1]
        return change.cumsum(dim=1)
    at = torch.arange(length, device=documents.device)
    return torch.bucketize(at, documents[1:].to(torch.int64).contiguous(), right=True).expand(rows, length)


@lru_cache(maxsize=64)
def _plain(rows: int, length: int, rank: int, pieces: int) -> Plan:
    return _plan([(0, length) if length else (0,)] * rows, length, rank, pieces)


def _plan(cuts: list[tuple[int, ...]], length: int, rank: int, pieces: int) -> Plan:
    """cuts: per row the boundaries of its documents, from 0 to length, none empty."""
    if length % pieces or (pieces > 1 and length // pieces % 2):
        raise DataError(
            expected=f"qkv: a sequence length divisible by 2 x {pieces}, twice the number of context-parallel pieces", found=f"{length} tokens",
            fix="pad the sequence, or use another number of pieces",
        )  # fmt: skip
    here = length // pieces
    half = here // 2
    # First query here, past-the-last query here, its place in the whole sequence.
    chunks = [(0, here, 0)] if pieces == 1 else [(0, half, rank * half), (half, here, (2 * pieces - 1 - rank) * half)]
    bands = []
    for a, z, start in chunks:
        row = 0
        for boundaries, equal in groupby(cuts):
            rows = (row, row + len(list(equal)))
            row = rows[1]
            if a < z and rows[0] < rows[1]:
                bands.append(_band(boundaries, rows, (a, z), start))
    return Plan(len(cuts), here, length, pieces, tuple(bands))


def _band(boundaries: tuple[int, ...], rows: tuple[int, int], queries: tuple[int, int], start: int) -> Band:
    """The band of the queries whose first stands at `start` of the whole sequence."""
    end = start + queries[1] - queries[0]
    first, last = bisect_right(boundaries, start) - 1, bisect_left(boundaries, end)
    inside = [min(z, end) for z in boundaries[first + 1 : last + 1]]
    origin = boundaries[first]
    return Band(rows, queries, (origin, end), (0, *(z - start for z in inside)), (0, *(z - origin for z in inside)))


def _cuts_of_ids(ids: Tensor, rows: int, length: int) -> list[tuple[int, ...]]:
    if tuple(ids.shape) != (rows, length) or ids.is_floating_point() or ids.is_complex():
        raise DataError(
            expected=f"segment_ids: integers [{rows}, {length}], one per token of the whole sequence", found=f"{ids.dtype} {list(ids.shape)}",
            fix="pass one document number per token, rows first",
        )  # fmt: skip
    result: list[list[int]] = [[0] for _ in range(rows)]
    for row, column in (ids[:, 1:] != ids[:, :-1]).nonzero().tolist():
        result[row].append(column + 1)
    return [(*row, length) if length else (0,) for row in result]


def check_boundaries(boundaries: Tensor, rows: int, max_seqlen: int | None = None) -> None:
    """What can be told without reading `cu_seqlens`. Raises DataError."""
    if boundaries.dim() != 1 or boundaries.dtype not in (torch.int32, torch.int64) or not boundaries.numel():
        raise DataError(
            expected="cu_seqlens: int32 or int64 [documents + 1]", found=f"{boundaries.dtype} {list(boundaries.shape)}",
            fix="pass the running total of document lengths, beginning with 0",
        )  # fmt: skip
    if rows != 1:
        raise DataError(
            expected="qkv: one row [tokens, 1, ...] with cu_seqlens", found=f"{rows} rows",
            fix="put the rows behind each other, or pass segment_ids [rows, tokens]",
        )  # fmt: skip
    if max_seqlen is not None and max_seqlen < 0:
        raise DataError(expected="max_seqlen: a length", found=str(max_seqlen), fix="leave it out: it is found from cu_seqlens")


def _cuts_of_boundaries(boundaries: Tensor, rows: int, length: int) -> tuple[int, ...]:
    check_boundaries(boundaries, rows)
    values = boundaries.tolist()
    fix = "pass the running total of document lengths, beginning with 0"
    if values[0] != 0:
        raise DataError(expected="cu_seqlens: a first value of 0", found=str(values[0]), fix=fix)
    for place, (a, z) in enumerate(pairwise(values)):
        if z < a:
            raise DataError(expected="cu_seqlens: values that never decrease", found=f"{a}, then {z} at {place + 1}", fix=fix)
    if values[-1] != length:
        raise DataError(expected=f"cu_seqlens: a last value of {length}, the number of tokens", found=str(values[-1]), fix=fix)
    return tuple(sorted(set(values)))  # an empty document has nothing to compute


def _version(tensor: Tensor) -> int:
    """Changes when the tensor is written to (tensors made in inference mode do not count: they are not written to)."""
    return -1 if tensor.is_inference() else tensor._version
