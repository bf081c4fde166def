"""tools/shards.py from the command line."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from megatron_r1.artifacts.base import open_workspace
from megatron_r1.corpus.config import CorpusConfig
from megatron_r1.corpus.run import run

TOOLS = Path(__file__).resolve().parents[2] / "tools"
TEXTS = [f"Document {i} says: hello world, {i * i} times over." for i in range(40)]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("shards_tool", TOOLS / "shards.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["shards_tool"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    source = {"kind": "jsonl", "path": str(folder / "in.jsonl"), "domain": "web", "min_chars": 0}
    config = CorpusConfig.model_validate({"seed": 0, "sources": {"mine": source}, "tokenizer": {"vocab_size": 400}, "decontaminate": None, "splits": {"probe": 0, "test": 0}})
    return run(config, {}, open_workspace(folder / "runs", "corpus", "shards", config))


def said(tool, capsys, *flags, code=0):
    capsys.readouterr()
    assert tool.main([str(flag) for flag in flags]) == code
    out = capsys.readouterr()
    return out.err if code and out.err else out.out


def test_inspect(tool, artifact, capsys):
    assert "40 documents" in said(tool, capsys, "inspect", artifact.path).replace("  ", "")
    out = said(tool, capsys, "inspect", artifact.path, "--document", "mine:train:4")
    assert "mine:train:4" in out
    identity = out.split(" id ")[1].split()[0]
    assert any(text in out for text in TEXTS)
    assert said(tool, capsys, "inspect", artifact.path, "--id", identity) == out
    assert "as the sidecar has them" in said(tool, capsys, "inspect", artifact.path, "--id", "nobody", code=1)
    assert "--document" in said(tool, capsys, "inspect", artifact.path, "--document", "mine", code=1)
    assert "mine" in said(tool, capsys, "inspect", artifact.path, "--source", "yours", code=1)


def test_stats(tool, artifact, capsys):
    rows = json.loads(said(tool, capsys, "stats", artifact.path, "--json"))
    assert (rows[0]["source"], rows[0]["documents"], rows[-1]["source"]) == ("mine", 40, "all")
    assert rows[0]["bytes"] == sum(len(text.encode()) for text in TEXTS)
    out = said(tool, capsys, "stats", artifact.path, "--content")
    assert "p50" in out
    assert "times" in out


def test_verify_split_merge(tool, artifact, capsys, tmp_path):
    assert " 0 damaged" in said(tool, capsys, "verify", artifact.path)
    out = said(tool, capsys, "split", artifact.path, "--source", "mine", "--split", "train", "--parts", 3, "--out", tmp_path / "part")
    assert len(out.splitlines()) == 3
    parts = [tmp_path / f"part-0000{i}-of-00003" for i in range(3)]
    assert "0 ids of several" in said(tool, capsys, "merge", *parts, "--out", tmp_path / "whole")
    for suffix in (".bin", ".idx", ".docs.parquet", ".idx.crc"):
        assert (tmp_path / f"whole{suffix}").read_bytes() == (artifact.path / "sources" / "mine" / f"train{suffix}").read_bytes()
    assert "--force" in said(tool, capsys, "merge", *parts, "--out", tmp_path / "whole", code=1)
    assert "40 ids of several" in said(tool, capsys, "merge", artifact.path, artifact.path, "--out", tmp_path / "twice")
    assert "both" in said(tool, capsys, "merge", artifact.path, parts[0], "--out", tmp_path / "no", code=1)
    shown = said(tool, capsys, "inspect", tmp_path / "whole", "--document", "4", "--tokenizer", artifact.path / "tokenizer")
    assert shown.split("\n", 1)[1] == said(tool, capsys, "inspect", artifact.path, "--document", "mine:train:4").split("\n", 1)[1]
    for flags in (["--documents", 15], ["--fractions", 0.5, 0.5, "--seed", 3]):
        assert "documents" in said(tool, capsys, "split", tmp_path / "whole", *flags, "--out", tmp_path / "more")
    assert "one split" in said(tool, capsys, "split", tmp_path / "twice", "--parts", 2, "--out", tmp_path / "no", "--split", "test", code=1)
    path = tmp_path / "whole.bin"
    path.write_bytes(path.read_bytes()[:-2])
    assert str(path) in said(tool, capsys, "verify", tmp_path / "whole", artifact.path, code=1)
    assert str(path) in said(tool, capsys, "inspect", tmp_path / "whole", code=1)


def test_where_nothing_can_be_written(tool, artifact, capsys, tmp_path):
    (tmp_path / "file").write_text("no folder")
    assert "file" in said(tool, capsys, "merge", artifact.path, "--out", tmp_path / "file" / "x", code=1)
    assert "file" in said(tool, capsys, "split", artifact.path, "--split", "train", "--parts", 2, "--out", tmp_path / "file" / "x", code=1)
