"""Several influence artifacts of the same documents as one table: one for each capability, of its own model.

MobileLLM-R1 scores capability c at the checkpoints of a model specialised on c (arXiv 2509.24945 v1, Eq. 3 to 5): an influence step
for every such model, restricted to its capability, and this to put them together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_r1.artifacts.base import Artifact
from megatron_r1.artifacts.influence import Direction, DocumentScores, InfluenceRecord, InfluenceTable, column
from megatron_r1.utils.errors import ArtifactError

ALIKE = ("preconditioner", "parameters", "score_unit", "tokens_per_document", "folds", "fold_documents", "probe_sha256", "confidence")
"""Settings that have to be the same; the others belong to the single tables."""


def open_influence(found: Artifact | Sequence[Artifact]) -> tuple[InfluenceTable, str]:
    """(the table of one artifact or of several together, a fingerprint of what was read).

    Raises ArtifactError as `InfluenceTable.open` and `join`.
    """
    if isinstance(found, Artifact):
        return InfluenceTable.open(found), found.fingerprint
    if len(found) == 1:
        return open_influence(found[0])
    fingerprint = hashlib.sha256("".join(artifact.fingerprint for artifact in found).encode()).hexdigest()
    return join([InfluenceTable.open(artifact) for artifact in found]), fingerprint


def join(tables: Sequence[InfluenceTable]) -> InfluenceTable:
    """One table with the capabilities of all, each with the checkpoints (and alphas, Eq. 5) of its own.

    The joined table has the checkpoints of all tables behind one another. A capability scores 0 at those that are not its own, so
    sums over checkpoints are those of its own, whatever the scale. Raises ArtifactError unless the tables score the same
    documents along different capabilities of one probe, with the same settings.
    """
    first = tables[0].record
    capabilities = [name for table in tables for name in table.record.capabilities]
    if len(set(capabilities)) < len(capabilities):
        raise ArtifactError(
            expected="influence tables of different capabilities",
            found=f"{', '.join(sorted({name for name in capabilities if capabilities.count(name) > 1}))} in several",
            fix="give every influence step `capabilities` of its own",
        )
    for table in tables[1:]:
        for name in ALIKE:
            if getattr(table.record, name) != getattr(first, name):
                raise _unlike(name, getattr(first, name), getattr(table.record, name))
        if table.sources != tables[0].sources:
            raise _unlike("sources", tables[0].sources, table.sources)
    checkpoints = [point for table in tables for point in table.record.checkpoints]
    directions: dict[str, Direction] = {}
    for table in tables:
        for name in table.record.capabilities:
            own = {column(name, point.step) for point in table.record.checkpoints}
            idle = table.record.directions[next(iter(own))].model_copy(update={"rms": 1.0, "self_influence": 1.0})
            directions |= {column(name, point.step): idle for point in checkpoints}
            directions |= {key: table.record.directions[key] for key in own}
    updates: dict[str, Any] = {
        "capabilities": capabilities,
        "checkpoints": checkpoints,
        "directions": directions,
        "fold_weights": {name: weights for table in tables for name, weights in table.record.fold_weights.items()},
        "sources": {source: {name: cell for table in tables for name, cell in table.record.sources[source].items()} for source in first.sources},
        "interval_covers": [what for what in first.interval_covers if all(what in table.record.interval_covers for table in tables)],
        "joint": {},
        "reliability": {},
        "reliabilities": [],
        "validity": None,
        "notes": list(dict.fromkeys(note for table in tables for note in table.record.notes)),
    }
    joined = InfluenceTable(tables[0].path, InfluenceRecord.model_validate(first.model_copy(update=updates).model_dump()))
    joined.scored = _diagonal([np.ones((1, len(table.record.capabilities), len(table.record.checkpoints)), bool) for table in tables])[0]
    for source in first.sources:
        joined.keep(source, _together(source, [table.scores(source) for table in tables]))
    return joined


def _together(source: str, parts: Sequence[DocumentScores]) -> DocumentScores:
    """Scores of one source, [n, C, T (, F)]: blocks of the tables along the diagonal of C x T."""
    first = parts[0]
    for part in parts[1:]:
        if not (np.array_equal(part.index, first.index) and np.array_equal(part.start, first.start) and np.array_equal(part.n_tokens, first.n_tokens)):
            raise _unlike(f"documents of {source}", f"{len(first.index)}, from {first.ids[:2]}", f"{len(part.index)}, from {part.ids[:2]}")

    folds = [part.folds for part in parts if part.folds is not None]
    return DocumentScores(
        first.index, first.ids, first.start, first.n_tokens, _diagonal([part.raw for part in parts]), _diagonal(folds) if folds else None
    )


def _diagonal(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """[n, C_k, T_k (, F)] as blocks along the diagonal of [n, sum C, sum T (, F)], zeros elsewhere."""
    n, rest = arrays[0].shape[0], arrays[0].shape[3:]
    whole = np.zeros((n, sum(a.shape[1] for a in arrays), sum(a.shape[2] for a in arrays), *rest), arrays[0].dtype)
    c = t = 0
    for array in arrays:
        whole[:, c : c + array.shape[1], t : t + array.shape[2]] = array
        c, t = c + array.shape[1], t + array.shape[2]
    return whole


def _unlike(what: str, one: Any, other: Any) -> ArtifactError:
    return ArtifactError(
        expected=f"influence tables with the same {what}",
        found=f"{one} and {other}",
        fix="give the influence steps the same settings, seed, shards and probe; only checkpoint and capabilities may differ",
    )
