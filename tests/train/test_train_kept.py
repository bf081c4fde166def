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
from megatron_r1.data.view import TokenStream
from megatron_r1.train.feed import open_data, view_hash
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
    assert {name: bool(of.view) for name, of in data.continued.items()} == {"alpha": True, "beta": False}  # all of beta was kept, so it is read as before


def test_a_changed_list_goes_on_with_what_is_left_of_the_epoch(shards: Artifact, tmp_path: Path, messages) -> None:
    opened = ShardSet.open(shards)
    every = np.arange(len(opened.split("beta")))
    one, two = (kept_mixture(tmp_path, shards, {"alpha": found, "beta": every}, name) for name, found in (("one", np.arange(0, 60, 2)), ("two", np.arange(1, 60, 2))))
    first = train(tmp_path, settings(**on("one")), "first", shards=shards, mixture=one)
    parent = CheckpointSet.open(first)
    alpha, beta = (parent.manifest.data_cursors[name] for name in ("alpha", "beta"))
    assert (alpha.epoch, [leg.view for leg in alpha.legs]) == (0, [view_hash(np.arange(0, 60, 2))])
    assert [leg.view for leg in beta.legs] == [""]
    assert [path.name for path in (first.path / "views").iterdir()] == [f"alpha-{alpha.legs[0].view}.npy"]
    again = settings(**on("mix", checkpoint="first"), model=None)
    same, other = (open_data(again, opened, shards, mixture, parent) for mixture in (one, two))
    assert same.cursors(0) == parent.manifest.data_cursors
    assert other.cursors(0)["beta"] == beta
    # None of the odd documents was read before, so all of them are left of this epoch.
    whole = TokenStream(opened.split("alpha"), np.arange(1, 60, 2))
    assert other.continued["alpha"].rest.blocks == whole.blocks(32)
    assert other.cursors(1)["alpha"].legs[0] == alpha.legs[0]
    assert any("alpha is read from other documents" in message for message in messages)
    # All documents after a list: those of the list as far as they were not read, and the others.
    plain = open_data(settings(model=None, inputs={"shards": "corpus", "checkpoint": "first"}), opened, shards, None, parent)
    shard = opened.split("alpha")
    left = shard.n_tokens - alpha.legs[0].taken * 32
    assert plain.continued["alpha"].rest.blocks in range((left - 2) // 32, (left + len(shard)) // 32 + 1)
    # A source that is not used keeps its cursor, and the list it refers to goes with it.
    without = settings(model=None, sources={"beta": 1.0}, inputs={"shards": "corpus", "checkpoint": "first"}, budget="1 steps")
    third = train(tmp_path, without, "third", shards=shards, checkpoint=first)
    assert CheckpointSet.open(third).manifest.data_cursors["alpha"] == alpha
    back = open_data(again, opened, shards, one, CheckpointSet.open(third))
    assert back.cursors(0)["alpha"] == alpha


def test_cursors_of_older_releases(shards: Artifact, tmp_path: Path, messages) -> None:
    """Numbers of blocks, and hashes of lists that were not kept."""
    opened = ShardSet.open(shards)
    mixture = kept_mixture(tmp_path, shards, {"alpha": np.arange(0, 60, 2)})
    first = train(tmp_path, settings(budget="1 steps"), "first", shards=shards)
    parent = CheckpointSet.open(first)

    def older(**changes):
        parent.manifest = parent.manifest.model_copy(update={"data_cursors": {"alpha": 40, "beta": 3}, **changes})
        return parent

    config = settings(**on(checkpoint="first"), model=None)
    blocks = TokenStream(opened.split("alpha"), np.arange(0, 60, 2)).blocks(32)
    listed = older(data_views={"alpha": view_hash(np.arange(0, 60, 2))})
    data = open_data(config, opened, shards, mixture, listed)
    assert data.cursors(0)["alpha"].epoch == 40 // blocks
    assert data.order.start == {"alpha": 40, "beta": 3}
    lost = older(data_views={"alpha": "0123456789abcdef"})
    assert open_data(config, opened, shards, mixture, lost).order.start == {"alpha": 0, "beta": 3}
    assert any("alpha was read from a list of documents that the input checkpoint does not hold" in message for message in messages)


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
