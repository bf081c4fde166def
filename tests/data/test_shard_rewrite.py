"""Merging and splitting against lists in memory; statistics against numpy over everything."""

import errno
import json
import os
import shutil
from collections import Counter

import numpy as np
import pytest
from data_toys import toy_shard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shard_toys import content_of, toy_set

from megatron_r1.data import documents, shard_rewrite
from megatron_r1.data.indexed import IndexedWriter
from megatron_r1.data.shard_checks import verify
from megatron_r1.data.shard_rewrite import (
    COLLISIONS_FILE,
    merge_artifacts,
    merge_datasets,
    split_dataset,
    split_documents,
    split_fractions,
    split_parts,
)
from megatron_r1.data.shard_stats import PERCENTILES, shards_of, statistics
from megatron_r1.data.shards import Shard, ShardSet, find_document
from megatron_r1.utils.errors import ConfigError, DataError, EnvironmentProblem


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_merging_datasets(tmp_path):
    a, _ = toy_shard(tmp_path / "a", [3, 0, 5], masks=True)
    b, _ = toy_shard(tmp_path / "b", [7, 2], masks=True, seed=1)
    record, found, count = merge_datasets([a.prefix, tmp_path / "b" / "train.idx"], tmp_path / "out" / "both")
    both = Shard.at(tmp_path / "out" / "both")
    assert content_of(both) == content_of(a) + content_of(b)
    assert (record.documents, record.tokens, record.bytes) == (5, 17, 51)
    assert not verify(both.prefix).damaged
    assert count == 2
    assert found[0] == {"id": "doc0", "documents": [[str(a.prefix), "", 0], [str(b.prefix), "", 0]]}
    before = files(tmp_path / "out")
    with pytest.raises(ConfigError, match="--force"):
        merge_datasets([b.prefix, a.prefix], tmp_path / "out" / "both")
    assert files(tmp_path / "out") == before
    merge_datasets([a.prefix, b.prefix], tmp_path / "out" / "both", force=True)
    assert files(tmp_path / "out") == before
    merge_datasets([both.prefix, both.prefix], both.prefix.with_name("both.bin"), force=True)
    assert len(Shard.at(both.prefix)) == 10


