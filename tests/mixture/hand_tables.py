"""Influence artifacts with numbers chosen by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet

from megatron_r1.artifacts.base import Artifact, open_workspace
from megatron_r1.artifacts.influence import Direction, InfluenceRecord, ScoredCheckpoint, column
from megatron_r1.utils.io import atomic_write_json

Table = Mapping[str, tuple[list[int], Mapping[str, list[float]]]]
"""source -> (predicted tokens of each document, column name -> raw score of each document)."""


def build_influence(
    folder: Path,
    table: Table,
    capabilities: list[str],
    steps: list[int],
    scales: Mapping[str, float] | None = None,
    name: str = "influence",
) -> Artifact:
    """An influence artifact whose RMS and self scales are given by column name (1 by default)."""
    work = open_workspace(
        folder,
        name,
        "influence",
        {"table": {s: [t, {k: list(map(repr, v)) for k, v in c.items()}] for s, (t, c) in table.items()}},
    )
    (work.path / "scores").mkdir(exist_ok=True)
    for source, (tokens, columns) in table.items():
        n = len(tokens)
        content = {
            "index": list(range(n)),
            "id": [f"{source}-{i}" for i in range(n)],
            "start": [0] * n,
            "n_tokens": tokens,
            **columns,
        }
        parquet.write_table(arrow.table(content), work.path / "scores" / f"{source}.parquet")
    names = [column(capability, step) for capability in capabilities for step in steps]
    directions = {
        key: Direction(
            probe_loss=3.0,
            gradient_norm=1.0,
            direction_norm=1.0,
            step=1e-3,
            energy={"ffn": 1.0},
            self_influence=2 * (scales or {}).get(key, 1.0),
            rms=(scales or {}).get(key, 1.0),
        )
        for key in names
    }
    record = InfluenceRecord(
        capabilities=capabilities,
        checkpoints=[ScoredCheckpoint(step=step, tokens=step, alpha=step / sum(steps)) for step in steps],
        preconditioner="adam",
        eps=1e-8,
        fd_epsilon=3e-4,
        score_unit="window",
        tokens_per_document=256,
        folds=1,
        probe_sha256="p" * 64,
        normalise="rms",
        confidence=0.95,
        interval_covers=["scored documents"],
        directions=directions,
        sources={source: {} for source in table},
        joint={},
    )
    atomic_write_json(work.path / "influence.json", record.plain())
    return work.complete({})


def one_column(rates: Mapping[str, np.ndarray], tokens: int = 100) -> Table:
    """A table of one capability and checkpoint from each document's benefit per token."""
    return {source: ([tokens] * len(rate), {"code@10": (rate * tokens).tolist()}) for source, rate in rates.items()}
