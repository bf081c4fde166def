"""Last tasks: pieces become shards. Each task writes one range of a shard's tokens into its place in the file.

A shard (one split of one source) is a row of *segments*: the pieces in order or, shuffled, stretches of the shuffled order,
each gathered from all pieces. Ranges are cut at multiples of `Sizes.range` tokens, so that no two tasks ever write to one block, and
the checksums of a range's blocks are the shard's. The rows of a document belong to the range in which its first token lies.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_r1.corpus.plan import Job, Part
from megatron_r1.corpus.scratch import save, whole
from megatron_r1.corpus.tokenise import piece
from megatron_r1.data.documents import write_documents
from megatron_r1.data.indexed import BlockSums, suffixed, write_index, write_sums
from megatron_r1.data.shards import SPLITS, SplitRecord, describe
from megatron_r1.utils.io import disk_errors

WRITTEN = 1 << 22
ROW = ("id", "group", "n_tokens", "n_bytes", "file", "offset")


class Shape(NamedTuple):
    """One split of one source, by piece: documents, tokens and bytes of text before each piece and at the end, int64[pieces + 1, 3]."""

    parts: list[Part]
    before: np.ndarray
    first: np.ndarray
    """Documents and tokens of the piece that come before this split's, int64[pieces, 2]."""
    dtype: np.dtype
    masked: bool

    @property
    def documents(self) -> int:
        return int(self.before[-1, 0])

    @property
    def tokens(self) -> int:
        return int(self.before[-1, 1])