def test_merging_what_megatron_wrote(tmp_path):
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    import torch

    for name, parts in (("a", ([1, 2, 3], [4])), ("b", ([5, 6],))):
        builder = indexed.IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=np.uint16)
        for tokens in parts:
            builder.add_item(torch.tensor(tokens))
            builder.end_document()
        builder.finalize(str(tmp_path / f"{name}.idx"))
    merge_datasets([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    stock = indexed.IndexedDataset(str(tmp_path / "c"))
    assert [stock[i].tolist() for i in range(len(stock))] == [[1, 2, 3], [4], [5, 6]]
    assert not list(tmp_path.glob("c.docs*"))
    assert verify(tmp_path / "c").unprotected == []


def test_what_is_not_merged(tmp_path):
    a, _ = toy_shard(tmp_path / "a", [3])
    masked, _ = toy_shard(tmp_path / "m", [3], masks=True)
    wide, _ = toy_shard(tmp_path / "w", [3], vocab_size=70000)
    with IndexedWriter(tmp_path / "plain", np.dtype(np.uint16)) as writer:
        writer.add(np.arange(3))
    sets = [toy_set(tmp_path / str(size), vocab_size=size) for size in (400, 401)]
    for other, said in ((masked.prefix, "masks"), (wide.prefix, "type of token"), (tmp_path / "plain", "docs.parquet"), (sets[0].path / "sources" / "news" / "train", "tokenizer")):
        with pytest.raises(DataError, match=said):
            merge_datasets([a.prefix, other], tmp_path / "out")
    with pytest.raises(DataError, match="tokenizer"):
        merge_artifacts([item.path for item in sets], tmp_path / "out")
    with pytest.raises(DataError, match="one domain"):
        merge_artifacts([sets[0].path, toy_set(tmp_path / "d", domain="code").path], tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    assert not list(tmp_path.glob(".out*"))


def test_merging_artifacts(tmp_path, monkeypatch):
    a, b = toy_set(tmp_path / "a"), toy_set(tmp_path / "b", "corpus", prefix="b-")
    out = merge_artifacts([a.path, b.path, a.path], tmp_path / "both")
    merged, sets = ShardSet.open(out), [ShardSet.open(item) for item in (a, b, a)]
    assert not verify(out.path).damaged
    for source, split in (("news", "train"), ("news", "test"), ("talks", "train")):
        assert content_of(merged.split(source, split)) == [row for item in sets for row in content_of(item.split(source, split))]
        assert merged.split(source, split).n_bytes == sum(item.split(source, split).n_bytes for item in sets)
    assert (merged.sources["news"].dropped, merged.sources["news"].quarantined) == ({"short": 6}, 3)
    assert len((out.path / "quarantine" / "news.jsonl").read_text().splitlines()) == 3
    listed = [json.loads(line) for line in (out.path / COLLISIONS_FILE).read_text().splitlines()]
    assert len(listed) == out.manifest.summary["colliding_ids"] == 36
    assert {"source": "talks", "id": "train3", "documents": [[str(a.path), "train", 3]] * 2} in listed
    with pytest.raises(ConfigError, match="--force"):
        merge_artifacts([a.path], tmp_path / "both")
    before = files(tmp_path / "both")
    assert len(ShardSet.open(merge_artifacts([b.path], tmp_path / "both", force=True)).split("news")) == 12
    merge_artifacts([a.path, b.path, a.path], tmp_path / "both", force=True)
    after = files(tmp_path / "both")
    # the manifest holds the time it was made, to the second
    assert {name for name in before if before[name] != after[name]} <= {"manifest.json"}
    with monkeypatch.context() as patch:
        patch.setattr("megatron_r1.artifacts.base.io.sha256_files", lambda paths: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            merge_artifacts([b.path], tmp_path / "both", force=True)
    assert files(tmp_path / "both") == after
    assert not list(tmp_path.glob(".both*"))
    (tmp_path / "taken").mkdir()
    with pytest.raises(ConfigError, match="something else"):
        merge_artifacts([a.path], tmp_path / "taken", force=True)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=40), data=st.data())
def test_splitting_keeps_everything_once_and_in_order(tmp_path_factory, lengths, data):
    folder = tmp_path_factory.mktemp("split")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "ROWS", 8)
        patch.setattr(shard_rewrite, "SPAN", 5)
        shard, _ = toy_shard(folder, lengths, masks=data.draw(st.booleans()))
        how = data.draw(st.sampled_from(["parts", "documents", "fractions"]))
        if how == "parts":
            parts = data.draw(st.integers(1, len(lengths)))
            owner = split_parts(shard, parts)
            assert set(owner.tolist()) == set(range(parts))
        elif how == "documents":
            owner = split_documents(shard, data.draw(st.integers(1, 12)))
            parts = int(owner[-1]) + 1
        else:
            owner, parts = split_fractions(shard, [0.2, 0.5, 0.3], data.draw(st.integers(0, 9))), 3
            # Groups never straddle.
            assert len({(group, part) for group, part in zip(shard.groups, owner.tolist(), strict=True)}) == len(set(shard.groups))
        records = split_dataset(shard, owner, parts, folder / "out")
        whole = content_of(shard)
        for number, record in enumerate(records):
            prefix = folder / f"out-{number:05d}-of-{parts:05d}"
            part = Shard.at(prefix)
            assert part.record == record
            assert (content_of(part) if len(part) else []) == [row for row, mine in zip(whole, owner, strict=True) if mine == number]
            assert not verify(prefix).damaged
        assert not list(folder.glob(".*"))


def test_parts_are_even_in_tokens(tmp_path):
    shard, _ = toy_shard(tmp_path, np.random.default_rng(0).integers(0, 50, 4000).tolist())
    tokens = np.bincount(split_parts(shard, 7), weights=shard.lengths)
    assert np.ptp(tokens) < 100
    shares = np.bincount(split_fractions(shard, [0.9, 0.1]), minlength=2)
    assert len(set(split_fractions(shard, [0.5, 0.5], seed=1).tolist())) <= 2
    assert shares.sum() == 4000


@pytest.mark.parametrize("fractions", [[], [0.5, 0.4], [1.0, 0.0], [float("nan"), 0.5], [-0.5, 1.5]])
def test_wrong_ways_to_split(tmp_path, fractions):
    shard, _ = toy_shard(tmp_path, [3, 4])
    with pytest.raises(ConfigError, match="add up to 1"):
        split_fractions(shard, fractions)
    for parts in (0, 3, -1):
        with pytest.raises(ConfigError, match="1 to 2 parts"):
            split_parts(shard, parts)
    with pytest.raises(ConfigError, match="at least 1"):
        split_documents(shard, 0)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("after", [0, 1, 3, 5, 9, 14, 20])
def test_a_full_disk_leaves_nothing_half_made(tmp_path, monkeypatch, number, after):
    """The error comes at every place a file is opened, made durable or renamed."""
    a, b = toy_set(tmp_path / "a"), toy_set(tmp_path / "b", prefix="b-")
    before = files(tmp_path)
    calls = Counter()

    def failing(real):
        def call(*args, **kwargs):
            calls["n"] += 1
            if calls["n"] > after:
                raise OSError(number, os.strerror(number))
            return real(*args, **kwargs)

        return call

    prefix = a.path / "sources" / "news" / "train"
    for act in (
        lambda: merge_artifacts([a.path, b.path], tmp_path / "out" / "set"), lambda: merge_datasets([prefix, prefix], tmp_path / "out" / "set"),
        lambda: split_dataset(Shard.at(prefix), split_parts(Shard.at(prefix), 3), 3, tmp_path / "out" / "set"),
    ):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing(os.fsync))
            try:
                act()
            except EnvironmentProblem as error:
                said = error.found
                assert {name: data for name, data in files(tmp_path).items() if not name.startswith("out/")} == before
                # The last thing made durable is the folder, when all of it is there.
                left = files(tmp_path / "out")
                places = {path.with_suffix("") for path in (tmp_path / "out").glob("*.idx")} or {tmp_path / "out" / "set"}
                assert not left or not any(verify(path).damaged for path in places), left
            else:
                said = "the disk is full" if after >= 5 else ""
            assert "full" in said or "refused" in said
            shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_damaged_input_is_not_copied(tmp_path):
    artifact = toy_set(tmp_path / "a")
    path = artifact.path / "sources" / "talks" / "train.mask"
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    for act in (
        lambda: merge_artifacts([artifact.path], tmp_path / "out"), lambda: merge_datasets([path.with_suffix("")], tmp_path / "out"),
        lambda: split_dataset(Shard.at(path.with_suffix("")), np.zeros(12, np.int32), 1, tmp_path / "out"),
    ):
        with pytest.raises(DataError, match=r"train\.mask"):
            act()
    assert [item.name for item in tmp_path.iterdir()] == ["a"]


