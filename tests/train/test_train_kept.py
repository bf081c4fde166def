"""Training on the documents a mixture kept: only those are read, and cursors never mean blocks of another list."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from train_toys import settings, train

from megatron_r1.artifacts.base import Artifact, open_workspace
from megatron_r1.artifacts.checkpoint import CheckpointSet
from megatron_r1.artifacts.mixture import MIXTURE_FILE, KeptDocuments, Mixture, write_kept
from megatron_r1.data.shards import ShardSet
from megatron_r1.train.feed import open_data
from megatron_r1.utils.errors import ConfigError, DataError
from megatron_r1.utils.io import atomic_write_json

WEIGHTS = {"alpha": 0.5, "beta": 0.5}


def kept_mixture(folder: Path, shards: Artifact, kept: dict[str, np.ndarray], name: str = "mix") -> Artifact:
    work = open_workspace(folder, name, "mixture", {"kept": {n: found.tolist() for n, found in kept.items()}}, {"shards": shards})
    counts = {source: len(found) for source, found in kept.items()}
    record = KeptDocuments(rule="paper", control=False, unscored="drop", scored=counts, passed=counts, documents=counts, tokens=counts)
    mixture = Mixture(method="uniform", weights=WEIGHTS, natural=WEIGHTS, uniform=WEIGHTS, floor=0.0, kept=record)
    for source, found in kept.items():
        write_kept(work.path, source, found)
    atomic_write_json(work.path / MIXTURE_FILE, mixture.plain())
    return work.complete({})


def on(mixture: str = "mix", **inputs: str) -> dict:
    return {"inputs": {"shards": "corpus", "mixture": mixture, **inputs}, "sources": None}


def test_only_kept_documents_are_read(shards: Artifact, tmp_path: Path) -> None:
    opened = ShardSet.open(shards)
    odd = np.arange(1, len(opened.split("alpha")), 2)
    mixture = kept_mixture(tmp_path, shards, {"alpha": odd, "beta": np.arange(len(opened.split("beta")))})
    data = open_data(settings(**on()), opened, shards, mixture, None)
    seen: dict[str, set[int]] = {"alpha": set(), "beta": set()}
    for index in range(2 * sum(data.order.blocks.values())):
        row = data.dataset.sample(index)
        seen[data.sources[row["source_id"]]].update(row["document_ids"].tolist())
    assert seen["alpha"] <= set(odd.tolist())
    assert len(seen["alpha"]) >= len(odd) - 1
    assert any(number % 2 == 0 for number in seen["beta"])
    assert list(data.views) == ["alpha"]  # all of beta was kept, so it is read as before


def test_cursors_start_over_when_the_list_changes_and_go_on_when_not(shards: Artifact, tmp_path: Path, messages) -> None:
    opened = ShardSet.open(shards)
    every = np.arange(len(opened.split("beta")))
    one, two = (kept_mixture(tmp_path, shards, {"alpha": found, "beta": every}, name) for name, found in (("one", np.arange(0, 60, 2)), ("two", np.arange(1, 60, 2))))
    first = train(tmp_path, settings(**on("one")), "first", shards=shards, mixture=one)
    manifest = CheckpointSet.open(first).manifest
    assert list(manifest.data_views) == ["alpha"]
    again = settings(**on("mix", checkpoint="first"), model=None)
    same, other = (open_data(again, opened, shards, mixture, manifest) for mixture in (one, two))
    assert same.start == manifest.data_cursors
    assert same.views == manifest.data_views
    assert other.start == {"alpha": 0, "beta": manifest.data_cursors["beta"]}
    assert other.views != manifest.data_views
    # Reading all documents after a list is a change, too; a list of a source that is not used is remembered.
    plain = settings(model=None, inputs={"shards": "corpus", "checkpoint": "first"})
    assert open_data(plain, opened, shards, None, manifest).order.start["alpha"] == 0
    without = settings(model=None, sources={"beta": 1.0}, inputs={"shards": "corpus", "checkpoint": "first"})
    assert open_data(without, opened, shards, None, manifest).views == manifest.data_views
    assert any("other documents of alpha than before" in message for message in messages)


def test_lists_of_other_shards_and_for_fine_tuning_are_refused(shards: Artifact, tmp_path: Path) -> None:
    opened = ShardSet.open(shards)
    mixture = kept_mixture(tmp_path, shards, {"alpha": np.arange(3), "beta": np.arange(4)})
    from train_toys import make_shards

    other = make_shards(tmp_path, documents=30, seed=5)
    with pytest.raises(DataError, match=r"shards that mix chose documents of[\s\S]*the shards the mixture was made for"):
        open_data(settings(**on()), ShardSet.open(other), other, mixture, None)
    sft = settings(**on(), objective="sft", budget="1 epochs")
    with pytest.raises(ConfigError, match=r"keeps all conversations[\s\S]*without a filter"):
        open_data(sft, opened, shards, mixture, None)
