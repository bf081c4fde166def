"""Which documents are trained on: what a rule keeps of those scored, or as many at random."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_r1.artifacts.influence import InfluenceTable
from megatron_r1.artifacts.mixture import KeptDocuments
from megatron_r1.mixture.config import MixtureConfig
from megatron_r1.utils.errors import ArtifactError, ConfigError
from megatron_r1.utils.seeding import generator
from megatron_r1.utils.statistics import t_quantile


def upper_bounds(table: InfluenceTable, source: str, normalise: str, confidence: float) -> np.ndarray:
    """One-sided upper bound over the choice of probe windows of each document's joint benefit (its sum over tokens), [n].

    Student's t over the probe folds, which is what a bootstrap over them comes to for a mean. Infinite for documents not
    scored by fold: nothing is known against them. Raises ArtifactError for a table without folds.
    """
    along, folds = table.fold_benefits(source, normalise), table.record.folds  # type: ignore[arg-type]
    base = np.array([table.record.fold_weights[capability] for capability in table.record.capabilities])  # [C, F]
    by_fold = (folds * base * along).mean(axis=1)
    margin = t_quantile(confidence, folds - 1) * by_fold.std(axis=1, ddof=1) / np.sqrt(folds)
    return np.where(table.scores(source).by_fold, by_fold.mean(axis=1) + margin, np.inf)


def passes(config: MixtureConfig, table: InfluenceTable, source: str) -> np.ndarray:
    """Which scored documents the rule keeps, bool [n]."""
    if config.filter.rule == "confident":
        return upper_bounds(table, source, config.normalise, config.confidence) > 0
    return table.benefits(source, config.normalise).mean(axis=1) > 0


def keep(
    config: MixtureConfig, table: InfluenceTable, shards: Mapping[str, Any], seed: int
) -> tuple[dict[str, np.ndarray], KeptDocuments, dict[str, int]]:
    """Numbers of the documents trained on by source, their record, and the tokens the rule itself would leave.

    shards: source -> its training split. The third is what floors, caps and epochs are reckoned with; a control has at
    least as many tokens, so that its weights are the same as those of what it controls for.

    Raises ConfigError when documents were scored in part only, ArtifactError when the shards are others.
    """
    numbers, scored, passed, bound = {}, {}, {}, {}
    for source, shard in shards.items():
        index, there = _whole(table, source, shard), passes(config, table, source)
        lengths = np.asarray(shard.lengths)
        rest = np.setdiff1d(np.arange(len(shard)), index) if config.filter.unscored == "keep" else np.zeros(0, np.int64)
        chosen = index[there]
        bound[source] = int(lengths[chosen].sum() + lengths[rest].sum())
        if config.filter.control:
            order = generator(seed, "random control", source).permutation(np.sort(index))
            before = np.cumsum(lengths[order]) - lengths[order]
            wanted = int(lengths[index[there]].sum())
            chosen = order[before < wanted]
        numbers[source] = np.sort(np.concatenate([chosen, rest])).astype(np.int64)
        scored[source], passed[source] = len(index), int(there.sum())
    tokens = {name: int(np.asarray(shards[name].lengths)[found].sum()) for name, found in numbers.items()}
    record = KeptDocuments(
        rule=config.filter.rule,  # type: ignore[arg-type]
        control=config.filter.control,
        unscored=config.filter.unscored,
        scored=scored,
        passed=passed,
        documents={name: len(found) for name, found in numbers.items()},
        tokens=tokens,
        emptied=[name for name, count in bound.items() if count == 0],
    )
    return numbers, record, bound


def _whole(table: InfluenceTable, source: str, shard: Any) -> np.ndarray:
    """Numbers of the scored documents, [n], each scored from beginning to end."""
    scores = table.scores(source)
    if len(scores.index) and scores.index.max() >= len(shard):
        raise ArtifactError(
            expected=f"training documents of {source} up to number {int(scores.index.max())}, as were scored",
            found=f"{len(shard)} documents",
            fix="give the mixture the shards that its influence was measured on",
        )
    partly = int((np.asarray(shard.lengths)[scores.index] - 1 > scores.n_tokens).sum())
    if partly:
        raise ConfigError(
            expected=f"whole documents of {source} scored, to keep or drop them",
            found=f"{partly} of {len(scores.index)} scored by one window of theirs",
            fix="set influence's score_unit: document, or filter.rule: none",
        )
    return scores.index
