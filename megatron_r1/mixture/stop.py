"""Is another round worth it? The paper's rule and a statistical one, from the same scores; nothing acts on them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from megatron_r1.artifacts.influence import InfluenceTable, Spread
from megatron_r1.artifacts.mixture import Decision, Mixture, PaperStop, StatisticalStop
from megatron_r1.mixture.config import MixtureConfig
from megatron_r1.utils.statistics import holm, t_cdf, t_quantile


def paper_stop(config: MixtureConfig, table: InfluenceTable, names: list[str], previous: Mixture | None) -> PaperStop:
    """Share of documents that help, and how large scores are compared with the previous round."""
    positive, sizes = [], []
    for name in names:
        positive.append(table.benefits(name, config.normalise).mean(axis=1) > 0)
        sizes.append(np.abs(table.benefits(name, "none").mean(axis=1)) / table.scores(name).n_tokens)
    share, median = float(np.concatenate(positive).mean()), float(np.median(np.concatenate(sizes)))
    before = previous.decision.paper.median if previous is not None and previous.decision is not None else None
    collapsed = before is not None and median < config.stop.collapse * before
    return PaperStop(
        positive=share,
        positive_below=config.stop.positive,
        median=median,
        previous_median=before,
        collapse_below=config.stop.collapse,
        stop=share < config.stop.positive or collapsed,
    )


def p_value(spread: Spread) -> float:
    """One-sided t test of mean benefit <= 0. 1 where the spread is not known, or zero without a benefit."""
    if not math.isfinite(spread.variance):
        return 1.0
    if spread.variance == 0:
        return 0.0 if spread.mean > 0 else 1.0
    return 1.0 - t_cdf(spread.mean / math.sqrt(spread.variance), spread.freedom)


def lower_bounds(spreads: Mapping[str, Spread], alpha: float) -> dict[str, float]:
    """Lower bound of each mean at the level alpha / (k - rank) of Holm's procedure; sources of unknown spread left out."""
    order = sorted(spreads, key=lambda name: (p_value(spreads[name]), name))
    found = {}
    for rank, name in enumerate(order):
        spread = spreads[name]
        if math.isfinite(spread.variance):
            t = t_quantile(1 - alpha / (len(order) - rank), spread.freedom)
            found[name] = spread.mean - t * math.sqrt(spread.variance)
    return {name: found[name] for name in spreads if name in found}


def statistical_stop(
    config: MixtureConfig, table: InfluenceTable, weights: Mapping[str, float], reference: Mapping[str, float], known: bool
) -> StatisticalStop:
    """Is any source shown to help, and what would these weights gain over the reference?

    reference: shares of the same sources; known: whether they are a previous mixture's, else natural.
    """
    spreads = {name: table.spread(name, config.normalise) for name in weights}
    alpha = 1 - config.confidence
    adjusted = holm({name: p_value(spread) for name, spread in spreads.items()})
    helping = [name for name, p in adjusted.items() if p < alpha]
    rate = math.fsum((weights[name] - reference.get(name, 0.0)) * table.spread(name, "none").mean for name in weights)
    gain = None if config.stop.path is None else rate * config.stop.path
    small = None if gain is None else gain < config.stop.tolerance
    return StatisticalStop(
        p_values=adjusted,
        lower=lower_bounds(spreads, alpha),
        helping=helping,
        reference="previous" if known else "natural",
        gain_rate=rate,
        path=config.stop.path,
        gain=gain,
        tolerance=config.stop.tolerance,
        stop=False if helping else small,
    )


def decide(
    config: MixtureConfig,
    table: InfluenceTable,
    weights: Mapping[str, float],
    shares: Mapping[str, float],
    previous: Mixture | None,
) -> Decision:
    """Both rules for a mixture with these weights. shares: the natural ones."""
    paper = paper_stop(config, table, list(weights), previous)
    there = {} if previous is None else {name: previous.weights.get(name, 0.0) for name in weights}
    total = math.fsum(there.values())
    reference = {name: weight / total for name, weight in there.items()} if total > 0 else dict(shares)
    statistical = statistical_stop(config, table, weights, reference, total > 0)
    return Decision(paper=paper, statistical=statistical, follows=follows(paper.stop, statistical))


def follows(paper: bool, statistical: StatisticalStop) -> str:
    """What would follow from both rules, in a sentence."""
    said = f"the paper's rule says {'stop' if paper else 'go on'}; "
    if statistical.helping:
        names = ", ".join(statistical.helping)
        return said + f"the statistical rule says go on: {names} {'is' if len(statistical.helping) == 1 else 'are'} shown to help"
    if statistical.stop is None:
        return said + "no source is shown to help, and without stop.path the statistical rule does not know the gain of re-weighting"
    gain = f"re-weighting is foretold to gain {statistical.gain:.2g} nats (tolerance {statistical.tolerance:g})"
    if statistical.stop:
        return said + f"the statistical rule says stop: no source is shown to help and {gain}, so the mixture before would serve"
    return said + f"the statistical rule says go on: no source is shown to help, but {gain}"
