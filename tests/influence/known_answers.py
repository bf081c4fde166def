"""Worlds whose right answer is known, for the acceptance measurements (benchmarks/acceptance.py) and their short forms as tests.

Languages are Markov chains over 64 tokens each; `target` is the one the probe is drawn from.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import small_world
from tiny_shards import Documents, Sampler, build_shards, documents, markov

from megatron_r1.artifacts.base import Artifact, open_workspace
from megatron_r1.artifacts.mixture import Mixture, load_mixture
from megatron_r1.influence.run import run as run_influence
from megatron_r1.mixture.config import MixtureConfig
from megatron_r1.mixture.run import run as run_mixture
from megatron_r1.utils.statistics import ranks

World = dict[str, Artifact]
BLENDS = {"useful_much": 0.5, "useful_some": 0.3, "useful_little": 0.15}
"""Useful sources: share of their documents that are in the probe's language."""
ORDER = ("twin", *BLENDS, "noise")
"""From what helps most to what helps least."""
CORRUPT = 0.2
WINDOWS = 128
"""Probe windows: with 32 what is left of the probe's gradient late in training is mostly the word frequencies of just those windows."""


def language(number: int, seed: int) -> Sampler:
    """A noisy Markov chain over its own 64 tokens (`number`), another one for every seed."""
    return markov(1000 * seed + number, width=4, vocab=64, first=64 * number, noise=0.4)


def shuffled(found: Documents, draw: np.random.Generator) -> list[np.ndarray]:
    """Every document's own tokens in random order."""
    return [draw.permutation(document) for document in found]


def blend(target: Sampler, other: Sampler, share: float, seed: int, count: int) -> list[np.ndarray]:
    """Documents of which about `share` are in the target's language, in random order."""
    draw = np.random.default_rng(seed)
    mine, others = documents(target, seed + 1, count), documents(other, seed + 2, count)
    return [a if draw.random() < share else b for a, b in zip(mine, others, strict=True)]


def mixed_sources(seed: int, count: int) -> dict[str, list[np.ndarray]]:
    """Source -> training documents. twin: the probe's language; useful: a part of the documents in it; noise: tokens without any order."""
    target, base = language(1, seed), 100_000 * (seed + 1)
    found = {"twin": documents(target, base, count)}
    found |= {name: blend(target, language(2 + k, seed), share, base + 10 * (k + 1), count) for k, (name, share) in enumerate(BLENDS.items())}
    draw = np.random.default_rng(base + 90)
    found["noise"] = [draw.integers(64, 64 * 5, len(document)) for document in documents(target, base + 91, count)]
    return found


def world(folder: Path, sources: Mapping[str, Documents], probe: Documents, steps: int, seed: int = 0, test: Documents = ()) -> World:
    """Shards with these training documents, a probe from `probe` (capability `target`), a nano model trained on the sources
    with checkpoints after each third of the steps."""
    shards = build_shards(folder, {**{name: {"train": found} for name, found in sources.items()}, "target": {"probe": probe, "test": test}})
    checkpoint = small_world.small_checkpoint(folder, shards, steps, tuple(steps * k // 3 for k in (1, 2, 3)), sources=tuple(sources), seed=seed)
    return {"shards": shards, "probe": small_world.small_probe(folder, shards, ("target",), WINDOWS), "checkpoint": checkpoint}


def mixed_world(folder: Path, seed: int, steps: int = 300, count: int = 650) -> tuple[World, np.ndarray]:
    """The sources of `mixed_sources` and one in the probe's language, `inside`, CORRUPT of whose documents have their tokens shuffled; the
    model was trained on all alike, on hardly any document twice (a model that has overfitted gains from noise: it flattens). With it which documents of `inside` are corrupt, bool [count]."""
    draw = np.random.default_rng(500 + seed)
    clean = documents(language(1, seed), 300_000 + seed, count)
    corrupt = draw.permutation(count) < CORRUPT * count
    inside = [b if bad else a for a, b, bad in zip(clean, shuffled(clean, draw), corrupt, strict=True)]
    held_out = documents(language(1, seed), 77_000 + seed, 300)
    return world(folder, {**mixed_sources(seed, count), "inside": inside}, held_out[:180], steps, seed=seed, test=held_out[180:]), corrupt


def measure(folder: Path, found: World, name: str = "influence", **changes: object) -> Artifact:
    """The influence stage on a world, without what no acceptance looks at."""
    quick = {"checkpoints": 1, "fd_check_documents": 0, "share_documents": 0, "validity": {"batches": 0}}
    config = small_world.influence_config(**{**quick, "sources": pool(found), **changes})
    made = run_influence(config, found, open_workspace(folder, name, "influence", config, found))
    assert made is not None
    return made


def mix(folder: Path, found: World, influence: Artifact, name: str = "mix", **changes: object) -> tuple[Artifact, Mixture]:
    """The mixture stage on the measured sources: Eq. 6 unless told otherwise."""
    plain = {"method": "influence", "inputs": {"shards": "corpus", "influence": "influence"}, "sources": pool(found), "seed": 1}
    config = MixtureConfig.model_validate({**plain, **changes})
    inputs = {"shards": found["shards"], "influence": influence}
    made = run_mixture(config, inputs, open_workspace(folder, name, "mixture", config, inputs))
    assert made is not None
    return made, load_mixture(made)


def pool(found: World) -> list[str]:
    """Sources with training documents."""
    return [name for name, record in found["shards"].json("sources.json")["sources"].items() if record["splits"].get("train")]


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Chance that a value of the first kind is above one of the second (Mann-Whitney)."""
    placed = ranks(np.concatenate([positive, negative]))[: len(positive)]
    n = len(positive)
    return float((placed.sum() - n * (n - 1) / 2) / (n * len(negative)))
