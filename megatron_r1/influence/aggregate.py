"""From document scores to benefit per source, with intervals and how far to trust the ranking."""

from __future__ import annotations

import numpy as np

from megatron_r1.artifacts.influence import Cell, InfluenceRecord, InfluenceTable, column
from megatron_r1.utils.seeding import generator

SPLITS = 200


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, ties get their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - counts + ends - 1) / 2.0)[inverse]


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Rank correlation; None when it is undefined (fewer than 3 values, or all equal on one side)."""
    if len(a) < 3:
        return None
    ra, rb = ranks(np.asarray(a)), ranks(np.asarray(b))
    ra, rb = ra - ra.mean(), rb - rb.mean()
    scale = float(np.sqrt((ra**2).sum() * (rb**2).sum()))
    return float((ra * rb).sum()) / scale if scale > 0 else None


def effective_documents(scores: np.ndarray) -> float:
    """(sum |s|)^2 / sum s^2: n when all documents carry the score equally, 1 when one does; 0 for no score at all."""
    squares = float((scores**2).sum())
    return float(np.abs(scores).sum()) ** 2 / squares if squares > 0 else 0.0


def root_mean_squares(table: InfluenceTable) -> np.ndarray:
    """RMS over all documents of all sources of the score per token, [C, T]."""
    rates = np.concatenate(
        [table.scores(source).raw / table.scores(source).n_tokens[:, None, None] for source in table.sources]
    )
    return np.sqrt((rates**2).mean(axis=0))


def with_scales(table: InfluenceTable) -> InfluenceTable:
    """The table with the RMS scale of each direction filled in."""
    record, rms = table.record, root_mean_squares(table)
    directions = dict(record.directions)
    for c, capability in enumerate(record.capabilities):
        for t, point in enumerate(record.checkpoints):
            name = column(capability, point.step)
            directions[name] = directions[name].model_copy(update={"rms": float(rms[c, t])})
    return table.with_record(record.model_copy(update={"directions": directions}))


def summarise(table: InfluenceTable, replicates: int, seed: int) -> InfluenceRecord:
    """Fill in scales, the per-source summary, the joint influence (Eq. 5) and the reliability."""
    table = with_scales(table)
    record = table.record
    sources: dict[str, dict[str, Cell]] = {}
    joint: dict[str, Cell] = {}
    for source in table.sources:
        benefits = table.benefits(source, record.normalise)  # [n, C]
        tokens = table.scores(source).n_tokens
        draws = table.resample(source, replicates, seed, record.normalise)  # [R, C]
        sources[source] = {
            capability: _cell(benefits[:, c], tokens, draws[:, c], record.confidence)
            for c, capability in enumerate(record.capabilities)
        }
        joint[source] = _cell(benefits.mean(axis=1), tokens, draws.mean(axis=1), record.confidence)
    return record.model_copy(update={"sources": sources, "joint": joint, "reliability": reliability(table, seed)})


def interval(draws: np.ndarray, confidence: float) -> tuple[float, float]:
    """Percentile interval of bootstrap draws."""
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _cell(sums: np.ndarray, tokens: np.ndarray, draws: np.ndarray, confidence: float) -> Cell:
    return Cell(
        mean=float(sums.sum() / tokens.sum()),
        interval=interval(draws, confidence),
        documents=len(sums),
        tokens=int(tokens.sum()),
        ess=effective_documents(sums),
        positive=float((sums > 0).mean()),
    )


def reliability(table: InfluenceTable, seed: int) -> dict[str, float | None]:
    """Split-half reliability of the ranking of sources: would other documents of the same sources rank them alike?

    Mean Spearman correlation r over random halves of every source's documents, stepped up to the full number of
    documents (Spearman-Brown: 2r / (1 + r)). None with fewer than 3 sources or a source of one document.
    """
    record = table.record
    names = [*record.capabilities, "joint"]
    benefits = {source: table.benefits(source, record.normalise) for source in table.sources}
    if len(benefits) < 3 or min(map(len, benefits.values())) < 2:
        return dict.fromkeys(names)
    found: dict[str, list[float]] = {name: [] for name in names}
    for split in range(SPLITS):
        draw = generator(seed, "split half", split)
        halves: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        for source, sums in benefits.items():
            order = draw.permutation(len(sums))
            tokens = table.scores(source).n_tokens
            for half, chosen in zip(halves, (order[: len(order) // 2], order[len(order) // 2 :])):
                rate = sums[chosen].sum(axis=0) / tokens[chosen].sum()
                half.append(np.append(rate, rate.mean()))
        first, second = np.array(halves[0]), np.array(halves[1])  # [sources, C + 1]
        for k, name in enumerate(names):
            value = spearman(first[:, k], second[:, k])
            if value is not None:
                found[name].append(value)
    means = {name: float(np.mean(values)) if values else None for name, values in found.items()}
    return {name: None if r is None or r <= -1 else 2 * r / (1 + r) for name, r in means.items()}
