"""Shares by perplexity: the rule against tokens laid out one by one, and a real model's losses against one document at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from launch import launch
from tiny_shards import build_shards, documents, markov

from megatron_r1.artifacts.base import Artifact, open_artifact, open_workspace
from megatron_r1.artifacts.checkpoint import CheckpointSet
from megatron_r1.artifacts.mixture import load_mixture
from megatron_r1.data.shards import ShardSet
from megatron_r1.mixture.config import MixtureConfig, PerplexityConfig
from megatron_r1.mixture.perplexity import Sample, kept_tokens, resampled
from megatron_r1.mixture.run import run
from megatron_r1.model.forward import token_losses
from megatron_r1.model.load import load_model
from megatron_r1.parallel.config import LayoutConfig
from megatron_r1.parallel.context import initialize
from megatron_r1.train.config import TrainConfig
from megatron_r1.train.run import run as run_train
from megatron_r1.utils.errors import DataError


def sample(loss: list[float], lengths: list[int]) -> Sample:
    return Sample(np.array(loss), np.array(lengths, float), np.array(lengths))


@pytest.mark.parametrize("band", ["low", "middle", "high"])
@pytest.mark.parametrize("keep", [0.25, 0.5, 1.0])
def test_the_band_against_tokens_laid_out_one_by_one(band: str, keep: float) -> None:
    """Every document as that many equal tokens, sorted by loss; the middle half and so on is a slice of that list."""
    rng = np.random.default_rng(0)
    samples = {name: sample(rng.normal(mean, 1, n).tolist(), rng.integers(1, 30, n).tolist()) for name, mean, n in (("a", 2, 40), ("b", 3, 25), ("c", 5, 30))}
    tokens = {name: 1000.0 * int(found.lengths.sum()) for name, found in samples.items()}
    rows = [(loss, name) for name, found in samples.items() for loss, n in zip(found.loss, found.lengths) for _ in range(1000 * int(n))]
    rows.sort()
    start = {"low": 0.0, "middle": (1 - keep) / 2, "high": 1 - keep}[band]
    inside = rows[round(start * len(rows)) : round((start + keep) * len(rows))]
    found, edges = kept_tokens(PerplexityConfig(keep=keep, band=band), tokens, samples)  # type: ignore[arg-type]
    assert sum(found.values()) == pytest.approx(keep)
    assert found == pytest.approx({name: sum(owner == name for _, owner in inside) / len(rows) for name in samples}, abs=1e-4)
    assert edges == (inside[0][0], inside[-1][0])


def test_a_sample_stands_for_its_source() -> None:
    """b has ten times the tokens of a but as many documents in the sample: keeping everything gives the natural shares."""
    tokens = {"a": 100.0, "b": 1000.0}
    samples = {"a": sample([1.0, 2.0, 9.0], [5, 6, 7]), "b": sample([3.0, 4.0, 5.0], [2, 2, 2])}
    found, _ = kept_tokens(PerplexityConfig(keep=1.0), tokens, samples)
    assert found == pytest.approx({"a": 1 / 11, "b": 10 / 11})
    low, _ = kept_tokens(PerplexityConfig(keep=50 / 1100, band="low"), tokens, samples)
    assert low == pytest.approx({"a": 50 / 1100, "b": 0.0})
    draws = resampled(PerplexityConfig(keep=1.0), tokens, samples, 20, 1)
    assert np.allclose(draws, [1 / 11, 10 / 11])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact]:
    """easy: a chain with two successors; hard: twenty; random: uniform tokens; and a model trained on them for seconds."""
    folder = tmp_path_factory.mktemp("world")
    kinds = {"easy": markov(1, width=2, vocab=64), "hard": markov(2, width=20, vocab=64, first=64), "random": markov(3, width=1, noise=1.0)}
    shards = build_shards(folder, {name: {"train": documents(kind, i, 150)} for i, (name, kind) in enumerate(kinds.items())})
    config = TrainConfig.model_validate({
        "seed": 1, "inputs": {"shards": "corpus"}, "model": "nano", "sources": "uniform", "budget": "40 steps", "global_batch": "512 tokens",
        "seq_length": "32 tokens", "micro_batch": 16, "lr": {"peak": 5e-3}, "validation": {"tokens": "0 tokens"}, "log": {"tensorboard": False},
    })  # fmt: skip
    inputs = {"shards": shards}
    return shards, run_train(config, inputs, open_workspace(folder, "reference", "checkpoint", config, inputs))


def made(shards: Artifact, checkpoint: Artifact, folder: Path, **settings: object):
    plain = {"method": "perplexity", "inputs": {"shards": "corpus", "checkpoint": "reference"}, "seed": 1, "bootstrap": 100}
    config = MixtureConfig.model_validate({**plain, "perplexity": {"documents": 40, "tokens_per_document": 24, "batch_tokens": 200, **settings}})
    inputs = {"shards": shards, "checkpoint": checkpoint}
    return load_mixture(run(config, inputs, open_workspace(folder, "mix", "mixture", config, inputs)))


def test_a_real_model_end_to_end(world: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    shards, checkpoint = world
    low, high = made(shards, checkpoint, tmp_path / "low", band="low"), made(shards, checkpoint, tmp_path / "high", band="high")
    assert low.perplexity is not None
    loss = low.perplexity.loss
    assert loss["easy"] < loss["hard"] < loss["random"]
    assert low.weights["easy"] > 0.5 > low.weights["random"]
    assert high.weights["random"] > 0.5
    assert low.perplexity.documents == dict.fromkeys(loss, 40)
    assert (low.perplexity.low, high.perplexity.high) == (None, None)  # type: ignore[union-attr]
    assert low.interval_covers == ["documents read"]
    assert low.intervals is not None
    assert low.intervals["easy"][0] < low.weights["easy"] < low.intervals["easy"][1] + 1e-9
    assert sum(low.perplexity.kept[name] * low.natural[name] for name in loss) == pytest.approx(0.5)
    # One document at a time, without padding.
    ctx = initialize(LayoutConfig(), 0)
    chunks = load_model(CheckpointSet.open(checkpoint).final, ctx)
    everything = made(shards, checkpoint, tmp_path / "all", documents=1000)
    shard = ShardSet.open(shards).split("hard", "train")
    total, count = 0.0, 0
    for i in range(len(shard)):
        ids = torch.from_numpy(np.asarray(shard.tokens(i))[:25].astype(np.int64))[None]
        with torch.no_grad():
            total += float(token_losses(chunks, {"tokens": ids[:, :-1], "labels": ids[:, 1:]}).double().sum())
        count += ids.shape[1] - 1
    assert everything.perplexity is not None
    assert everything.perplexity.loss["hard"] == pytest.approx(total / count, rel=1e-6)


def test_what_does_not_fit_is_refused(world: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    _, checkpoint = world
    short = build_shards(tmp_path, {"one": {"train": [np.array([3])]}, "two": {"train": [np.arange(9)]}})
    with pytest.raises(DataError, match=r"document of one with at least two tokens[\s\S]*`sources`"):
        made(short, checkpoint, tmp_path / "short")


@pytest.mark.slow
def test_two_processes_read_what_one_reads(world: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    """Each rank reads half of the documents; rank 1 returns nothing; a method without a model is rank 0's alone."""
    shards, checkpoint = world
    config = {"method": "perplexity", "inputs": {"shards": "corpus", "checkpoint": "reference"}, "seed": 1, "bootstrap": 100,
              "perplexity": {"documents": 41, "tokens_per_document": 24, "batch_tokens": 200}}  # fmt: skip
    configs = {"perplexity": config, "uniform": {"method": "uniform", "inputs": {"shards": "corpus"}, "seed": 1}}
    arguments = {"configs": configs, "inputs": {"shards": str(shards.path), "checkpoint": str(checkpoint.path)}}
    ranks = launch(Path(__file__).parent / "mixture_worker.py", 2, tmp_path / "ranks", arguments, timeout=120)
    assert ranks[1] == {"perplexity": None, "uniform": None}
    found = load_mixture(open_artifact(ranks[0]["perplexity"]))
    alone = made(shards, checkpoint, tmp_path / "alone", documents=41)
    assert found.weights == pytest.approx(alone.weights, rel=1e-5)
    assert found.perplexity is not None
    assert alone.perplexity is not None
    assert found.perplexity.loss == pytest.approx(alone.perplexity.loss, rel=1e-6)
