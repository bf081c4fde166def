"""Scores on disk: whole partitions while the stage works, one table per source when it is done.

A partition is written under a temporary name and renamed, so after a kill it is whole or absent; a partition that is
there is never computed again. The final tables are a pure function of the partitions, hence equal bytes after any
interruption.
"""

from __future__ import annotations

import io as memory
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet

from megatron_r1.artifacts.influence import column
from megatron_r1.influence.select import Chosen
from megatron_r1.utils import io


class ScoreStore:
    """Partitions under one folder. Legend: n documents of a partition, K = scores kept per document."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, step: int, source: str, part: int) -> Path:
        return self.folder / str(step) / f"{source}.{part:05d}.npy"

    def load(self, step: int, source: str, part: int, shape: tuple[int, int]) -> np.ndarray | None:
        """A finished partition, float64 [n, K], or None.

        One of another shape (never written by this release) counts as absent.
        """
        path = self._path(step, source, part)
        if not path.exists():
            return None
        try:
            scores = np.load(path, allow_pickle=False)
        except (ValueError, EOFError, OSError):
            return None
        return scores if scores.shape == shape and scores.dtype == np.float64 else None

    def save(self, step: int, source: str, part: int, scores: np.ndarray) -> None:
        """Write a partition, float64 [n, K], whole or not at all."""
        buffer = memory.BytesIO()
        np.save(buffer, np.ascontiguousarray(scores, np.float64), allow_pickle=False)
        io.atomic_write_bytes(self._path(step, source, part), buffer.getvalue())


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
