"""WARC and WET: pages become their text, records keep their ids, and damage is one line of the quarantine."""

import gzip
import json
import sys

import pytest
from corpus_toys import config, make, text

from megatron_r1.corpus.config import SourceConfig
from megatron_r1.corpus.files import describe, find_files
from megatron_r1.corpus.items import Bad
from megatron_r1.corpus.partitions import plan_partitions
from megatron_r1.corpus.readers import read_partition
from megatron_r1.data.shards import ShardSet
from megatron_r1.utils.errors import EnvironmentProblem

SOURCE = SourceConfig(kind="warc", path="x", domain="web")
LONG = "The quick brown fox, so the story goes, jumped over a lazy dog that had been asleep since noon. "


def record(kind, identity, body, *more):
    lines = ["WARC/1.0", f"WARC-Type: {kind}", f"WARC-Record-ID: <urn:uuid:{identity}>", f"WARC-Target-URI: http://example.org/{identity}", f"Content-Length: {len(body)}", *more]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body + b"\r\n\r\n"


def answer(html, status="200 OK", kind="text/html; charset=utf-8", encode="utf-8", *more):
    head = "\r\n".join([f"HTTP/1.1 {status}", f"Content-Type: {kind}", *more]).encode()
    return head + b"\r\n\r\n" + (html if isinstance(html, bytes) else html.encode(encode))


def response(identity, *args):
    return record("response", identity, answer(*args), "Content-Type: application/http; msgtype=response")


def page(text):
    return f"<html><head><title>T</title><script>var x = 1;</script></head><body><nav><a href='/'>Home</a></nav><main><p>{text}</p></main></body></html>"


WARC = [
    record("warcinfo", "i", b"software: hand"), response("a", page(LONG + "Café.")), record("request", "q", b"GET / HTTP/1.1\r\n\r\n"),
    response("b", page(LONG + "Bücher."), "200 OK", "text/html; charset=iso-8859-1", "iso-8859-1"), response("c", page("gone"), "404 Not Found"),
    response("d", b"\x89PNG", "200 OK", "image/png"), response("e", "<html><body></body></html>"),
    response("f", gzip.compress(page(LONG).encode()), "200 OK", "text/html", "utf-8", "Content-Encoding: gzip"), response("g", "just text", "200 OK", "text/plain"),
]
WET = [record("warcinfo", "i", b"x"), record("conversion", "a", "Grüße\nan alle".encode()), record("conversion", "b", b"bad \xff"), record("conversion", "c", b"the last")]


def items(path, resume=None):
    files = describe([path])
    (partition,) = plan_partitions("s", SOURCE, files, 10)
    return list(read_partition(SOURCE, partition, files, resume))


@pytest.fixture
def libraries():
    pytest.importorskip("fastwarc", reason="optional: pip install fastwarc resiliparse")
    pytest.importorskip("resiliparse")


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_pages(tmp_path, suffix):
    import zstandard

    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    path = tmp_path / f"x.warc{suffix}"
    path.write_bytes(b"".join(compress(each) for each in WARC))
    made = [item for item, _, _ in items(path)]
    assert [(item.id, item.text.strip()) for item in made] == [("a", LONG + "Café."), ("b", LONG + "Bücher."), ("f", LONG.strip()), ("g", "just text")]
    assert [item.offset for item in made] == [sum(map(len, WARC[:i])) for i in (1, 3, 7, 8)]
    assert made[0].metadata == {"url": "http://example.org/a"}
    for i, (_, _, after) in enumerate(items(path)):
        assert items(path, after) == items(path)[i + 1 :]


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("whole", range(len(WET)))
@pytest.mark.parametrize("more", [1, 30, -1])
def test_what_is_whole_of_a_file_cut_off_is_read(tmp_path, whole, more):
    members = list(map(gzip.compress, WET))
    path = tmp_path / "x.warc.wet.gz"
    path.write_bytes(b"".join(members[:whole]) + members[whole][:more])
    made = items(path)
    # All but the checksum of the last one: its content is whole.
    read = WET[: whole + (more == -1)]
    assert [item.id for item, _, _ in made if not isinstance(item, Bad)] == [identity for identity, each in (("a", WET[1]), ("c", WET[3])) if each in read]
    assert "cut off" in made[-1][0].reason
    for i, (_, _, after) in enumerate(made):
        assert items(path, after) == made[i + 1 :]


@pytest.mark.usefixtures("libraries")
def test_something_else_behind_a_record(tmp_path):
    path = tmp_path / "x.wet"
    path.write_bytes(WET[1] + b"\0" * 1000 + WET[3])
    made = items(path)
    assert made[0][0].id == "a"
    assert "what follows is lost" in made[1][0].reason
    assert len(made) == 2
    assert [items(path, after) for _, _, after in made] == [made[1:], []]


@pytest.mark.usefixtures("libraries")
def test_a_page_nested_without_end_is_bad_not_slow(tmp_path):
    path = tmp_path / "x.warc"
    path.write_bytes(response("a", "<div>" * 200_000) + response("b", page(LONG + "<br>" * 5000)))
    (bad, _, _), (good, _, _) = items(path)
    assert "nested deeper" in bad.reason
    assert good.id == "b"


def test_without_the_libraries(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastwarc.warc", None)
    path = tmp_path / "x.wet"
    path.write_bytes(WET[1])
    with pytest.raises(EnvironmentProblem, match="pip install fastwarc resiliparse"):
        items(path)
    assert [file.name for file in find_files("s", SOURCE.model_copy(update={"path": str(tmp_path)}))] == ["x.wet"]


@pytest.mark.usefixtures("libraries")
def test_the_whole_stage_and_record_ids_that_repeat(tmp_path):
    (tmp_path / "in").mkdir()
    for name, first in (("a", 0), ("b", 39)):
        records = [record("conversion", f"id-{i}", (text(i) + name).encode()) for i in range(first, first + 40)]
        (tmp_path / "in" / f"{name}.warc.wet.gz").write_bytes(b"".join(map(gzip.compress, records)))
    artifact = make(tmp_path / "runs", config({"web": {"kind": "warc", "path": str(tmp_path / "in"), "domain": "web"}}, max_bad_ratio=0.1))
    shards = ShardSet.open(artifact)
    ids = [identity for split in ("train", "probe", "test") for identity in shards.split("web", split).ids]
    assert sorted(ids) == sorted(f"id-{i}" for i in range(79))
    (again,) = map(json.loads, artifact.file("quarantine/web.jsonl").read_text().splitlines())
    assert (again["file"], again["offset"], "'id-39' was used before" in again["reason"]) == ("b.warc.wet.gz", 0, True)
