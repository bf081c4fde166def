"""From document scores to benefit per source, with intervals and how far to trust the ranking."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import Literal

import numpy as np

from megatron_r1.artifacts.influence import Cell, InfluenceRecord, InfluenceTable, Reliability, column
from megatron_r1.utils.seeding import generator
from megatron_r1.utils.statistics import interval, length_for, spearman, spearman_brown

SPLITS = 200
WANTED = 0.9
"""Reliability that the advice on sample sizes is given for."""
JOINT = "joint"


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


def summarise(table: InfluenceTable, replicates: int, seed: int, windows: int = 1) -> InfluenceRecord:
    """Fill in scales, the per-source summary, the joint influence (Eq. 5) and the reliabilities.

    windows: probe windows per capability.
    """
    table = with_scales(table)
    record = table.record
    sources: dict[str, dict[str, Cell]] = {}
    joint: dict[str, Cell] = {}
    for source in table.sources:
        benefits = table.benefits(source, record.normalise)  # [n, C]
        tokens = table.scores(source).n_tokens
        draws = table.resample(source, replicates, seed, record.normalise, record.confidence)  # [R, C]
        sources[source] = {
            capability: _cell(benefits[:, c], tokens, draws[:, c], record.confidence)
            for c, capability in enumerate(record.capabilities)
        }
        joint[source] = _cell(benefits.mean(axis=1), tokens, draws.mean(axis=1), record.confidence)
    found = reliabilities(table, seed, windows)
    halves = {r.capability: r.value for r in found if (r.of, r.over) == ("sources", "documents")}
    return record.model_copy(
        update={"sources": sources, "joint": joint, "reliability": halves, "reliabilities": found}
    )


def _cell(sums: np.ndarray, tokens: np.ndarray, draws: np.ndarray, confidence: float) -> Cell:
    return Cell(
        mean=float(sums.sum() / tokens.sum()),
        interval=interval(draws, confidence),
        documents=len(sums),
        tokens=int(tokens.sum()),
        ess=effective_documents(sums),
        positive=float((sums > 0).mean()),
    )


def reliabilities(table: InfluenceTable, seed: int, windows: int) -> list[Reliability]:
    """Reliability of the ranking of sources over documents and over the probe, and of documents over the probe.

    windows: probe windows per capability (the fewest). What is not measured (one fold, fewer than 3 sources) is not in
    the list, or has the value null.
    """
    documents = min(len(np.unique(table.scores(source).index)) for source in table.sources)
    found = _reliabilities(table, "sources", "documents", _document_halves(table, seed), 2.0, documents)
    folds = table.record.folds
    if folds < 2:
        return found
    by_source = np.stack([table.fold_rates(source, table.record.normalise) for source in table.sources])  # [S, C, F]
    rates = []
    for source in table.sources:
        scores = table.scores(source)
        there = scores.by_fold
        rates.append(table.fold_benefits(source, table.record.normalise)[there] / scores.n_tokens[there, None, None])
    for of, values in (("sources", by_source), ("documents", np.concatenate(rates))):
        halves = _fold_halves(table, values, seed)
        found += _reliabilities(table, of, "probe", halves, folds / (folds // 2), windows)
    return found


def _document_halves(table: InfluenceTable, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Benefit per token of every source, [sources, C + 1], by random halves of its documents."""
    benefits = {source: table.benefits(source, table.record.normalise) for source in table.sources}
    if min(map(len, benefits.values())) < 2:
        return
    for split in range(SPLITS):
        draw = generator(seed, "split half", split)
        halves: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        for source, sums in benefits.items():
            order = draw.permutation(len(sums))
            tokens = table.scores(source).n_tokens
            for half, chosen in zip(halves, (order[: len(order) // 2], order[len(order) // 2 :])):
                rate = sums[chosen].sum(axis=0) / tokens[chosen].sum()
                half.append(np.append(rate, rate.mean()))
        yield np.array(halves[0]), np.array(halves[1])


def _fold_halves(table: InfluenceTable, values: np.ndarray, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows [n, C + 1] by disjoint halves of the folds: every way to halve them, or SPLITS random ones.

    values: [n, C, F]. With an odd number of folds one is left out of each split.
    """
    weights = np.array([table.record.fold_weights[capability] for capability in table.record.capabilities])  # [C, F]
    folds = weights.shape[1]
    half = folds // 2
    if math.comb(folds, half) <= SPLITS:
        splits = [(a, [f for f in range(folds) if f not in a][:half]) for a in map(list, combinations(range(folds), half))]
    else:
        orders = [generator(seed, "probe halves", split).permutation(folds) for split in range(SPLITS)]
        splits = [(order[:half].tolist(), order[half : 2 * half].tolist()) for order in orders]
    for pair in splits:
        sides = []
        for chosen in pair:
            share = weights[:, chosen] / weights[:, chosen].sum(axis=1, keepdims=True)
            rate = np.einsum("ncf,cf->nc", values[..., chosen], share)
            sides.append(np.concatenate([rate, rate.mean(axis=1, keepdims=True)], axis=1))
        yield sides[0], sides[1]


def _reliabilities(
    table: InfluenceTable,
    of: Literal["sources", "documents"],
    over: Literal["documents", "probe"],
    halves: Iterable[tuple[np.ndarray, np.ndarray]],
    factor: float,
    have: int,
) -> list[Reliability]:
    """One record a capability and one for the joint benefit, from pairs of rankings by disjoint halves [n, C + 1]."""
    names = [*table.record.capabilities, JOINT]
    found: dict[str, list[float]] = {name: [] for name in names}
    for first, second in halves:
        for k, name in enumerate(names):
            value = spearman(first[:, k], second[:, k])
            if value is not None:
                found[name].append(value)
    records = []
    for name, values in found.items():
        r = float(np.mean(values)) if values else None
        times = length_for(r, WANTED)
        needed = None if times is None else max(math.ceil(times * have / factor), 1)
        value = spearman_brown(r, factor)
        records.append(
            Reliability(of=of, over=over, capability=name, halves=r, value=value, have=have, needed=needed)
        )
    return records


def advice(found: Reliability) -> str:
    """A reliability in words, with what a reliable ranking would need."""
    units = "probe windows per capability" if found.over == "probe" else "scored documents per source"
    if found.value is None:
        return f"the ranking of {found.of} ({found.capability}) has no measurable reliability over {units}"
    needs = (
        "no number of them is foretold to reach 0.9"
        if found.needed is None
        else "enough for 0.9"
        if found.needed <= found.have
        else f"0.9 would need about {found.needed}"
    )
    return f"reliability of the ranking of {found.of} ({found.capability}) over {found.have} {units}: {found.value:.2f}; {needs}"
