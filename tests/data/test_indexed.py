"""The file format: what stock megatron.core reads, and what happens to damaged files."""

import numpy as np
import pytest
from data_toys import toy_shard

from megatron_r1.data.indexed import BLOCK, IndexedWriter, crc_path, read_index, token_dtype
from megatron_r1.data.shards import Shard
from megatron_r1.utils.errors import DataError

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
    assert shard.ids == ["doc0", "doc1", "doc2", "doc3"]
    assert shard.groups == ["group0", "group1", "group2", "group0"]
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
        return again.tokens(1), again.mask(1)

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
