"""Scores on disk: append-only shards while the stage works, one table per source when it is done.

A shard holds the partitions that one model copy has finished at one checkpoint, one record behind the other:

    magic, CRC-32 of all that follows, length of the source's name, partition, n, K, name, float64 [n, K]       little-endian

The cursor is what the records say is there. A record is on the disk before the next partition begins; after a kill the last one may be
torn, and is cut off and computed again. Copies write shards of their own and read all, so they need not talk to each other. The
final tables are a pure function of the partitions, hence equal bytes after any interruption and with any number of copies.
"""

from __future__ import annotations

import io as memory
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet

from megatron_r1.artifacts.influence import column
from megatron_r1.influence.select import Chosen
from megatron_r1.utils import io
from megatron_r1.utils.logging import get_logger

log = get_logger(__name__)
_MAGIC = b"R1SC"
_START = struct.Struct("<4sI")  # magic, CRC-32
_SHAPE = struct.Struct("<IIII")  # bytes of the name, partition, n, K
Finished = dict[tuple[str, int], np.ndarray]
"""(source, partition) -> its scores, float64 [n, K]."""


class ScoreStore:
    """Shards under one folder. Legend: n documents of a partition, K = scores kept per document."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ends: dict[Path, int] = {}

    def finished(self, step: int) -> Finished:
        """Every whole partition of a checkpoint, whoever wrote it; of one that is there twice the first."""
        found: Finished = {}
        for path in sorted((self.folder / str(step)).glob("copy-*.scores")):
            records, torn = _records(path.read_bytes())
            for source, part, scores in records:
                found.setdefault((source, part), scores)
            if torn:
                log.warning("influence: the last %d bytes of %s are no whole record; what they held is computed again", torn, path.name)
        return found

    def append(self, step: int, copy: int, source: str, part: int, scores: np.ndarray) -> None:
        """Add a partition, float64 [n, K], to the shard of a model copy. On disk when this returns; raises EnvironmentProblem when it is full."""
        path = self.folder / str(step) / f"copy-{copy:05d}.scores"
        record, start = _record(source, part, scores), self._ends.get(path)
        with io.disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = not path.exists()
            with open(path, "ab") as stream:
                # Behind the last whole record, whatever a kill or a full disk left there.
                stream.truncate(path.stat().st_size - _records(path.read_bytes())[1] if start is None else start)
                stream.seek(0, os.SEEK_END)
                stream.write(record)
                stream.flush()
                os.fsync(stream.fileno())
                self._ends[path] = stream.tell()
            if fresh:
                io.fsync_directory(path.parent)


def _record(source: str, part: int, scores: np.ndarray) -> bytes:
    name = source.encode()
    body = _SHAPE.pack(len(name), part, *scores.shape) + name + np.ascontiguousarray(scores, "<f8").tobytes()
    return _START.pack(_MAGIC, zlib.crc32(body)) + body


def _records(data: bytes) -> tuple[list[tuple[str, int, np.ndarray]], int]:
    """(source, partition, scores) up to the first record that is not whole, and how many bytes are left from there."""
    found, at, head = [], 0, _START.size + _SHAPE.size
    while at + head <= len(data):
        magic, crc = _START.unpack_from(data, at)
        length, part, n, columns = _SHAPE.unpack_from(data, at + _START.size)
        end = at + head + length + 8 * n * columns
        if magic != _MAGIC or end > len(data) or zlib.crc32(memoryview(data)[at + _START.size : end]) != crc:
            break
        source = data[at + head : at + head + length].decode()
        found.append((source, part, np.frombuffer(data, "<f8", n * columns, at + head + length).reshape(n, columns)))
        at = end
    return found, len(data) - at


def parts(documents: int, size: int) -> list[tuple[int, int]]:
    """First and past-the-end document of each partition."""
    return [(first, min(first + size, documents)) for first in range(0, documents, size)]


def write_table(
    path: Path,
    chosen: Chosen,
    capabilities: Sequence[str],
    steps: Sequence[int],
    scores: np.ndarray,
) -> None:
    """Write `scores/<source>.parquet`.

    scores: float64 [T, n, C, 1 + F], the derivative along the whole probe's direction and, with folds, along each of
    them (NaN where a document was not scored by fold, which becomes an empty field).
    """
    columns: dict[str, arrow.Array] = {
        "index": arrow.array(chosen.index, arrow.int64()),
        "id": arrow.array(chosen.ids, arrow.string()),
        "start": arrow.array(chosen.start, arrow.int64()),
        "n_tokens": arrow.array(chosen.n_tokens, arrow.int64()),
    }
    for c, capability in enumerate(capabilities):
        for t, step in enumerate(steps):
            columns[column(capability, step)] = arrow.array(np.ascontiguousarray(scores[t, :, c, 0]), arrow.float64())
            for f in range(scores.shape[-1] - 1):
                found = np.ascontiguousarray(scores[t, :, c, 1 + f])
                columns[column(capability, step, f)] = arrow.array(found, arrow.float64(), from_pandas=True)
    buffer = memory.BytesIO()
    parquet.write_table(arrow.table(columns), buffer, compression="zstd", store_schema=False)
    io.atomic_write_bytes(path, buffer.getvalue())
