"""The virtual stream against plain concatenation."""

import numpy as np
import pytest
from data_toys import toy_shard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.data import indexed
from megatron_r1.data.shards import Shard
from megatron_r1.data.view import TokenStream
from megatron_r1.utils.errors import DataError


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    return toy_shard(tmp_path_factory.mktemp("view"), [3, 0, 1, 9, 2, 0, 5])


@given(st.one_of(st.none(), st.lists(st.booleans(), min_size=7, max_size=7), st.permutations(range(7))), st.data())
@settings(max_examples=80, deadline=None)
def test_reads_are_slices_of_the_concatenation(shard, keep, data):
    view, documents = shard
    wanted = range(7) if keep is None else [i for i in range(7) if keep[i]] if isinstance(keep[0], bool) else keep
    stream = TokenStream(view, None if keep is None else np.asarray(keep))
    whole = np.concatenate([documents[i] for i in wanted] or [np.zeros(0, int)])
    owner = np.concatenate([np.full(len(documents[i]), i) for i in wanted] or [np.zeros(0, int)])
    assert stream.n_tokens == len(whole)
    if not len(whole):
        return
    n = data.draw(st.integers(1, len(whole)))
    starts = data.draw(st.lists(st.integers(0, len(whole) - n), min_size=1, max_size=5))
    found = stream.windows(np.asarray(starts), n)
    assert (found.tokens.dtype, found.tokens.shape) == (view.dtype, (len(starts), n))
    for row, start in enumerate(starts):
        assert found.tokens[row].tolist() == whole[start : start + n].tolist()
        mine = found.row == row
        begins, lengths = found.begin[mine], np.diff(np.append(found.begin[mine], n))
        assert begins[0] == 0
        assert lengths.min() > 0
        assert np.repeat(found.document[mine], lengths).tolist() == owner[start : start + n].tolist()


def test_blocks_count_targets(shard):
    stream = TokenStream(shard[0])
    assert (stream.n_tokens, stream.blocks(19), stream.blocks(20), stream.blocks(4)) == (20, 1, 0, 4)


@pytest.mark.parametrize(("start", "n"), [(-1, 2), (0, 21), (20, 1), (3, 0)])
def test_outside_the_stream(shard, start, n):
    with pytest.raises(DataError, match="20 tokens"):
        TokenStream(shard[0]).windows(np.asarray([0, start]), n)


def test_damage_is_found_in_every_block_of_a_window(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed, "BLOCK", 16)
    shard, documents = toy_shard(tmp_path, [30, 50, 20])
    whole = np.concatenate(documents)
    assert (shard.windows(np.asarray([0, 51, 7]), 49) == [whole[at : at + 49] for at in (0, 51, 7)]).all()
    path = tmp_path / "train.bin"
    raw = bytearray(path.read_bytes())
    raw[100] ^= 1
    path.write_bytes(raw)
    damaged = Shard(tmp_path / "train", shard.record)
    good = TokenStream(damaged).windows(np.asarray([0, 80]), 20)
    assert good.tokens.tolist() == [whole[:20].tolist(), whole[80:].tolist()]
    for start in (21, 31, 50):
        with pytest.raises(DataError, match="bytes 96 to 112"):
            TokenStream(damaged).windows(np.asarray([0, start]), 33)


def test_flags_of_other_shards(shard):
    with pytest.raises(DataError, match="7 documents"):
        TokenStream(shard[0], np.ones(6, bool))
