"""Input elsewhere: through fsspec's memory store always, through HTTP and S3 when their packages are installed."""

import gzip
import http.server
import json
import sys
import threading

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_r1.corpus.config import SourceConfig
from megatron_r1.corpus.files import describe, find_files, sha256
from megatron_r1.corpus.partitions import plan_partitions
from megatron_r1.corpus.readers import read, read_partition
from megatron_r1.utils.errors import DataError, EnvironmentProblem


def source(path, kind="jsonl"):
    return SourceConfig(kind=kind, path=path, domain="web")


def lines(*texts):
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def texts(path, target=1 << 30, kind="jsonl"):
    files = find_files("s", source(path, kind))
    plan = plan_partitions("s", source(path, kind), files, target)
    return [made.text for partition in plan for made, _, _ in read_partition(source(path, kind), partition, files)]


@pytest.fixture
def memory():
    store = fsspec.filesystem("memory")
    store.store.clear()
    yield store
    store.store.clear()


def fill(store, root):
    """The same few files in any store."""
    store.pipe(f"{root}/data/a.jsonl", lines(*(f"text {i}" for i in range(50))))
    store.pipe(f"{root}/data/sub/b.jsonl.gz", gzip.compress(lines("zipped")))
    store.pipe(f"{root}/data/notes.csv", b"no")
    with store.open(f"{root}/data/c.parquet", "wb") as out:
        pq.write_table(pa.table({"text": [f"row {i}" for i in range(30)]}), out, row_group_size=10)


WANTED = [*(f"text {i}" for i in range(50)), "zipped"]


def check(root):
    """Folder, pattern, one file, partitions, resuming, Parquet."""
    assert texts(f"{root}/data") == WANTED
    assert texts(f"{root}/data/**/*.jsonl.gz") == ["zipped"]
    assert texts(f"{root}/data/a.jsonl", 100) == WANTED[:50]
    assert texts(f"{root}/data/c.parquet", 100, "parquet") == [f"row {i}" for i in range(30)]
    files = find_files("s", source(f"{root}/data"))
    assert [file.name for file in files] == ["a.jsonl", "sub/b.jsonl.gz"]
    (partition,) = plan_partitions("s", source(root), files[:1], 1 << 30)
    items = list(read_partition(source(root), partition, files))
    assert list(read_partition(source(root), partition, files, items[20][2])) == items[21:]
    assert sha256(files[1]) == sha256(describe([files[1].path])[0])
    with pytest.raises(DataError, match="none"):
        find_files("s", source(f"{root}/data/*.nothing"))


def test_memory(memory):
    fill(memory, "/bucket")
    check("memory://bucket")


def test_a_file_that_changes_or_goes(memory):
    memory.pipe("/a.jsonl", lines("one", "two"))
    files = describe(["memory://a.jsonl"])
    items = read("s", source("x"), files)
    next(items)
    memory.pipe("/a.jsonl", lines("one", "too"))
    with pytest.raises(DataError, match="changed since"):
        list(items)
    memory.rm("/a.jsonl")
    with pytest.raises(DataError, match="no such file"):
        list(read("s", source("x"), files))
    with pytest.raises(DataError, match=r"none|no such file"):
        find_files("s", source("memory://a.jsonl"))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("failures", [2, 100])
def test_a_connection_that_breaks_is_not_damage(memory, monkeypatch, kind, failures):
    """It is tried again, and if that does not help it must not end in the quarantine: the next run reads on."""
    monkeypatch.setattr("megatron_r1.corpus.files.WAITS", (0.0, 0.0, 0.0))
    fill(memory, "")
    files = describe([f"memory://data/{'a.jsonl' if kind == 'jsonl' else 'c.parquet'}"])
    from fsspec.implementations.memory import MemoryFile

    inner, left = MemoryFile.read, [failures]

    def read_(self, size=-1):
        left[0] -= 1
        if left[0] < 0:
            return inner(self, size)
        inner(self, 3)
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(MemoryFile, "read", read_)
    if failures < 3:
        assert len([made for made, _ in read("s", source("x", kind), files)]) == (50 if kind == "jsonl" else 30)
        return
    with pytest.raises(EnvironmentProblem, match="Connection reset") as error:
        list(read("s", source("x", kind), files))
    assert "network" in error.value.fix


@pytest.mark.parametrize(("path", "package"), [("s3://bucket/a.jsonl", "s3fs"), ("https://example.org/a.jsonl", "aiohttp"), ("gs://bucket/a.jsonl", "gcsfs"), ("nosuch://a/b.jsonl", "nosuch")])
def test_a_store_without_its_package(path, package, monkeypatch):
    for name in [package, *(name for name in sys.modules if name.startswith(("s3fs", "fsspec.implementations.http")))]:
        monkeypatch.setitem(sys.modules, name, None)
    from fsspec.registry import _registry

    monkeypatch.delitem(_registry, path.split(":")[0], raising=False)
    with pytest.raises(EnvironmentProblem) as error:
        find_files("s", source(path))
    assert (package in str(error.value), path in error.value.expected) == (True, True)


def test_http(tmp_path):
    pytest.importorskip("aiohttp", reason="optional: pip install aiohttp")
    (tmp_path / "a.jsonl").write_bytes(lines("one", "two"))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines("zipped")))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *_args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{server.server_port}"
        assert texts(f"{root}/a.jsonl") == ["one", "two"]
        assert texts(f"{root}/b.jsonl.gz?download=true") == ["zipped"]
        with pytest.raises(DataError, match=r"none|no such file"):
            find_files("s", source(f"{root}/absent.jsonl"))
        server.shutdown()
    with pytest.raises(EnvironmentProblem, match="network"):
        find_files("s", source(f"{root}/a.jsonl"))


@pytest.fixture
def s3(monkeypatch):
    pytest.importorskip("s3fs", reason="optional: pip install s3fs")
    server = pytest.importorskip("moto.server", reason="optional: pip install moto[server]").ThreadedMotoServer(port=0)
    import s3fs

    server.start()
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    s3fs.S3FileSystem.clear_instance_cache()
    store = s3fs.S3FileSystem()
    store.mkdir("bucket")
    yield store
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_s3(s3, monkeypatch):
    fill(s3, "bucket")
    check("s3://bucket")
    files = find_files("s", source("s3://bucket/data/a.jsonl"))
    s3.pipe("bucket/data/a.jsonl", lines(*(f"tExt {i}" for i in range(50))))
    with pytest.raises(DataError, match="changed since"):
        list(read("s", source("x"), files))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    s3.clear_instance_cache()
    with pytest.raises(EnvironmentProblem, match="credentials") as error:
        find_files("s", source("s3://bucket/data/a.jsonl"))
    assert "AWS_PROFILE" in error.value.fix
