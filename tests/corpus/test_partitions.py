"""Any cut of any input into partitions reads what the whole file reads, and any resume point leaves exactly the rest."""

import bz2
import gzip
import json
import lzma
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.corpus.config import SourceConfig
from megatron_r1.corpus.files import describe
from megatron_r1.corpus.partitions import Partition, plan_partitions
from megatron_r1.corpus.readers import read_partition

COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}
LINES = st.lists(
    st.one_of(
        st.text(max_size=8).map(lambda text: json.dumps({"text": text}).encode()), st.binary(max_size=6), st.sampled_from([b"", b" ", b"\r", b"word", b"two words", b"[1]", b"\xef\xbb\xbf"])
    ),
    max_size=12,
)
KINDS = [("jsonl", "file"), ("text", "file"), ("text", "paragraph"), ("text", "line")]


def source(kind, document="file"):
    return SourceConfig(kind=kind, path="x", domain="web", document=document)


def cuts_of(size, cuts):
    """The file cut at these shares of its size: any cut, also empty partitions."""
    places = [0, *sorted(round(share * size) for share in cuts), size]
    return [Partition(source="s", number=i, file="a", start=start, end=end) for i, (start, end) in enumerate(pairwise(places))]


def everything(settings_, partitions, files):
    return [item for partition in partitions for item in read_partition(settings_, partition, files)]


@pytest.mark.parametrize(("kind", "document"), [("jsonl", "file"), ("text", "paragraph"), ("text", "line")])
@settings(max_examples=100, deadline=None)
@given(LINES, st.booleans(), st.lists(st.floats(0, 1), max_size=4))
def test_partitions_tile_the_file(tmp_path_factory, kind, document, lines, newline, cuts):
    path = tmp_path_factory.mktemp("f") / "a"
    path.write_bytes(b"\n".join(lines) + b"\n" * newline)
    files = describe([path])
    whole = everything(source(kind, document), cuts_of(files[0].size, []), files)
    parts = everything(source(kind, document), cuts_of(files[0].size, cuts), files)
    assert [(made, position) for made, _, position in parts] == [(made, position) for made, _, position in whole]


@pytest.mark.parametrize("suffix", list(COMPRESS))
@pytest.mark.parametrize(("kind", "document"), KINDS)
@settings(max_examples=40, deadline=None)
@given(LINES, st.booleans(), st.lists(st.floats(0, 1), max_size=3), st.integers(0, 200))
def test_any_resume_point_leaves_exactly_the_rest(tmp_path_factory, kind, document, suffix, lines, newline, cuts, lost):
    path = tmp_path_factory.mktemp("f") / f"a{suffix}"
    data = COMPRESS[suffix](b"\n".join(lines) + b"\n" * newline)
    # Compressed files may have been cut off.
    path.write_bytes(data[: len(data) - lost * bool(suffix)] if lost < 100 else data)
    files, config = describe([path]), source(kind, document)
    plain = not suffix and (kind, document) != ("text", "file")
    for partition in cuts_of(files[0].size, cuts if plain else []):
        partition = partition.model_copy(update={"file": f"a{suffix}"})
        items = list(read_partition(config, partition, files))
        for i, (_, _, position) in enumerate(items):
            assert [(made, end) for made, _, end in read_partition(config, partition, files, position)] == [(made, end) for made, _, end in items[i + 1 :]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.none(), st.text(max_size=5)), max_size=30), st.integers(1, 9), st.lists(st.floats(0, 1), max_size=4))
def test_parquet(tmp_path_factory, texts, rows, cuts):
    path = tmp_path_factory.mktemp("f") / "a"
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path, row_group_size=rows)
    files, config = describe([path]), source("parquet")
    whole = everything(config, cuts_of(files[0].size, []), files)
    parts = []
    for partition in cuts_of(files[0].size, cuts):
        items = list(read_partition(config, partition, files))
        parts += items
        for i, (_, _, position) in enumerate(items):
            assert list(read_partition(config, partition, files, position)) == items[i + 1 :]
    assert parts == whole
    assert [getattr(made, "text", None) for made, _, _ in whole] == [None if not (text or "").strip() else text for text in texts]


def test_the_plan(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 1000)
    (tmp_path / "b.gz").write_bytes(b"x" * 1000)
    (tmp_path / "c").write_bytes(b"")
    files = describe([tmp_path / name for name in ("a", "b.gz", "c")])
    plan = plan_partitions("s", source("jsonl"), files, 300)
    assert [(p.file, p.start, p.end) for p in plan] == [("a", 0, 250), ("a", 250, 500), ("a", 500, 750), ("a", 750, 1000), ("b.gz", 0, 1000), ("c", 0, 0)]
    assert [p.number for p in plan] == list(range(6))
    assert [Partition.model_validate(p.plain()) for p in plan] == plan
    assert len(plan_partitions("s", source("text"), files, 300)) == 3
