"""The file format: what stock megatron.core reads, and what happens to damaged files."""

import zlib
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from data_toys import toy_shard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.data.indexed import (
    BLOCK,
    BlockSums,
    Index,
    IndexedWriter,
    IndexWriter,
    crc_path,
    read_index,
    token_dtype,
    write_index,
    write_sums,
)
from megatron_r1.data.shards import Shard, ShardWriter
from megatron_r1.utils.errors import DataError, EnvironmentProblem

LENGTHS = [5, 0, 1, 700, 3]


@pytest.mark.parametrize("vocab_size", [1000, 70000])
def test_stock_megatron_reads_it(tmp_path, vocab_size):
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    _, documents = toy_shard(tmp_path, LENGTHS, vocab_size)
    stock = indexed.IndexedDataset(str(tmp_path / "train"))
    assert len(stock) == len(documents)
    assert stock.sequence_lengths.tolist() == LENGTHS
    assert stock.document_indices.tolist() == list(range(len(LENGTHS) + 1))
    assert stock.index.dtype == indexed.DType.optimal_dtype(vocab_size)
    for i, tokens in enumerate(documents):
        assert stock[i].tolist() == tokens.tolist()


def test_we_read_what_stock_megatron_writes(tmp_path):
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    import torch

    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.uint16)
    for tokens in ([1, 2, 3], [4]):
        builder.add_item(torch.tensor(tokens))
        builder.end_document()
    builder.finalize(str(tmp_path / "a.idx"))
    lengths, dtype = read_index(tmp_path / "a.idx")
    assert (lengths.tolist(), dtype) == ([3, 1], np.uint16)


def test_round_trip_across_blocks(tmp_path):
    shard, documents = toy_shard(tmp_path, [BLOCK // 2 - 1, 5, BLOCK, 7])
    for i, tokens in enumerate(documents):
        assert shard.tokens(i).tolist() == tokens.tolist()
    shard.verify()
    assert list(shard.ids) == ["doc0", "doc1", "doc2", "doc3"]
    assert list(shard.groups) == ["group0", "group1", "group2", "group0"]
    assert shard.n_bytes == 3 * shard.n_tokens == int(shard.document_bytes.sum())


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".docs.parquet", ".mask"])
def test_a_flipped_bit_is_found(tmp_path, suffix):
    shard, _ = toy_shard(tmp_path, [400, 300], masks=True)
    flip(tmp_path / f"train{suffix}", -2)

    def read_all():
        again = Shard(shard.prefix, shard.record)
        return again.tokens(1), again.mask(1), again.ids[1]

    with pytest.raises(DataError, match="CRC-32") as error:
        read_all()
    assert f"train{suffix}" in error.value.expected
    assert "run the same command again" in error.value.fix


def test_a_flipped_bit_elsewhere_does_not_stop_readers_of_good_blocks(tmp_path):
    shard, documents = toy_shard(tmp_path, [BLOCK, BLOCK])
    flip(tmp_path / "train.bin", 3 * BLOCK)
    again = Shard(shard.prefix, shard.record)
    assert again.tokens(0).tolist() == documents[0].tolist()
    with pytest.raises(DataError, match=f"bytes {3 * BLOCK} to {4 * BLOCK}"):
        again.tokens(1)
    with pytest.raises(DataError):
        Shard(shard.prefix, shard.record).verify()


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".docs.parquet", ".mask", ".bin.crc"])
def test_truncated_and_missing_files_are_named(tmp_path, suffix):
    shard, _ = toy_shard(tmp_path, [400, 300], masks=True)
    path = tmp_path / f"train{suffix}"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="bytes") as error:
        Shard(shard.prefix, shard.record)
    assert str(path) in error.value.expected
    path.unlink()
    with pytest.raises(DataError, match="no such file"):
        Shard(shard.prefix, shard.record)


def test_index_of_other_shards_is_refused(tmp_path):
    shard, _ = toy_shard(tmp_path, [10, 20])
    other, _ = toy_shard(tmp_path / "other", [10, 21])
    with pytest.raises(DataError, match="30 tokens"):
        Shard(other.prefix, shard.record.model_copy(update={"files": other.record.files}))


def test_dtype_follows_the_vocabulary_and_ids_must_fit(tmp_path):
    assert token_dtype(65499) == np.uint16
    assert token_dtype(65500) == np.int32
    with pytest.raises(DataError, match="uint16"), IndexedWriter(tmp_path / "a", np.dtype(np.uint16)) as writer:
        writer.add(np.asarray([70000]))
    assert not (tmp_path / "a.idx").exists()


