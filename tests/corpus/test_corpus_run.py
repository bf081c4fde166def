"""The stage on files of one's own: what comes out, what bad input and a full disk do, and that a killed run ends in the same bytes."""

import builtins
import errno
import gzip
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from corpus_toys import config, contents, line_offsets, make, text, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.artifacts.base import open_artifact, open_workspace
from megatron_r1.corpus import extract as extracting
from megatron_r1.corpus import plan as planning
from megatron_r1.corpus import run as stage
from megatron_r1.corpus.config import CorpusConfig, describe
from megatron_r1.data import indexed as indexing
from megatron_r1.data.shards import SPLITS, ShardSet
from megatron_r1.utils.errors import ConfigError, DataError, EnvironmentProblem
from megatron_r1.utils.lock import only_process


@pytest.fixture
def files(tmp_path):
    news = write_jsonl(tmp_path / "raw" / "news.jsonl", [{"text": text(i), "author": f"a{i % 20}"} for i in range(200)])
    talks = write_jsonl(tmp_path / "raw" / "talks.jsonl", [{"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}]} for i in range(80)])
    return {
        "news": {"kind": "jsonl", "path": str(news), "domain": "web", "group_field": "author"},
        "talks": {"kind": "jsonl", "path": str(talks), "domain": "chat", "format": "chat"},
    }


def test_what_comes_out(tmp_path, files):
    artifact = make(tmp_path / "runs", config(files))
    shards = ShardSet.open(open_artifact(artifact.path, "shards", "full"))
    assert list(shards.sources) == ["news", "talks"]
    tokenizer = shards.tokenizer
    offsets = line_offsets(Path(files["news"]["path"]))
    originals = {f"news.jsonl:{offsets[i]}": (text(i), f"author:a{i % 20}") for i in range(200)}
    groups, ids = {}, []
    for split in ("train", "probe", "test", "control"):
        shard = shards.split("news", split)
        ids += shard.ids
        groups[split] = set(shard.groups)
        for i, (identity, group) in enumerate(zip(shard.ids, shard.groups, strict=True)):
            tokens = shard.tokens(i)
            assert tokens[-1] == tokenizer.eos_id
            assert tokenizer.decode(tokens[:-1]) == originals[identity][0]
            assert group == originals[identity][1]
            assert shard.document_bytes[i] == len(originals[identity][0].encode())
            assert shard.mask(i) is None
    assert sorted(ids) == sorted(originals)
    assert not groups["train"] & groups["probe"]
    assert not groups["train"] & groups["test"]
    assert len(groups["train"]) > 12
    talk = shards.split("talks")
    learnt = talk.tokens(0)[talk.mask(0).astype(bool)]
    assert tokenizer.decode(learnt).startswith("It is ")
    assert learnt[-1] == tokenizer.end_of_turn_id
    summary = artifact.manifest.summary
    assert summary["sources"]["news"]["train"]["documents"] == len(shards.split("news"))
    assert summary["splits"]["train"]["tokens"] == sum(shards.split(name).n_tokens for name in shards.sources)
    assert not (artifact.path / "tmp").exists()


def test_two_runs_are_byte_identical(tmp_path, files):
    first, second = make(tmp_path / "a", config(files)), make(tmp_path / "b", config(files))
    assert contents(first.path) == contents(second.path)


class Killed(BaseException):
    """Nothing in the stage may catch it."""


def count_moves(monkeypatch, at=None):
    """Let the process die at the at-th time a file gets its name, before or (odd numbers) after."""
    original, calls = os.replace, []

    def dying(*args, **kwargs):
        calls.append(1)
        if at is not None and len(calls) == at // 2 + 1:
            if at % 2:
                original(*args, **kwargs)
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(os, "replace", dying)
    return calls


def test_killed_anywhere_and_run_again_gives_the_same_bytes(tmp_path, files, monkeypatch):
    settings_ = config(files, shuffle=True, near_duplicates={})
    calls = count_moves(monkeypatch)
    expected = contents(make(tmp_path / "whole", settings_).path)
    monkeypatch.undo()
    places = random.Random(1).sample(range(2 * len(calls)), 6)
    for at in sorted({*places, 1, 2 * len(calls) - 1}):
        count_moves(monkeypatch, at)
        with pytest.raises(Killed):
            make(tmp_path / str(at), settings_)
        monkeypatch.undo()
        assert contents(make(tmp_path / str(at), settings_).path) == expected
        shutil.rmtree(tmp_path / str(at))


def test_killed_again_and_again(tmp_path, files, monkeypatch):
    """Every attempt gets one step further than the one before."""
    settings_ = config(files)
    expected = contents(make(tmp_path / "whole", settings_).path)
    for _ in range(200):
        count_moves(monkeypatch, 20)
        try:
            made = make(tmp_path / "again", settings_)
            break
        except Killed:
            monkeypatch.undo()
    assert contents(made.path) == expected


def test_done_work_is_not_done_again_but_changed_input_is(tmp_path, files, monkeypatch):
    def stop(*args):
        raise Killed

    monkeypatch.setattr(stage, "_publish", stop)
    with pytest.raises(Killed):
        make(tmp_path / "runs", config(files))
    monkeypatch.undo()
    write_jsonl(tmp_path / "raw" / "news.jsonl", [{"text": text(i), "author": "b"} for i in range(1000, 1100)])
    real, again = extracting.read_partition, []
    monkeypatch.setattr(extracting, "read_partition", lambda source, partition, *args: again.append(partition.source) or real(source, partition, *args))
    made = make(tmp_path / "runs", config(files))
    shards = ShardSet.open(made)
    assert sum(len(shards.split("news", split)) for split in ("train", "probe", "test")) == 100
    assert again == ["news"]
    monkeypatch.undo()
    assert contents(make(tmp_path / "whole", config(files)).path) == contents(made.path)


def test_input_that_changes_while_it_is_read(tmp_path, files, monkeypatch):
    real = extracting.read_partition

    def changing(*args):
        yield from real(*args)
        write_jsonl(tmp_path / "raw" / "talks.jsonl", [])

    monkeypatch.setattr(extracting, "read_partition", changing)
    with pytest.raises(DataError, match=r"talks\.jsonl"):
        make(tmp_path / "runs", config(files))


def cut(monkeypatch):
    """Many partitions, parts, ranges and buckets of a small corpus."""
    monkeypatch.setattr(planning, "SIZES", planning.Sizes(partition=30_000, part=12_000, bucket=60, range=1 << 20, segment=2000))


def cut_ranges(monkeypatch):
    """Ranges of a small corpus too; checksums are then of other blocks."""
    cut(monkeypatch)
    monkeypatch.setattr(planning, "SIZES", replace(planning.SIZES, range=1 << 11))
    monkeypatch.setattr(indexing, "BLOCK", 1 << 11)


def documents(artifact, source="news"):
    shards = ShardSet.open(artifact)
    found = {}
    for split in SPLITS:
        shard = shards.split(source, split)
        shard.verify()
        for i, identity in enumerate(shard.ids):
            assert identity not in found
            mask = shard.mask(i)
            found[identity] = (split, shard.groups[i], shard.tokens(i).tolist(), None if mask is None else mask.tolist())
    return found


@pytest.mark.parametrize("shuffle", [False, True])
def test_how_the_work_is_cut_changes_nothing(tmp_path, files, monkeypatch, shuffle):
    """Partitions, parts, buckets and ranges of other sizes: the same documents, and the same order of them."""
    write_jsonl(tmp_path / "raw" / "news.jsonl", [{"text": text(i % 170), "author": f"a{i % 20}"} for i in range(200)])
    settings_ = config(files, shuffle=shuffle, near_duplicates={})
    whole = make(tmp_path / "whole", settings_)
    cut_ranges(monkeypatch)
    parts = make(tmp_path / "parts", settings_)
    one, other = contents(whole.path), contents(parts.path)
    assert {name for name in one if name.endswith((".bin", ".idx", ".mask"))}
    assert [name for name in one if one[name] != other[name] and not name.endswith((".crc", "sources.json"))] == []
    for source in ("news", "talks"):
        found = documents(parts, source)
        assert found
    assert ShardSet.open(whole).sources["news"].dropped == ShardSet.open(parts).sources["news"].dropped
    assert ShardSet.open(whole).sources["news"].dropped["duplicate"] == 30


def test_shuffled_and_not(tmp_path, files):
    plain, shuffled, seeded = (make(tmp_path / name, config(files, **more)) for name, more in (("a", {}), ("b", {"shuffle": True}), ("c", {"shuffle": True, "seed": 1})))
    for source in ("news", "talks"):
        assert documents(plain, source) == documents(shuffled, source) == documents(seeded, source)
        orders = [list(documents(artifact, source)) for artifact in (plain, shuffled, seeded)]
        assert orders[0] != orders[1] != orders[2]


def test_a_compressed_file_goes_on_after_its_last_part(tmp_path, files, monkeypatch):
    cut(monkeypatch)
    packed = tmp_path / "raw" / "news.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(files["news"]["path"]).read_bytes()))
    settings_ = config({"news": {**files["news"], "path": str(packed)}})
    expected = contents(make(tmp_path / "whole", settings_).path)
    real, asked = extracting.read_partition, []

    def noting(source, partition, given, resume=None):
        for number, item in enumerate(real(source, partition, given, resume)):
            if not asked and number == 100:
                asked.append(resume)
                raise Killed
            yield item
        asked.append(resume)

    monkeypatch.setattr(extracting, "read_partition", noting)
    with pytest.raises(Killed):
        make(tmp_path / "again", settings_)
    parts = list((tmp_path / "again").glob("*.partial/tmp/extract/news/*/part-*.json"))
    assert len(parts) > 1
    assert contents(make(tmp_path / "again", settings_).path) == expected
    assert asked[0] is None
    assert asked[1] > 0


def test_max_bytes_however_the_work_is_cut(tmp_path, files, monkeypatch):
    """What is kept depends on what came before: repeated texts do not count, in whichever partition they are."""
    write_jsonl(tmp_path / "raw" / "news.jsonl", [{"text": text(i % 60), "author": f"a{i % 20}"} for i in range(200)])
    settings_ = config({"news": files["news"] | {"max_bytes": "16 kB"}})
    whole = make(tmp_path / "whole", settings_)
    cut(monkeypatch)
    parts = make(tmp_path / "parts", settings_)
    assert documents(whole) == documents(parts)
    record = ShardSet.open(parts).sources["news"]
    assert 16_000 <= sum(entry.bytes for entry in record.splits.values()) < 16_600
    assert record.dropped == ShardSet.open(whole).sources["news"].dropped


def test_sigterm_stops_the_workers(tmp_path, files, monkeypatch):
    """The process ends with the signal's status, its workers with it, and the next one finishes the work."""
    write_jsonl(tmp_path / "raw" / "news.jsonl", [{"text": text(i, 4000), "author": f"a{i}"} for i in range(3000)])
    settings_ = config(files, workers=2)
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, json\nfrom pathlib import Path\nfrom corpus_toys import make, CorpusConfig\n"
        "if __name__ == '__main__': make(Path(sys.argv[1]), CorpusConfig.model_validate(json.loads(sys.argv[2])))\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    process = subprocess.Popen([sys.executable, script, str(tmp_path / "runs"), json.dumps(settings_.plain())], env=env, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((tmp_path / "runs").rglob(".part-*.tmp")):
        time.sleep(0.02)
    children = psutil.Process(process.pid).children()
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM
    assert len(children) >= 2
    assert not psutil.wait_procs(children, timeout=20)[1]
    assert not list((tmp_path / "runs").glob("*/manifest.json"))


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers(tmp_path, files, monkeypatch, workers):
    settings_ = config(files, shuffle=True)
    cut(monkeypatch)
    whole = make(tmp_path / "one", settings_)
    shared = make(tmp_path / "more", config(files, shuffle=True, workers=workers))
    assert shared.manifest.summary["workers"] == workers
    assert contents(whole.path) == contents(shared.path)


def test_the_error_of_a_worker_is_the_users(tmp_path, files, monkeypatch):
    cut(monkeypatch)
    with pytest.raises(DataError, match="max_bad_ratio"):
        make(tmp_path / "runs", config({**files, **bad_file(tmp_path / "a.jsonl", 100, 4)}, workers=2))


class Deadly(planning.Job):
    """A job some of whose workers are killed, as by the system when memory is short: so many times as the file has bytes."""

    def __reduce__(self):
        return Deadly, super().__reduce__()[1]

    @property
    def units(self):
        left = self.folder / "lives"
        if multiprocessing.parent_process() is not None and left.stat().st_size:
            with open(left, "r+b") as stream:
                stream.truncate(left.stat().st_size - 1)
            os.kill(os.getpid(), 9)
        return planning.Job.units.func(self)


@pytest.mark.parametrize("lives", [2, 30])
def test_workers_that_die(tmp_path, files, monkeypatch, lives):
    cut(monkeypatch)
    expected = contents(make(tmp_path / "one", config(files)).path)
    monkeypatch.setattr(stage, "Job", Deadly)
    work = open_workspace(tmp_path / "runs", "corpus", "shards", config(files, workers=2))
    (work.tmp / "lives").write_bytes(b"x" * lives)
    if lives == 2:
        assert contents(stage.run(config(files, workers=2), {}, work).path) == expected
        return
    with pytest.raises(EnvironmentProblem, match="extract/news") as error:
        stage.run(config(files, workers=2), {}, work)
    assert "signal 9" in error.value.found
    assert "workers" in error.value.fix
    (work.tmp / "lives").write_bytes(b"")
    assert contents(stage.run(config(files, workers=2), {}, work).path) == expected


def test_two_processes_on_one_workspace(tmp_path, files):
    work = open_workspace(tmp_path, "corpus", "shards", config(files))
    with only_process(work.tmp, "lock"), pytest.raises(EnvironmentProblem, match="lock"):
        stage.run(config(files), {}, work)


def die(folder, settings_, at, workers):
    """A process of its own that is gone (no handler, no cleaning up) at the at-th renaming."""
    code = (
        "import os, sys, json\nfrom pathlib import Path\nfrom corpus_toys import make, CorpusConfig\n"
        "def main():\n"
        "    left, real = [int(sys.argv[3])], os.replace\n"
        "    def replace(*args):\n"
        "        left[0] -= 1\n"
        "        if left[0] == 0: os.killpg(0, 9)\n"
        "        real(*args)\n"
        "    os.replace = replace\n"
        "    make(Path(sys.argv[1]), CorpusConfig.model_validate(json.loads(sys.argv[2])))\n"
        "if __name__ == '__main__': main()\n"
    )
    script = folder.parent / "die.py"
    script.write_text(code)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    return subprocess.run(
        [sys.executable, script, str(folder), json.dumps(settings_.plain() | {"workers": workers}), str(at)], env=env, stderr=subprocess.DEVNULL, start_new_session=True, check=False,
    ).returncode


@pytest.mark.parametrize("at", [5, 40])
def test_sigkill(tmp_path, files, at):
    """The real thing: no handler runs, half-written files stay where they are."""
    settings_ = config(files)
    expected = contents(make(tmp_path / "whole", settings_).path)
    assert die(tmp_path / "again", settings_, at, 1) == -9
    assert at != 5 or list((tmp_path / "again").rglob("*.tmp"))
    assert contents(make(tmp_path / "again", settings_).path) == expected


def bad_file(path, good, bad):
    lines = [json.dumps({"text": text(i)}).encode() for i in range(good)]
    for i in range(bad):
        lines.insert(i * 3 + 1, [b'{"text": "open', b'{"text": "\xff"}', b'{"text": ""}', b'{"body": "x"}'][i % 4])
    path.write_bytes(b"\n".join(lines) + b"\n")
    return {"bad": {"kind": "jsonl", "path": str(path), "domain": "web"}}


def test_bad_lines_are_quarantined_below_the_ratio(tmp_path):
    settings_ = config(bad_file(tmp_path / "a.jsonl", 396, 4))
    artifact = make(tmp_path / "runs", settings_)
    records = [json.loads(line) for line in artifact.file("quarantine/bad.jsonl").read_text().splitlines()]
    raw = (tmp_path / "a.jsonl").read_bytes()
    assert [record["reason"].split(":")[0].split(" at")[0] for record in records] == ["invalid JSON", "invalid UTF-8", "empty document", "field 'text' is missing"]
    for record in records:
        line = raw[record["offset"] :].split(b"\n")[0]
        assert raw[record["offset"] - 1 : record["offset"]] in (b"", b"\n")
        assert record["excerpt"] in ("", line.decode("utf-8", errors="replace"))
    assert artifact.manifest.summary["quarantined"] == {"bad": 4}
    assert ShardSet.open(artifact).sources["bad"].quarantined == 4


def test_above_the_ratio_the_stage_fails_after_writing_the_quarantine(tmp_path, files):
    earlier = make(tmp_path / "runs", config(files), "earlier")
    before = contents(earlier.path)
    settings_ = config(bad_file(tmp_path / "a.jsonl", 100, 4))
    with pytest.raises(DataError, match=r"3\.85%") as error:
        make(tmp_path / "runs", settings_)
    assert "max_bad_ratio" in error.value.fix
    assert "byte" in error.value.found
    quarantine = next((tmp_path / "runs").glob("corpus-*.partial/quarantine/bad.jsonl"))
    assert str(quarantine) in error.value.fix
    assert len(quarantine.read_text().splitlines()) == 4
    assert contents(earlier.path) == before
    open_artifact(earlier.path, "shards", "full")
    # Mended input: the same command goes through, and nothing of the failure is left.
    bad_file(tmp_path / "a.jsonl", 100, 0)
    artifact = make(tmp_path / "runs", settings_)
    assert not (artifact.path / "quarantine" / "bad.jsonl").exists()


def test_repeated_ids_are_bad(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text(i), "key": i % 150} for i in range(151)])
    artifact = make(tmp_path / "runs", config({"a": {"kind": "jsonl", "path": str(path), "domain": "web", "id_field": "key"}}))
    assert "used before" in artifact.file("quarantine/a.jsonl").read_text()


def test_nothing_left(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "short"}] * 3)
    with pytest.raises(DataError, match="3 short") as error:
        make(tmp_path / "runs", config({"a": {"kind": "jsonl", "path": str(path), "domain": "web"}}))
    assert "min_chars" in error.value.fix