def test_statistics(tmp_path):
    artifact = toy_set(tmp_path)
    shards = shards_of(ShardSet.open(artifact))
    rows = statistics(shards, content=True)
    assert rows[:-1] != []
    for ((source, split), shard), row in zip(shards.items(), rows, strict=False):
        lengths = np.asarray(shard.lengths)
        assert (row.source, row.split, row.documents, row.tokens, row.empty) == (source, split, len(shard), int(lengths.sum()), int((lengths == 0).sum()))
        if len(shard):
            for percent in PERCENTILES:
                assert row.percentiles[percent] == np.percentile(lengths, percent, method="inverted_cdf")
            texts = [tuple(shard.tokens(i).tolist()) for i in range(len(shard))]
            assert row.duplicates == len(texts) - len(set(texts))
    every = np.concatenate([shard.read(0, shard.n_tokens).astype(int) for shard in shards.values()])
    assert rows[-1].tokens == len(every)
    counts = Counter(every.tolist())
    assert [count for _, count in rows[-1].frequent] == [count for _, count in counts.most_common(10)]
    assert all(counts[token] == count for token, count in rows[-1].frequent)
    assert statistics(shards_of(ShardSet.open(artifact), "talks", "train"))[0].duplicates is None


def test_repeated_documents_are_counted_whatever_their_type(tmp_path):
    parts = {}
    for name, dtype in (("a", np.uint16), ("b", np.int32)):
        with IndexedWriter(tmp_path / name, np.dtype(dtype)) as writer:
            for tokens in ([1, 2], [3], [1, 2], []):
                writer.add(np.asarray(tokens, np.int64))
        parts[name, ""] = Shard.at(tmp_path / name)
    assert [row.duplicates for row in statistics(parts, content=True)] == [1, 1, 5]


def test_ids_that_no_statistics_can_count(tmp_path):
    with IndexedWriter(tmp_path / "a", np.dtype(np.int32)) as writer:
        writer.add(np.asarray([2**31 - 1]))
    with pytest.raises(DataError, match="token ids from 0"):
        statistics({("a", ""): Shard.at(tmp_path / "a")}, content=True)


def test_finding_documents(tmp_path):
    shards = shards_of(ShardSet.open(toy_set(tmp_path)))
    assert [(key, number) for key, _, number in find_document(shards, "talks:train:7")] == [(("talks", "train"), 7)]
    assert [(key, number) for key, _, number in find_document(shards, None, "train7")] == [(("news", "train"), 7), (("talks", "train"), 7)]
    for where, id in (("talks:train:12", None), ("talks:train", None), ("7", None), ("talks:train:-1", None), (None, "nobody")):
        with pytest.raises(DataError, match=r"--document|--id"):
            list(find_document(shards, where, id))