def test_a_dataset_appears_only_when_whole(tmp_path):
    toy_shard(tmp_path, [3])

    def interrupted():
        with IndexedWriter(tmp_path / "train", np.dtype(np.uint16)) as writer:
            writer.add(np.asarray([1]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not (tmp_path / "train.idx").exists()


def test_not_an_index(tmp_path):
    (tmp_path / "a.idx").write_bytes(b"hello world, this is no index at all")
    with pytest.raises(DataError, match="MMIDIDX"):
        read_index(tmp_path / "a.idx")
    with pytest.raises(DataError, match="no such file"):
        read_index(tmp_path / "b.idx")


def test_empty_shard(tmp_path):
    shard, _ = toy_shard(tmp_path, [])
    assert (len(shard), shard.n_tokens, shard.ids, shard.lengths.tolist()) == (0, 0, [], [])
    assert shard.read(0, 0).tolist() == []
    assert crc_path(tmp_path / "train.bin").stat().st_size == 0


def test_where_documents_came_from(tmp_path):
    writer = ShardWriter(tmp_path / "train", 1000, tokenizer="ab" * 32)
    for i in range(7):
        writer.add([i] * i, 2 * i, f"id{i}", file=f"file{i % 2}.jsonl", offset=i << 33)
    shard = Shard(tmp_path / "train", writer.close())
    assert shard.documents.row(5) == {"id": "id5", "group": "", "n_tokens": 5, "n_bytes": 10, "file": "file1.jsonl", "offset": 5 << 33}
    assert shard.documents.tokenizer == "ab" * 32
    assert shard.n_bytes == 42


def test_rows_give_the_same_bytes_however_they_arrive(tmp_path, monkeypatch):
    from megatron_r1.data import documents
    from megatron_r1.data.shards import describe

    monkeypatch.setattr(documents, "ROWS", 8)
    lengths = [3, 0, 5] * 9
    writer = ShardWriter(tmp_path / "a", 1000)
    for i, n in enumerate(lengths):
        writer.add([i] * n, n, f"id{i}", f"g{i % 2}", file=f"f{i // 10}", offset=i)
    record = writer.close()
    shard = Shard(tmp_path / "a", record)
    assert shard.ids[-1] == "id26"
    assert shard.ids[7:10] == ["id7", "id8", "id9"]
    assert shard.documents.column("file").take([26, 0, 9, 10]) == ["f2", "f0", "f0", "f1"]
    assert list(shard.ids) == [f"id{i}" for i in range(27)]

    assert write_index(tmp_path / "b.idx", iter(np.array_split(np.asarray(lengths), 5)), np.dtype(np.uint16)) == (27, 72)
    rows = ((f"id{i}", f"g{i % 2}", n, n, f"f{i // 10}", i) for i, n in enumerate(lengths))
    assert documents.write_documents(tmp_path / "b.docs.parquet", rows) == (27, 72)
    tokens = (tmp_path / "a.bin").read_bytes()
    (tmp_path / "b.bin").write_bytes(tokens)
    sums = [BlockSums(), BlockSums()]
    sums[0].update(tokens)
    write_sums(tmp_path / "b.bin", np.concatenate([part.finish() for part in sums]))
    assert describe(tmp_path / "b", 72) == record
    for suffix in (".idx", ".idx.crc", ".docs.parquet", ".docs.parquet.crc", ".bin.crc"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes(), suffix
    assert not list(tmp_path.glob("*.part"))


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 9), max_size=60), data=st.data())
def test_finding_documents(tmp_path_factory, lengths, data):
    """Against numpy over the whole array of offsets, with documents of no token and several strides."""
    folder = tmp_path_factory.mktemp("find")
    write_index(folder / "a.idx", [np.asarray(lengths, np.int64)], np.dtype(np.int32))
    with patch.multiple("megatron_r1.data.indexed", STRIDE=4):
        index = Index(folder / "a.idx")
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        assert (index.edges(0, len(lengths)) == offsets).all()
        assert index.tokens == sum(lengths)
        for token in range(index.tokens):
            owner = index.find(token)
            assert offsets[owner] <= token < offsets[owner + 1]
        if lengths:
            first = data.draw(st.integers(0, len(lengths)))
            last = data.draw(st.integers(first, len(lengths)))
            assert (index.edges(first, last) == offsets[first : last + 1]).all()
    for token in (-1, index.tokens):
        with pytest.raises(DataError, match="a token within"):
            index.find(token)


