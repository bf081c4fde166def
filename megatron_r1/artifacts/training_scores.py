"""Scores of documents made while training, a part of the train artifact, read and written without torch.

    scores/layout.json       ScoresLayout below: what the columns are
    scores/probes.jsonl      one record per probe gradient: step, and for each capability its loss, norms and error of the low rank
    scores/rank-00000.bin    rows of `row_type`, one after the other, written by model copy (data rank) 0; and so on
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from megatron_r1.config.base import Frozen
from megatron_r1.utils import io
from megatron_r1.utils.errors import ArtifactError

SCORES_FOLDER, LAYOUT_FILE, PROBES_FILE = "scores", "layout.json", "probes.jsonl"
_AT_ONCE = 1 << 20


class ScoresLayout(Frozen):
    """Content of scores/layout.json."""

    capabilities: list[str] = Field(description="columns of `scores`, in order")
    sources: list[str] = Field(description="what the numbers in `source` stand for")
    documents: dict[str, int] = Field(description="capability -> probe windows its gradient is the mean of")
    rank: int | None = Field(description="rank the probe gradients were cut down to; null: whole")
    preconditioner: str = Field(description="adam or none")
    every: int = Field(description="steps between probe gradients")


class SourceScore(Frozen):
    """Documents of one source along one capability."""

    mean: float = Field(description="summed score divided by predicted tokens; positive: training on the source lowers the probe loss")
    error: float = Field(description="standard error of the mean over documents (ratio estimate; drift over training counts as spread)")
    documents: int = Field(description="documents, or pieces of them in different rows, with a score that is a number")
    tokens: int = Field(description="their predicted tokens")


class TrainingScores(Frozen):
    """What training found out about its documents while it went on."""

    layout: ScoresLayout = Field(description="settings and columns")
    sources: dict[str, dict[str, SourceScore]] = Field(description="source -> capability -> mean score per token over the whole phase")
    rows: int = Field(description="scored documents or pieces")
    not_numbers: int = Field(description="of these, with a score that is not a number (left out of the means)")
    probes: int = Field(description="probe gradients taken")
    error: dict[str, float] = Field(description="capability -> largest |D - L R^T| / |D| over the phase: the low rank's part of the direction that is missing")


def row_type(capabilities: int) -> np.dtype:
    """One row: sample (number in the data order), step trained on it, step its probe gradient was taken after, source, place of
    the document in its sequence, predicted tokens, and a score per capability."""
    names = ("step", "probe_step", "source", "place", "tokens")
    return np.dtype([("sample", "<i8"), *((name, "<i4") for name in names), ("scores", "<f4", (capabilities,))])


def part_file(root: Path, data_rank: int) -> Path:
    """`scores/rank-00000.bin` under an artifact or workspace."""
    return root / SCORES_FOLDER / f"rank-{data_rank:05d}.bin"


def parts(root: Path) -> list[Path]:
    """The files of all model copies."""
    return sorted((root / SCORES_FOLDER).glob("rank-*.bin"))


def append(path: Path, rows: np.ndarray) -> None:
    """Add rows (not flushed to the disk: `sync` before what must not be ahead of them)."""
    with io.disk_errors(path), open(path, "ab") as stream:
        stream.write(rows.tobytes())


def sync(path: Path) -> None:
    """Flush to the disk, if there is anything."""
    if path.exists():
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())


def open_part(path: Path, kind: np.dtype) -> np.ndarray:
    """The whole rows of a file, not read before they are looked at."""
    count = path.stat().st_size // kind.itemsize if path.exists() else 0
    return np.memmap(path, kind, "r", shape=(count,)) if count else np.empty(0, kind)


def truncate(path: Path, kind: np.dtype, last_step: int) -> None:
    """Drop the rows of steps above `last_step`, and a torn one."""
    rows = open_part(path, kind)
    kept = int(np.searchsorted(rows["step"], last_step, side="right"))
    del rows
    os.truncate(path, kept * kind.itemsize)


class ScoresReader:
    """The scores of a train artifact (or workspace). Attributes: layout, kind (dtype of a row), folder."""

    def __init__(self, root: Path) -> None:
        """Raises ArtifactError when there are none."""
        self.root, self.folder = root, root / SCORES_FOLDER
        if not (self.folder / LAYOUT_FILE).is_file():
            raise ArtifactError(
                expected=f"scores made while training in {root.name}", found="none", fix="set `scores` in the train step, or read the scores of an influence step",
            )
        self.layout = ScoresLayout.model_validate(io.read_json(self.folder / LAYOUT_FILE))
        self.kind = row_type(len(self.layout.capabilities))

    def __iter__(self) -> Iterator[np.ndarray]:
        """Rows, some at a time, copy after copy, each in the order of the steps."""
        for path in parts(self.root):
            rows = open_part(path, self.kind)
            for first in range(0, len(rows), _AT_ONCE):
                yield np.array(rows[first : first + _AT_ONCE])

    def rows(self) -> np.ndarray:
        """All rows in the order of samples and places."""
        found = np.concatenate([np.empty(0, self.kind), *self])
        return found[np.lexsort((found["place"], found["sample"]))]

    def probes(self) -> list[dict[str, Any]]:
        """Records of probes.jsonl."""
        return io.read_jsonl(self.folder / PROBES_FILE)

    def summary(self) -> TrainingScores:
        """Means over the whole phase, in one pass over the rows."""
        sources, capabilities = self.layout.sources, self.layout.capabilities
        sums = Sums(len(sources), len(capabilities))
        for rows in self:
            sums.add(rows)
        errors: dict[str, float] = {}
        for record in (probes := self.probes()):
            for name, found in record["capabilities"].items():
                errors[name] = max(errors.get(name, 0.0), found["error"])
        return TrainingScores(
            layout=self.layout, rows=sums.rows, not_numbers=sums.not_numbers, probes=len(probes), error=errors,
            sources={name: dict(zip(capabilities, found)) for name, found in zip(sources, sums.means()) if found},
        )


class Sums:
    """What means per token and their errors are made of: for source g the sums over documents i of n_i, s_i, s_i^2, s_i n_i, n_i^2."""

    def __init__(self, sources: int, capabilities: int) -> None:
        self.rows, self.not_numbers = 0, 0
        self.count, self.tokens, self.tokens2 = (np.zeros(sources) for _ in range(3))
        self.s, self.s2, self.sn = (np.zeros((sources, capabilities)) for _ in range(3))

    def add(self, rows: np.ndarray) -> None:
        """Add rows of `row_type`."""
        good = rows[np.isfinite(rows["scores"]).all(axis=1)]
        self.rows, self.not_numbers = self.rows + len(rows), self.not_numbers + len(rows) - len(good)
        n, s, g = good["tokens"].astype(np.float64), good["scores"].astype(np.float64), good["source"]
        for total, value in ((self.count, np.ones_like(n)), (self.tokens, n), (self.tokens2, n * n)):
            np.add.at(total, g, value)
        for total, value in ((self.s, s), (self.s2, s * s), (self.sn, s * n[:, None])):
            np.add.at(total, g, value)

    def means(self) -> Sequence[list[SourceScore]]:
        """For every source one mean per capability, or nothing when it has no document."""
        found: list[list[SourceScore]] = []
        for g, (count, n) in enumerate(zip(self.count, self.tokens)):
            if not n:
                found.append([])
                continue
            rho = self.s[g] / n
            # Sum of squared residuals s_i - rho n_i; one document alone says nothing about its error.
            spread = np.maximum(self.s2[g] - 2 * rho * self.sn[g] + rho**2 * self.tokens2[g], 0) * count / max(count - 1, 1)
            found.append([SourceScore(mean=float(r), error=float(e), documents=int(count), tokens=int(n)) for r, e in zip(rho, np.sqrt(spread) / n)])
        return found
