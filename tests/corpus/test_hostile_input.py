"""Hostile input: every case is a document, a recorded piece of bad input, or an error that says what to do. Nothing is lost, nothing hangs."""

import bz2
import gzip
import json
import lzma
import os
import sys
import threading
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from corpus_toys import config, make, text
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.corpus import fields, files, streams
from megatron_r1.corpus.config import SourceConfig
from megatron_r1.corpus.files import describe, find_files
from megatron_r1.corpus.items import Bad
from megatron_r1.corpus.partitions import plan_partitions
from megatron_r1.corpus.readers import read, read_partition
from megatron_r1.data.shards import ShardSet
from megatron_r1.utils.errors import DataError, EnvironmentProblem

ZSTD = zstandard.ZstdCompressor(write_checksum=True).compress
COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": ZSTD}


def source(kind="jsonl", **more):
    return SourceConfig.model_validate({"kind": kind, "path": "x", "domain": "web", **more})


def collect(settings_, *paths):
    made = [item for item, _ in read("s", settings_, describe(paths))]
    return [item for item in made if not isinstance(item, Bad)], [item for item in made if isinstance(item, Bad)]


def line(text):
    return json.dumps({"text": text}).encode() + b"\n"


def test_texts_of_every_kind(tmp_path):
    path = tmp_path / "a.jsonl"
    big = "x" * 10_000_000
    path.write_bytes(
        b"\xef\xbb\xbf" + line("after a mark")[:-1] + b"\r\n" + line("NUL \0 inside") + b"\0\0\0\n" + line("\ud83d lone") + line(big) + line("") + line(" \t ") + b'{"text": "no newline"}'
    )
    good, bad = collect(source(), path)
    assert [document.text for document in good] == ["after a mark", "NUL \0 inside", "? lone", big, "no newline"]
    assert [document.offset for document in good][:2] == [0, 3 + len(line("after a mark")) + 1]
    assert ["invalid JSON" in bad[0].reason, bad[1].reason, bad[2].reason] == [True, "empty document", "empty document"]
    raw = path.read_bytes()
    assert [raw[entry.offset :].startswith(start) for entry, start in zip(bad, (b"\0\0\0\n", b'{"text": ""}', b'{"text": " '), strict=True)] == [True] * 3


@pytest.mark.parametrize("document", ["paragraph", "line", "file"])
def test_windows_text(tmp_path, document):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo")
    good, bad = collect(source("text", document=document), path)
    assert ([entry.text for entry in good], bad) == (["one\r\n\r\ntwo"] if document == "file" else ["one", "two"], [])
    assert good[-1].offset == (0 if document == "file" else 10)


@pytest.mark.parametrize("levels", [10, fields.DEPTH - 1, fields.DEPTH, 2000, 1_000_000])
@pytest.mark.parametrize("shape", ["list", "object"])
def test_nested_json(tmp_path, levels, shape):
    inner = b"[" * levels + b"]" * levels if shape == "list" else b'{"a":' * levels + b"1" + b"}" * levels
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "t", "n": ' + inner + b"}\n" + line("next"))
    good, bad = collect(source(), path)
    assert [document.text for document in good] == (["t", "next"] if levels < fields.DEPTH else ["next"])
    assert ["nested deeper" in entry.reason for entry in bad] == [True] * (levels >= fields.DEPTH)


def test_what_is_nested_does_not_hang_on_who_asks(tmp_path):
    """The parser's own limit is what is left of Python's stack; ours is not."""
    text = b'{"text": "t", "n": ' + b"[" * 250 + b"]" * 250 + b"}"
    braces = json.dumps({"text": "{" * 5000}).encode()

    def deep(levels):
        return deep(levels - 1) if levels else (fields.parse(text, 0), fields.parse(braces, 0))

    assert deep(0) == deep(300)
    assert isinstance(deep(0)[1], dict)


def test_numbers(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a", "id": NaN}\n{"text": "b", "id": 123456789012345678901234567890}\n{"text": "c", "id": ' + b"1" * 10000 + b"}\n" + b'{"text": "d", "id": -0}\n')
    good, bad = collect(source(id_field="id"), path)
    assert [document.id for document in good] == ["nan", "123456789012345678901234567890", "0"]
    assert "4300 digits" in bad[0].reason


