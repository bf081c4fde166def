"""A ShardSet: sources, splits, its tokenizer, and what is refused."""

import json

import pytest
from data_toys import toy_shard, toy_tokenizer

from megatron_r1.artifacts.base import open_workspace
from megatron_r1.data.shards import ShardSet, SourceRecord
from megatron_r1.utils.errors import ArtifactError, DataError


@pytest.fixture
def artifact(tmp_path):
    work = open_workspace(tmp_path, "corpus", "shards", {"a": 1})
    tokenizer = toy_tokenizer(work.path / "tokenizer")
    shard, _ = toy_shard(work.path / "sources" / "news", [5, 6, 7], vocab_size=400)
    record = SourceRecord(name="news", domain="web", splits={"train": shard.record})
    content = {"tokenizer": {"sha256": tokenizer.sha256}, "sources": {"news": record.plain()}, "missing": [{"name": "x", "reason": "y"}], "control_groups": ["c"]}
    (work.path / "sources.json").write_text(json.dumps(content))
    return work.complete({})


def test_opening(artifact):
    shards = ShardSet.open(artifact)
    assert list(shards.sources) == ["news"]
    assert shards.sources["news"].tokens == 18
    assert (shards.missing[0]["name"], shards.control_groups) == ("x", ["c"])
    shard = shards.split("news")
    assert shard is shards.split("news", "train")
    assert len(shard) == 3
    assert len(shards.split("news", "test")) == 0
    assert shards.tokenizer.vocab_size == 400
    assert ShardSet.open(artifact.path).sources == shards.sources


@pytest.mark.parametrize(("source", "split"), [("olds", "train"), ("news", "training")])
def test_unknown_names(artifact, source, split):
    with pytest.raises(DataError, match="news"):
        ShardSet.open(artifact).split(source, split)


def test_another_kind_of_artifact(tmp_path):
    work = open_workspace(tmp_path, "probe", "probe", {"a": 1})
    with pytest.raises(ArtifactError, match="corpus step"):
        ShardSet.open(work.complete({}))


def test_a_tokenizer_that_does_not_fit(artifact, tmp_path):
    other = toy_tokenizer(tmp_path / "other", 500)
    shards = ShardSet.open(artifact)
    shards.require_tokenizer(shards.tokenizer.sha256, "the checkpoint")
    with pytest.raises(DataError, match="the checkpoint") as error:
        shards.require_tokenizer(other.sha256, "the checkpoint")
    assert "inputs.tokenizer" in error.value.fix


def test_an_exchanged_tokenizer(artifact, tmp_path):
    toy_tokenizer(artifact.path / "tokenizer", 500)
    with pytest.raises(DataError, match="tokenizer these shards were made with"):
        ShardSet.open(artifact)


def test_damaged_records(artifact):
    path = artifact.path / "sources.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ArtifactError, match=r"sources\.json"):
        ShardSet.open(artifact.path)
    path.write_text('{"sources": {"news": {"name": "news"}}}')
    with pytest.raises(ArtifactError, match="ValidationError"):
        ShardSet.open(artifact.path)


def test_ten_thousand_sources_of_one_document(tmp_path):
    """Neither memory nor descriptors nor maps may run out: a process has some 1,000 and 65,000 of the last two."""
    import os

    import psutil

    n = 10_000
    toy_tokenizer(tmp_path / "tokenizer")
    shard, documents = toy_shard(tmp_path / "one", [3])
    (tmp_path / "sources").mkdir()
    records = {}
    for i in range(n):
        os.symlink(tmp_path / "one", tmp_path / "sources" / f"s{i}")
        records[f"s{i}"] = {"name": f"s{i}", "domain": "web", "splits": {"train": shard.record.plain()}}
    (tmp_path / "sources.json").write_text(json.dumps({"schema_version": 2, "sources": records}))
    before = [len(os.listdir("/proc/self/fd")), len(open("/proc/self/maps").readlines())]  # noqa: SIM115
    memory = psutil.Process().memory_info().rss
    shards = ShardSet.open(tmp_path)
    for name in shards.sources:
        assert shards.split(name).tokens(0).tolist() == documents[0].tolist()
    used = psutil.Process().memory_info().rss - memory
    after = [len(os.listdir("/proc/self/fd")), len(open("/proc/self/maps").readlines())]  # noqa: SIM115
    assert after[0] < before[0] + 10
    assert after[1] < before[1] + 100
    assert used < n * 16_000, used


def test_shards_of_another_format(artifact):
    path = artifact.path / "sources.json"
    path.write_text(path.read_text().replace("{", '{"schema_version": 1, ', 1))
    with pytest.raises(ArtifactError, match="format 1") as error:
        ShardSet.open(artifact.path)
    assert "run the same command again" in error.value.fix


def test_importing_data_needs_no_torch():
    import subprocess
    import sys

    code = (
        "import sys\nfrom megatron_r1.data import bpe, chat, dataset, document, factbook, indexed, mixture_order, packages, packing, shards, tasks, tokenizer, view\n"
        "from megatron_r1.corpus import config, run\n"
        "assert not {'torch', 'transformers', 'reasoning_gym', 'sentencepiece', 'megatron'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