class Layout:
    """What the assembly of a job knows; made once in a process. records: part -> what tokenise returned."""

    def __init__(self, job: Job, records: dict[tuple[str, int], dict[str, Any]]) -> None:
        self.job, self.records = job, records
        self.shapes: dict[tuple[str, str], Shape] = {}
        for source in job.present:
            parts = job.parts_of(source)
            counts = np.array([[records[source, part.number]["splits"][split] for split in SPLITS] for part in parts], np.int64).reshape(-1, len(SPLITS), 3)
            for code, split in enumerate(SPLITS):
                before = np.concatenate([np.zeros((1, 3), np.int64), np.cumsum(counts[:, code], axis=0)])
                record = records[source, parts[0].number]
                self.shapes[source, split] = Shape(parts, before, counts[:, :code, :2].sum(axis=1), np.dtype(record["dtype"]), record["masked"])

    def shards(self) -> list[tuple[str, str]]:
        """Every (source, split) that has documents."""
        return [which for which, shape in self.shapes.items() if shape.documents]

    def prefix(self, source: str, split: str) -> Path:
        """Where a shard is made."""
        return self.job.made / "sources" / source / split

    def stretches(self, source: str, split: str) -> int:
        """Segments of the shuffled order."""
        return max(1, -(-self.shapes[source, split].tokens // self.job.sizes.segment))


@lru_cache(maxsize=256)
def _rows(path: Path) -> Any:
    import pyarrow as pa

    with pa.memory_map(str(path)) as stream:
        return pa.ipc.open_file(stream).read_all()


def _table(job: Job, part: Part) -> Any:
    return _rows(piece(job, part).with_suffix(".arrow"))


def measure(layout: Layout, source: str, split: str) -> dict[str, Any]:
    """Shuffled corpora: tokens and documents before every stretch of the shuffled order; int64[stretches + 1, 2] beside the pieces."""
    shape, count = layout.shapes[source, split], layout.stretches(source, split)
    found = np.zeros((count + 1, 2), np.int64)
    for i, part in enumerate(shape.parts):
        table = _table(layout.job, part).slice(int(shape.first[i, 0]), int(shape.before[i + 1, 0] - shape.before[i, 0]))
        cuts = np.searchsorted(table["order"].to_numpy(), _limits(count))
        cuts[-1] = len(table)
        ends = np.concatenate([[0], np.cumsum(table["n_tokens"].to_numpy())])
        found[1:] += np.diff(np.stack([ends[cuts], cuts], axis=1), axis=0)
    save(layout.job.made / "measured" / source / f"{split}.npy", np.cumsum(found, axis=0))
    return {}


def _limits(count: int) -> np.ndarray:
    """uint64[count + 1]: the first place of every stretch; the last stands for the end."""
    return np.array([(i << 64) // count for i in range(count)] + [(1 << 64) - 1], np.uint64)


def ranges(layout: Layout, source: str, split: str) -> int:
    """Tasks of a shard."""
    return max(1, -(-layout.shapes[source, split].tokens // layout.job.sizes.range))


def _segments(layout: Layout, source: str, split: str, start: int, stop: int) -> Iterator[tuple[int, Any, np.ndarray, np.ndarray | None]]:
    """What overlaps the tokens from `start` to `stop`: (its first token's place, rows, tokens, mask)."""
    shape = layout.shapes[source, split]
    if not layout.job.config.shuffle:
        ends = shape.before[:, 1]
        for i in range(int(np.searchsorted(ends[1:], start)), int(np.searchsorted(ends[:-1], stop, "right"))):
            yield int(ends[i]), *_stretch(layout, shape, i, 0, int(shape.before[i + 1, 0] - shape.before[i, 0]))
        return
    count = layout.stretches(source, split)
    ends = np.load(layout.job.made / "measured" / source / f"{split}.npy")[:, 0]
    for number in range(int(np.searchsorted(ends[1:], start)), int(np.searchsorted(ends[:-1], stop, "right"))):
        yield int(ends[number]), *_gathered(layout, shape, number, count)


def _stretch(layout: Layout, shape: Shape, i: int, first: int, last: int) -> tuple[Any, np.ndarray, np.ndarray | None]:
    """Documents `first` to `last` of the split's in piece i: rows, tokens, mask."""
    part = shape.parts[i]
    table = _table(layout.job, part).slice(int(shape.first[i, 0]), int(shape.before[i + 1, 0] - shape.before[i, 0]))
    ends = np.concatenate([[0], np.cumsum(table["n_tokens"].to_numpy())]) + int(shape.first[i, 1])
    start, size = int(ends[first]), int(ends[last] - ends[first])
    path = piece(layout.job, part)
    tokens = np.fromfile(path.with_suffix(".bin"), shape.dtype, size, offset=start * shape.dtype.itemsize)
    mask = np.fromfile(path.with_suffix(".mask"), np.uint8, size, offset=start) if shape.masked else None
    return table.slice(first, last - first), tokens, mask


def _gathered(layout: Layout, shape: Shape, number: int, count: int) -> tuple[Any, np.ndarray, np.ndarray | None]:
    """One stretch of the shuffled order out of all pieces: rows, tokens, mask."""
    import pyarrow as pa

    found = []
    limits = _limits(count)[number : number + 2]
    for i, part in enumerate(shape.parts):
        places = _table(layout.job, part)["order"].slice(int(shape.first[i, 0]), int(shape.before[i + 1, 0] - shape.before[i, 0])).to_numpy()
        first, last = np.searchsorted(places, limits)
        last = len(places) if number == count - 1 else last
        if last > first:
            found.append(_stretch(layout, shape, i, int(first), int(last)))
    table = pa.concat_tables([rows for rows, _, _ in found]) if found else _table(layout.job, shape.parts[0]).slice(0, 0)
    lengths = table["n_tokens"].to_numpy()
    order = np.argsort(table["order"].to_numpy(), kind="stable")
    starts = np.cumsum(lengths) - lengths
    arrays = []
    for which, kind in ((1, shape.dtype), (2, np.uint8)):
        whole = np.concatenate([part[which] for part in found]) if found and (which == 1 or shape.masked) else np.zeros(0, kind)
        # Slices, not an array of places: that would be four times the tokens.
        arrays.append(np.concatenate([np.zeros(0, kind), *(whole[starts[i] : starts[i] + lengths[i]] for i in order)]) if len(whole) else whole)
    tokens, masks = arrays
    return table.take(order), tokens, masks if shape.masked else None


def write_range(layout: Layout, source: str, split: str, number: int) -> dict[str, Any]:
    """Write one range of a shard, and its rows; returns the checksums of its blocks."""
    shape, prefix = layout.shapes[source, split], layout.prefix(source, split)
    size = layout.job.sizes.range
    start, stop = number * size, min((number + 1) * size, shape.tokens)
    endings = [(".bin", shape.dtype.itemsize), *([(".mask", 1)] if shape.masked else [])]
    sums = [BlockSums() for _ in endings]
    at, bytes_ = start, 0
    with disk_errors(prefix):
        prefix.parent.mkdir(parents=True, exist_ok=True)
        files = [os.open(suffixed(prefix, ending), os.O_RDWR | os.O_CREAT, 0o666) for ending, _ in endings]
    try:
        with disk_errors(prefix):
            for file, (_, width) in zip(files, endings, strict=True):
                # Every task gives the file its whole size: none waits for another.
                os.ftruncate(file, shape.tokens * width)
        with whole(_rows_of(layout, source, split, number)) as stream:
            sink = None
            for first, rows, *arrays in _segments(layout, source, split, start, stop):
                begin, end = max(start, first) - first, min(stop, first + len(arrays[0])) - first
                for file, (_, width), data, checks in zip(files, endings, arrays, sums, strict=False):
                    for place in range(begin, end, WRITTEN):
                        block = np.ascontiguousarray(data[place : min(place + WRITTEN, end)])
                        _put(file, block, (first + place) * width, prefix)
                        checks.update(block)
                at += max(0, end - begin)
                lengths = rows["n_tokens"].to_numpy()
                starts = first + np.cumsum(lengths) - lengths
                # Documents without tokens at the very end have no token after them to begin at.
                low, high = np.searchsorted(starts, start), np.searchsorted(starts, stop, "right" if stop == shape.tokens else "left")
                mine = rows.slice(low, high - low).select(ROW)
                sink = sink or _sink(stream, mine.schema)
                sink.write_table(mine)
                bytes_ += int(mine["n_bytes"].to_numpy().sum())
            if sink is not None:
                sink.close()
        assert at == stop, f"{source}/{split}: range {number} ends at {at} instead of {stop}"
        with disk_errors(prefix):
            for file in files:
                os.fsync(file)
    finally:
        for file in files:
            os.close(file)
    return {"sums": [checks.finish().tolist() for checks in sums], "bytes": bytes_}


def _put(file: int, data: np.ndarray, offset: int, path: Path) -> None:
    view = memoryview(data).cast("B")
    with disk_errors(path):
        while len(view):
            written = os.pwrite(file, view, offset)
            view, offset = view[written:], offset + written


def _sink(stream: Any, schema: Any) -> Any:
    import pyarrow as pa

    return pa.ipc.new_file(stream, schema)


def _rows_of(layout: Layout, source: str, split: str, number: int) -> Path:
    return layout.job.made / "rows" / source / f"{split}-{number:06d}.arrow"


def _batches(layout: Layout, source: str, split: str) -> Iterator[Any]:
    """The rows of a shard, in order, a few at a time."""
    import pyarrow as pa

    for number in range(ranges(layout, source, split)):
        with pa.memory_map(str(_rows_of(layout, source, split, number))) as stream:
            file = pa.ipc.open_file(stream)
            for i in range(file.num_record_batches):
                yield file.get_batch(i)


def finish(layout: Layout, source: str, split: str, records: list[dict[str, Any]], tokenizer: str) -> dict[str, Any]:
    """Write what describes a whole shard: checksums, .idx, docs.parquet; returns its SplitRecord. records: those of its ranges."""
    shape, prefix = layout.shapes[source, split], layout.prefix(source, split)
    for which, ending in enumerate([".bin", *([".mask"] if shape.masked else [])]):
        write_sums(suffixed(prefix, ending), np.array([crc for record in records for crc in record["sums"][which]], np.uint32))
    write_index(suffixed(prefix, ".idx"), (batch.column("n_tokens").to_numpy() for batch in _batches(layout, source, split)), shape.dtype)
    rows = chain.from_iterable(zip(*(batch.column(name).to_pylist() for name in ROW), strict=True) for batch in _batches(layout, source, split))
    write_documents(suffixed(prefix, ".docs.parquet"), rows, tokenizer)
    return describe(prefix, sum(record["bytes"] for record in records)).plain()


def empty() -> SplitRecord:
    """The record of a shard without documents."""
    return SplitRecord(documents=0, tokens=0, bytes=0)
