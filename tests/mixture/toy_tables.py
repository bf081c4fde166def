"""Influence tables in memory, from numbers drawn by a test: no files, so hundreds of them take seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_r1.artifacts.influence import Direction, DocumentScores, InfluenceRecord, InfluenceTable, ScoredCheckpoint

STEP = 10


def toy_table(
    rates: Mapping[str, np.ndarray], tokens: Mapping[str, np.ndarray] | int = 100, by_fold: int | None = None
) -> InfluenceTable:
    """A table of one checkpoint with scale 1 from benefits per token along each probe fold, source -> [n, C, F].

    The whole probe is the mean of its folds. by_fold: only the first documents of each source have fold columns.
    """
    first = next(iter(rates.values()))
    capabilities = [f"c{i}" for i in range(first.shape[1])]
    folds = first.shape[2]
    direction = Direction(
        probe_loss=1.0, gradient_norm=1.0, direction_norm=1.0, self_influence=1.0, step=1e-3, energy={}, rms=1.0
    )
    record = InfluenceRecord(
        capabilities=capabilities,
        checkpoints=[ScoredCheckpoint(step=STEP, tokens=STEP, alpha=1.0)],
        preconditioner="adam",
        eps=1e-8,
        fd_epsilon=3e-4,
        score_unit="document",
        tokens_per_document=100,
        folds=folds,
        probe_sha256="p" * 64,
        normalise="rms",
        confidence=0.95,
        interval_covers=["scored documents"] + (["probe folds"] if folds > 1 else []),
        directions={f"{capability}@{STEP}": direction for capability in capabilities},
        fold_weights={capability: [1.0 / folds] * folds for capability in capabilities},
        sources={source: {} for source in rates},
        joint={},
    )
    table = InfluenceTable(Path("memory"), record)
    for source, rate in rates.items():
        n = len(rate)
        counts = np.full(n, tokens) if isinstance(tokens, int) else np.asarray(tokens[source])
        scores = rate[:, :, None, :] * counts[:, None, None, None]
        split = scores.copy() if folds > 1 else None
        if split is not None and by_fold is not None:
            split[by_fold:] = np.nan
        table._cache[source] = DocumentScores(
            np.arange(n), [f"{source}-{i}" for i in range(n)], np.zeros(n, np.int64), counts, scores.mean(axis=-1), split
        )
    return table


def at_checkpoints(rates: Mapping[str, np.ndarray]) -> InfluenceTable:
    """A table of several checkpoints (steps 1, 2, ..., alpha as Eq. 5 has it) from benefits per token, source -> [n, C, T]; one fold."""
    first = next(iter(rates.values()))
    steps = np.arange(first.shape[2]) + 1
    whole = toy_table({source: rate[..., :1] for source, rate in rates.items()})
    direction = next(iter(whole.record.directions.values()))
    points = [ScoredCheckpoint(step=int(step), tokens=int(step), alpha=float(step / steps.sum())) for step in steps]
    directions = {f"{capability}@{step}": direction for capability in whole.record.capabilities for step in steps}
    table = InfluenceTable(Path("memory"), whole.record.model_copy(update={"checkpoints": points, "directions": directions}))
    for source, rate in rates.items():
        table.keep(source, replace(whole.scores(source), raw=rate * 100))
    return table


def crossed(
    rng: np.random.Generator,
    means: Mapping[str, float],
    documents: int,
    folds: int,
    document_sd: float,
    probe_sd: float,
    pair_sd: float,
    capabilities: int = 1,
) -> dict[str, np.ndarray]:
    """Benefits per token of a crossed design, source -> [n, C, F]: mean + document + probe fold + pair of both.

    document_sd: of a document's own benefit; probe_sd: of a fold's effect on a source (what choosing other probe windows
    changes); pair_sd: of the rest.
    """
    found = {}
    for source, mean in means.items():
        own = rng.normal(0, document_sd, (documents, capabilities, 1))
        probe = rng.normal(0, probe_sd, (1, capabilities, folds))
        found[source] = mean + own + probe + rng.normal(0, pair_sd, (documents, capabilities, folds))
    return found