def test_beyond_four_billion_tokens(tmp_path):
    """Offsets above 2^32 tokens and 2^33 bytes, in a file of holes: 64 bits all the way, for stock Megatron too."""
    last = np.arange(1, 8, dtype=np.int32)
    lengths = [2**30, 0, 2**31 - 1, 2**30 + 300, len(last)]
    size = 4 * sum(lengths)
    assert size > 2**34
    write_index(tmp_path / "a.idx", [np.asarray(lengths)], np.dtype(np.int32))
    with open(tmp_path / "a.bin", "wb") as stream:
        stream.seek(size - last.nbytes)
        stream.write(last.tobytes())
    sums = np.full(-(-size // BLOCK), zlib.crc32(bytes(BLOCK)), np.uint32)
    with open(tmp_path / "a.bin", "rb") as stream:
        stream.seek((len(sums) - 1) * BLOCK)
        sums[-1] = zlib.crc32(stream.read())
    write_sums(tmp_path / "a.bin", sums)
    shard = Shard.at(tmp_path / "a")
    assert (shard.n_tokens, shard.find(2**32), shard.find(sum(lengths) - 1), shard.checked) == (sum(lengths), 3, 4, True)
    assert shard.tokens(4).tolist() == last.tolist()
    assert shard.read(2**32, 5).tolist() == [0] * 5
    assert shard.windows(np.asarray([0, sum(lengths) - 9, 2**32]), 9)[1].tolist() == [0, 0, *last]
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    stock = indexed.IndexedDataset(str(tmp_path / "a"))
    assert stock[4].tolist() == last.tolist()
    assert stock.get(2, offset=2**31 - 4, length=3).tolist() == [0, 0, 0]


def test_lengths_that_no_index_can_hold(tmp_path):
    writer = IndexWriter(tmp_path / "a.idx", np.dtype(np.uint16))
    for wrong in (2**31, 2**40, -1):
        with pytest.raises(DataError, match="2\\^31"):
            writer.add(wrong)
        with pytest.raises(DataError, match="2\\^31"):
            writer.extend(np.asarray([1, wrong]))
    writer.extend(np.full(3, 2**31 - 1))
    assert (writer.documents, writer.tokens) == (3, 3 * (2**31 - 1))
    writer.abandon()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("at", "value", "said"), [(18, 2**60, "truncated"), (26, 2**60, "truncated"), (18, 2, "too long"), (17, 6, "dtype code 6"), (9, 2, "version 2")])
def test_headers_that_promise_too_much(tmp_path, at, value, said):
    """A count of 2^60 must be compared with the file before memory is asked for."""
    write_index(tmp_path / "a.idx", [np.asarray([1, 2, 3])], np.dtype(np.uint16))
    crc_path(tmp_path / "a.idx").unlink()
    content = bytearray((tmp_path / "a.idx").read_bytes())
    content[at : at + (1 if at == 17 else 8)] = value.to_bytes(1 if at == 17 else 8, "little")
    (tmp_path / "a.idx").write_bytes(content)
    with pytest.raises(DataError, match=said):
        Index(tmp_path / "a.idx")


@pytest.mark.parametrize(("field", "number", "value", "said"), [("<i4", 1, -2, "not negative"), ("<i8", 1, 100, "sums of the lengths"), ("<i4", 2, -5, "not negative"), ("<i8", 2, -2, "not negative")])
def test_an_index_that_contradicts_itself(tmp_path, field, number, value, said):
    write_index(tmp_path / "a.idx", [np.asarray([1, 2, 3])], np.dtype(np.uint16))
    crc_path(tmp_path / "a.idx").unlink()
    content = bytearray((tmp_path / "a.idx").read_bytes())
    base = 34 if field == "<i4" else 34 + 12
    np.frombuffer(content, field, 3, base)[number : number + 1] = value
    (tmp_path / "a.idx").write_bytes(content)
    with pytest.raises(DataError, match=said):
        Index(tmp_path / "a.idx")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("name", ["train.bin", "train.mask", "train.idx.part", "train.docs.parquet.part"])
def test_a_full_disk_is_said_and_no_dataset_appears(tmp_path, name):
    (tmp_path / name).symlink_to("/dev/full")

    def write():
        writer = ShardWriter(tmp_path / "train", 1000, masked=True)
        try:
            for i in range(40_000):
                writer.add([1, 2], 2, f"id{i}", mask=[0, 1])
            writer.close()
        except BaseException:
            writer.abandon()
            raise

    with pytest.raises(EnvironmentProblem, match="disk is full"):
        write()
    assert not (tmp_path / "train.idx").exists()
    assert not [path for path in tmp_path.glob("*.part") if not path.is_symlink()]


def test_memory_does_not_grow_with_documents(tmp_path, monkeypatch):
    """Lists of a Python object a document would take some 100 bytes each."""
    import tracemalloc

    from megatron_r1.data import documents

    n, rows = 12_000, 256
    monkeypatch.setattr(documents, "ROWS", rows)
    ShardWriter(tmp_path / "imports", 1000).close()
    tokens = np.arange(3, dtype=np.int32)
    tracemalloc.start()
    writer = ShardWriter(tmp_path / "train", 1000)
    for i in range(n):
        writer.add(tokens, 9, f"document-{i:012d}", f"group-{i:012d}", file="a.jsonl", offset=50 * i)
    written = tracemalloc.get_traced_memory()[1]
    record = writer.close()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    shard = Shard(tmp_path / "train", record)
    assert shard.tokens(n - 1).tolist() == [0, 1, 2]
    assert shard.find(3 * n - 1) == n - 1
    opened = tracemalloc.get_traced_memory()[1] - before
    assert shard.ids[n // 2] == f"document-{n // 2:012d}"
    tracemalloc.stop()
    assert written < 600 * rows + (1 << 18), written
    assert opened < 3 * n, opened