@pytest.mark.parametrize("victim", ["spool", "000000.bin", "rows", "sources.json"])
def test_a_full_disk(tmp_path, files, monkeypatch, victim):
    earlier = make(tmp_path / "runs", config(files), "earlier")
    before = contents(earlier.path)
    real = builtins.open

    class Full:
        def __init__(self, stream):
            self.stream = stream

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

        def __getattr__(self, name):
            return getattr(self.stream, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.stream.close()

    def opened(path, mode="r", *args, **kwargs):
        stream = real(path, mode, *args, **kwargs)
        return Full(stream) if victim in str(path) and "w" in mode else stream

    monkeypatch.setattr(builtins, "open", opened)
    with pytest.raises(EnvironmentProblem, match="disk is full") as error:
        make(tmp_path / "runs", config(files))
    assert "complete artifacts are kept" in error.value.fix
    monkeypatch.undo()
    assert contents(earlier.path) == before
    assert contents(make(tmp_path / "runs", config(files)).path) == before


def test_a_single_line_of_many_megabytes(tmp_path):
    """The 100 MB case at a tenth of its size; linear time is tested on the tokenizer."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "word " * 500_000}) + "\n" + json.dumps({"text": "x" * 8_000_000}) + "\n" + json.dumps({"text": text(1)}) + "\n")
    began = time.process_time()
    shards = ShardSet.open(make(tmp_path / "runs", config({"a": {"kind": "jsonl", "path": str(path), "domain": "web"}}, splits={"probe": 0, "test": 0})))
    assert time.process_time() - began < 60
    assert len(shards.split("a")) == 3
    assert shards.split("a").n_bytes > 10_000_000


def test_duplicates_and_contaminated_documents_go(tmp_path):
    item = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    (tmp_path / "eval.txt").write_text(item)
    records = [{"text": text(i)} for i in range(30)] + [{"text": text(3)}, {"text": f"{text(99)} {item}"}, {"text": "tiny"}]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    settings_ = config({"a": {"kind": "jsonl", "path": str(path), "domain": "web"}}, decontaminate={"against": [str(tmp_path / "eval.txt")]})
    record = ShardSet.open(make(tmp_path / "runs", settings_)).sources["a"]
    assert record.dropped == {"contaminated": 1, "duplicate": 1, "short": 1}
    assert record.origin["contaminated"] == [{"id": f"a.jsonl:{line_offsets(path)[31]}", "item": "eval.txt:1"}]
    assert sum(split.documents for split in record.splits.values()) == 30


def test_max_bytes_begin_and_end_tokens(tmp_path, files):
    files["news"]["max_bytes"] = "10 kB"
    shards = ShardSet.open(make(tmp_path / "runs", config(files, prepend_bos=True, append_eos=False)))
    total = sum(shards.split("news", split).n_bytes for split in ("train", "probe", "test"))
    assert 10_000 <= total < 10_600
    tokens = shards.split("news").tokens(0)
    assert tokens[0] == shards.tokenizer.bos_id
    assert tokens[-1] != shards.tokenizer.eos_id


def test_a_later_step_uses_the_tokenizer_of_an_earlier_one(tmp_path, files):
    first = make(tmp_path / "runs", config({"news": files["news"]}), "corpus")
    settings_ = config({"talks": files["talks"]}, inputs={"tokenizer": "corpus"}, tokenizer={"vocab_size": 999})
    second = make(tmp_path / "runs", settings_, "sft", {"tokenizer": first})
    one, two = ShardSet.open(first), ShardSet.open(second)
    assert one.tokenizer.sha256 == two.tokenizer.sha256
    assert two.tokenizer.vocab_size == 400


def test_an_unknown_embedded_corpus(tmp_path):
    with pytest.raises(ConfigError, match="code_stdlib"):
        make(tmp_path / "runs", config({"x": {"kind": "embedded"}}))


@pytest.mark.parametrize("required", [False, True])
def test_a_missing_package_drops_its_corpus_loudly(tmp_path, files, monkeypatch, required):
    monkeypatch.setenv("MEGATRON_R1_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("MEGATRON_R1_OFFLINE", "1")
    sources = {"math_champ": {"kind": "embedded", "required": required}, **files}
    if required:
        with pytest.raises(EnvironmentProblem, match="champ-dataset"):
            make(tmp_path / "runs", config(sources))
        return
    said = []
    monkeypatch.setattr(planning.log, "warning", lambda message, *args: said.append(message % args))
    shards = ShardSet.open(make(tmp_path / "runs", config(sources, decontaminate={})))
    assert list(shards.sources) == ["news", "talks"]
    assert [entry["name"] for entry in shards.missing] == ["human_eval", "math_champ"]
    assert all("MEGATRON_R1_OFFLINE" in entry["reason"] for entry in shards.missing)
    assert any("MISSING math_champ" in line for line in said)


def test_nothing_can_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGATRON_R1_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("MEGATRON_R1_OFFLINE", "1")
    with pytest.raises(DataError, match="none of math_champ"):
        make(tmp_path / "runs", config({"math_champ": {"kind": "embedded"}}))


def test_settings():
    plain = config({"a": {"kind": "embedded", "corpus": "web_wiki"}})
    assert "byte-level BPE of 400 ids" in describe(plain)
    assert CorpusConfig.model_validate(plain.plain()) == plain
    for wrong, said in (
        ({"sources": {}}, "sources"), ({"sources": {"a/b": {"kind": "embedded"}}}, "folder names"), ({"tokenizer": {"kind": "huggingface"}}, "path"),
        ({"tokenizer": {"kind": "train_bpe", "path": "x"}}, "no path"), ({"splits": {"probe": 0.49, "test": 0.49}}, "training"), ({"max_bad_ratios": 1}, "max_bad_ratios"),
    ):
        with pytest.raises(ValueError) as error:
            CorpusConfig.model_validate({"sources": {"a": {"kind": "embedded"}}} | wrong)
        assert said in str(error.value)


@given(st.lists(st.binary(max_size=40), max_size=12))
@settings(max_examples=25, deadline=None)
def test_any_bytes_are_either_documents_or_quarantined(tmp_path_factory, lines):
    folder = tmp_path_factory.mktemp("fuzz")
    path = folder / "a.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n" + json.dumps({"text": text(0)}).encode() + b"\n")
    settings_ = config({"a": {"kind": "jsonl", "path": str(path), "domain": "web", "min_chars": 0}}, max_bad_ratio=1.0, tokenizer={"vocab_size": 270}, splits={"probe": 0, "test": 0})
    artifact = make(folder / "runs", settings_)
    quarantined = artifact.manifest.summary["quarantined"].get("a", 0)
    filled = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    record = ShardSet.open(artifact).sources["a"]
    assert record.splits["train"].documents + quarantined + record.dropped.get("duplicate", 0) == len(filled)
    shutil.rmtree(folder)


def test_lengths_and_types(tmp_path, files):
    shard = ShardSet.open(make(tmp_path / "runs", config(files))).split("news")
    assert shard.tokens(0).dtype == np.uint16
    assert shard.lengths.dtype == np.int32