def test_a_line_of_100_mb_is_read_in_linear_time_and_a_few_times_its_size(tmp_path):
    """Quadratic reading would take minutes here; the partitions that begin inside the line do not read it."""
    path = tmp_path / "a.jsonl"
    size = 100 << 20
    with open(path, "wb") as out:
        out.write(b'{"text": "')
        for _ in range(size >> 20):
            out.write(b"word word. " * ((1 << 20) // 11))
        out.write(b'"}\n' + line("next"))
    described = describe([path])
    plan = plan_partitions("s", source(), described, 1 << 20)
    read_bytes = 0

    class Counted(files.Stored):
        def read(self, size=-1):
            nonlocal read_bytes
            block = super().read(size)
            read_bytes += len(block)
            return block

    tracemalloc.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_r1.corpus.readers.Stored", Counted)
        made = [item for partition in plan for item, _, _ in read_partition(source(), partition, described)]
        peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [len(item.text) for item in made] == [((1 << 20) // 11) * 11 * 100, 4]
    assert read_bytes < 3 * path.stat().st_size
    assert peak < 5 * path.stat().st_size


@pytest.mark.parametrize("suffix", list(COMPRESS))
def test_members_padding_and_content_that_swells(tmp_path, suffix):
    path, compress = tmp_path / f"a.jsonl{suffix}", COMPRESS[suffix]
    parts = [line("one") + b'{"text": "t', b"wo", b'"}\n', b"", line("y" * 30_000_000)]
    path.write_bytes(b"".join(map(compress, parts)) + b"\0" * (512 if suffix != ".xz" else 4))
    good, bad = collect(source(), path)
    assert ([len(document.text) for document in good], bad) == ([3, 3, 30_000_000], [])
    with files.Stored(describe([path])[0]) as stream:
        # A block stays a block, however much comes out of few bytes (zstd: of 8 KiB).
        assert max(map(len, streams.blocks(stream, suffix))) <= (1 << 20 if suffix != ".zst" else 256 << 20)


@pytest.mark.parametrize("suffix", list(COMPRESS))
@pytest.mark.parametrize("harm", ["cut", "flipped", "behind", "not at all", "empty"])
def test_damaged_compression(tmp_path, suffix, harm):
    """What is whole is read, the damage is one entry, and the next file is read."""
    texts = [os.urandom(300).hex() for _ in range(2000)]
    data = COMPRESS[suffix](b"".join(map(line, texts)))
    half = len(data) // 2
    data = {
        "cut": data[:half], "flipped": data[:half] + bytes([data[half] ^ 255, data[half + 1] ^ 255]) + data[half + 2 :], "behind": data + b"something else entirely", "not at all": b"no such thing" * 9, "empty": b"",
    }[harm]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(data)
    (tmp_path / "b.jsonl").write_bytes(line("the rest"))
    good, bad = collect(source(), tmp_path / f"a.jsonl{suffix}", tmp_path / "b.jsonl")
    assert good[-1].text == "the rest"
    damage = bad[-1]
    assert "what follows is lost" in damage.reason
    assert {"cut": "cut off", "empty": "the file is empty"}.get(harm, "damaged") in damage.reason
    # flipped: gzip and zstd have one checksum, at the end; what is read until then may be anything.
    if suffix in (".bz2", ".xz") or harm != "flipped":
        whole = [document.text for document in good[:-1]]
        assert whole == texts[: len(whole)]
        assert damage.offset == sum(len(line(text)) for text in whole)
        assert len(bad) == 1
    if harm == "cut" and suffix in (".gz", ".zst"):  # bz2 and xz have large blocks
        assert len(good) > 500
    if harm == "behind":
        assert len(good) == len(texts) + 1


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.sampled_from(["", *COMPRESS]), st.sampled_from(["jsonl", "text", "parquet"]), st.sampled_from(["file", "line", "paragraph"]))
def test_garbage_is_bad_input(tmp_path_factory, data, suffix, kind, document):
    path = tmp_path_factory.mktemp("g") / f"a{suffix}"
    path.write_bytes(data)
    good, bad = collect(source(kind, document=document), path)
    assert all(entry.reason and 0 <= entry.offset <= len(data) + 1 for entry in bad)
    if kind == "parquet":
        assert (good, len(bad)) == ([], 1)


def test_no_file_fits(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    for path in (tmp_path, tmp_path / "*.jsonl", tmp_path / "**" / "*.jsonl", tmp_path / "absent.jsonl"):
        with pytest.raises(DataError, match="none") as error:
            find_files("s", source(path=str(path)))
        assert "sources.s.path" in error.value.fix


def test_links_in_circles(tmp_path):
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "data" / "sub" / "a.jsonl").write_bytes(line("x"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.jsonl").write_bytes(line("y"))
    for i in range(3):
        (tmp_path / "data" / "sub" / f"loop{i}").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "broken.jsonl").symlink_to(tmp_path / "nowhere")
    for pattern in (tmp_path / "data", tmp_path / "data" / "**" / "*.jsonl", tmp_path / "d*" / "**" / "*.jsonl"):
        assert sorted(file.name for file in find_files("s", source(path=str(pattern)))) == ["link/b.jsonl", "sub/a.jsonl"]


@pytest.mark.parametrize("pattern", ["**/*.jsonl", "a/**/*.jsonl", "a/**", "*/*.jsonl", "a/*.json*", "**"])
def test_patterns_find_what_glob_finds(tmp_path, monkeypatch, pattern):
    import glob

    for name in ("x.jsonl", "a/y.jsonl", "a/b/z.jsonl", "a/b/c.txt", ".hidden/q.jsonl", "a/w.jsonl.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(line("x"))
    monkeypatch.chdir(tmp_path)
    for root in ("", f"{tmp_path}/"):
        found = {file.path for file in find_files("s", source(path=root + pattern))}
        assert found == {path for path in glob.glob(root + pattern, recursive=True) if os.path.isfile(path)}


def test_unreadable_files(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(line("x"))
    described = describe([path])

    def refuse(*_args):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(files.io, "FileIO", refuse)
    with pytest.raises(EnvironmentProblem, match=r"a\.jsonl") as error:
        list(read("s", source(), described))
    assert "permissions" in error.value.fix
    monkeypatch.undo()
    path.unlink()
    with pytest.raises(DataError, match="no such file"):
        list(read("s", source(), described))
    with pytest.raises(DataError, match="no such file"):
        describe([path])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_folders_without_permission(tmp_path):
    (tmp_path / "a").mkdir(mode=0)
    with pytest.raises(EnvironmentProblem, match="permissions"):
        find_files("s", source(path=str(tmp_path)))


@pytest.mark.parametrize("how", ["appended", "rewritten", "shortened"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_files_that_change_while_they_are_read(tmp_path, how, kind):
    path = tmp_path / "a"
    if kind == "jsonl":
        path.write_bytes(b"".join(line(f"text {i}") for i in range(100)))
    else:
        pq.write_table(pa.table({"text": [f"text {i}" for i in range(100)]}), path, row_group_size=10)
    described = describe([path])
    items = read("s", source(kind), described)
    next(items)
    data = path.read_bytes()
    path.write_bytes({"appended": data + b"\n", "rewritten": data, "shortened": data[:-50]}[how])
    os.utime(path, ns=(1, int(described[0].stamp) + 1))
    with pytest.raises(DataError, match="changed since") as error:
        list(items)
    assert str(path) in str(error.value)
    with pytest.raises(DataError, match="changed since"):
        next(read("s", source(kind), described))


def parquet(path, columns, **more):
    pq.write_table(pa.table(columns), path, **more)
    return path


def test_parquet_columns_of_every_kind(tmp_path):
    words = ["one", None, "three"]
    kinds = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.binary(), pa.large_binary(), pa.string_view()]
    for i, kind in enumerate(kinds):
        array = pa.array(words).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array([None if word is None else word.encode() for word in words] if "binary" in str(kind) else words, kind)
        good, bad = collect(source("parquet"), parquet(tmp_path / f"{i}.parquet", {"text": array}))
        assert ([document.text for document in good], [entry.offset for entry in bad]) == (["one", "three"], [1]), kind
    good, bad = collect(source("parquet"), parquet(tmp_path / "b.parquet", {"text": pa.array([b"ok", b"\xff", b"too"], pa.binary())}))
    assert ([document.text for document in good], [(entry.offset, "invalid UTF-8" in entry.reason) for entry in bad]) == (["ok", "too"], [(1, True)])
    nested = parquet(tmp_path / "n.parquet", {"meta": [{"title": "T", "tags": ["x"]}, None], "body": ["B", "C"]})
    good, bad = collect(source("parquet", template="{meta[title]} {meta[tags][0]} {body}"), nested)
    assert ([document.text for document in good], bad[0].reason) == (["T x B"], "field 'meta' is missing")


@pytest.mark.parametrize(("columns", "said"), [({"text": [1, 2]}, "int64"), ({"body": ["a"]}, "columns body"), ({"text": [["a"]]}, "list")])
def test_parquet_columns_that_are_no_text(tmp_path, columns, said):
    with pytest.raises(DataError, match=said) as error:
        collect(source("parquet"), parquet(tmp_path / "a.parquet", columns))
    assert ("a.parquet" in error.value.expected, "sources.s" in error.value.fix) == (True, True)


def test_damaged_parquet(tmp_path):
    """A footer cut off loses the file, a damaged page the rest of its row group; all else is read."""
    texts = [os.urandom(50).hex() for _ in range(4000)]
    path = parquet(tmp_path / "a.parquet", {"text": texts}, row_group_size=1000, write_page_checksum=True, compression="zstd", use_dictionary=False, data_page_size=10_000, write_batch_size=50)
    data = bytearray(path.read_bytes())
    for cut in (4, 9, 500, len(data) - 4):
        (tmp_path / "cut.parquet").write_bytes(data[:-cut])
        good, bad = collect(source("parquet"), tmp_path / "cut.parquet")
        assert (good, len(bad), "not a whole Parquet file" in bad[0].reason) == ([], 1, True)
    data[pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset + 30_000] ^= 255
    path.write_bytes(data)
    good, bad = collect(source("parquet"), path)
    lost = range(bad[0].offset, 2000)
    assert [(document.offset, document.text) for document in good] == [(row, text) for row, text in enumerate(texts) if row not in lost]
    assert (len(bad), bad[0].reason.endswith(f"rows {lost.start} to 1999 are lost"), 1000 <= lost.start < 1900) == (1, True, True)


@pytest.mark.parametrize("dictionary", [True, False])
def test_large_rows_are_decoded_few_at_a_time(tmp_path, dictionary):
    """Also when a dictionary stores a row of 4 MB in a few bits. (A page is the least that can be decoded; some writers put a thousand rows into one.)"""
    path = parquet(tmp_path / "a.parquet", {"text": ["x" * 4_000_000] * 60 if dictionary else [f"{i:07}" * 600_000 for i in range(60)]}, use_dictionary=dictionary, write_batch_size=1)
    before, highest = pa.total_allocated_bytes(), 0
    for _ in read("s", source("parquet"), describe([path])):
        highest = max(highest, pa.total_allocated_bytes() - before)
    assert highest < 130_000_000


def test_ids_by_content(tmp_path):
    for name, texts in (("a", ["one two", "three"]), ("b", ["three", "one  two"])):
        (tmp_path / f"{name}.jsonl").write_bytes(b"".join(map(line, texts)))
    first, second = (collect(source(ids="content"), tmp_path / f"{name}.jsonl")[0] for name in "ab")
    assert [document.id for document in first] == [document.id for document in reversed(second)]
    assert len({document.id for document in first}) == 2
    for wrong in ({"id_field": "id"}, {"deduplicate": False}):
        with pytest.raises(ValueError, match=r"expected .* found"):
            source(ids="content", **wrong)
    with pytest.raises(ValueError, match="no fields"):
        source("text", id_field="x")


def test_one_file_twice(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(line("x"))
    with pytest.raises(DataError, match=r"a\.jsonl more than once"):
        describe([path, path])


def test_a_reader_that_is_left_early_closes_its_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(line("x") * 10)
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    items = read("s", source(), describe([path]))
    next(items)
    items.close()
    assert not before or len(os.listdir("/proc/self/fd")) == before


def test_a_pipe_is_no_file(tmp_path):
    """Opening one would wait for a writer for ever."""
    os.mkfifo(tmp_path / "a.jsonl")
    done = []

    def ask():
        with pytest.raises(DataError):
            find_files("s", source(path=str(tmp_path / "a.jsonl")))
        with pytest.raises(DataError):
            describe([tmp_path / "a.jsonl"])
        done.append(True)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(10)
    assert done


def test_the_whole_stage_on_a_file_cut_off(tmp_path):
    """What is whole is in the shards, the damage is in the quarantine and counts as bad input."""
    records = b"".join(line(text(i)) for i in range(200))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl.zst").write_bytes(ZSTD(records))
    packed = gzip.compress(b"".join(line(text(i)) for i in range(200, 400)))
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    parquet(tmp_path / "c.parquet", {"text": [text(i) for i in range(400, 500)]}, row_group_size=30)
    sources = {"cut": {"kind": "jsonl", "path": str(tmp_path / "in"), "domain": "web"}, "rows": {"kind": "parquet", "path": str(tmp_path / "c.parquet"), "domain": "web"}}
    artifact = make(tmp_path / "runs", config(sources, max_bad_ratio=0.5))
    (damage,) = map(json.loads, artifact.file("quarantine/cut.jsonl").read_text().splitlines())
    assert (damage["file"], "cut off" in damage["reason"]) == ("b.jsonl.gz", True)
    shards = ShardSet.open(artifact)
    kept = sum(shards.split("cut", split).record.documents for split in ("train", "probe", "test"))
    assert 220 < kept < 400
    assert damage["offset"] == sum(len(line(text(i))) for i in range(200, kept))
    assert sum(shards.split("rows", split).record.documents for split in ("train", "probe", "test")) == 100
