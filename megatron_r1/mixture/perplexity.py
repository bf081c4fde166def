"""Shares by perplexity: of all training tokens, ordered by the mean loss of their document, a band is kept.

Marion et al. (arXiv 2309.04564, section 3.1) keep the half of the data around the median; Ankner et al. (arXiv 2405.20541,
section 2) compare low, middle and high, and show how pruning moves the shares of domains (section 4.2). Both prune documents;
here the band sets the shares of the sources, so that it can be compared with other mixtures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from megatron_r1.mixture.config import PerplexityConfig
from megatron_r1.utils.seeding import generator


@dataclass(frozen=True)
class Sample:
    """Documents read of one source: they stand for all of its tokens in proportion to their length."""

    loss: np.ndarray  # [n], mean nats per token over what was read
    lengths: np.ndarray  # [n], tokens of the whole documents
    read: np.ndarray  # [n], tokens whose loss was taken


def band_edges(config: PerplexityConfig) -> tuple[float, float]:
    """Where the kept tokens begin and end, as parts of all tokens in order of rising loss."""
    start = {"low": 0.0, "middle": (1 - config.keep) / 2, "high": 1 - config.keep}[config.band]
    return start, start + config.keep


def kept_tokens(config: PerplexityConfig, tokens: Mapping[str, float], samples: Mapping[str, Sample]) -> tuple[dict[str, float], tuple[float, float]]:
    """Source -> part of *all* tokens that it has inside the band (they sum to `keep`), and the losses at the band's edges.

    `tokens`: training tokens of each source. Documents that an edge cuts through count in part, so the result does not jump.
    """
    loss = np.concatenate([samples[name].loss for name in tokens])
    source = np.concatenate([np.full(len(samples[name].loss), i) for i, name in enumerate(tokens)])
    mass = np.concatenate([count * samples[name].lengths / samples[name].lengths.sum() for name, count in tokens.items()])
    order = np.argsort(loss, kind="stable")
    upper = np.cumsum(mass[order]) / mass.sum()
    lower = np.concatenate([[0.0], upper[:-1]])
    start, end = band_edges(config)
    inside = np.clip(np.minimum(upper, end) - np.maximum(lower, start), 0.0, None)
    kept = np.bincount(source[order], weights=inside, minlength=len(tokens))
    there = loss[order][inside > 0]
    return dict(zip(tokens, kept.tolist())), (float(there[0]), float(there[-1]))


def resampled(config: PerplexityConfig, tokens: Mapping[str, float], samples: Mapping[str, Sample], replicates: int, seed: int) -> np.ndarray:
    """Bootstrap of the shares over the documents of each source, [replicates, k]."""
    rngs = {name: generator(seed, "perplexity bootstrap", name) for name in tokens}
    found = []
    for _ in range(replicates):
        drawn = {}
        for name, sample in samples.items():
            index = rngs[name].integers(0, len(sample.loss), len(sample.loss))
            drawn[name] = Sample(sample.loss[index], sample.lengths[index], sample.read[index])
        found.append(list(kept_tokens(config, tokens, drawn)[0].values()))
    return np.array(found) / config.keep
