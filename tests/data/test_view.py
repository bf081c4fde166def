"""The virtual stream against plain concatenation."""

import numpy as np
import pytest
from data_toys import toy_shard
from hypothesis import given, settings
from hypothesis import strategies as st

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
    start = data.draw(st.integers(0, len(whole)))
    n = data.draw(st.integers(0, len(whole) - start))
    tokens, owners = stream.read(start, n)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == whole[start : start + n].tolist()
    assert owners.tolist() == owner[start : start + n].tolist()


def test_blocks_count_targets(shard):
    stream = TokenStream(shard[0])
    assert (stream.n_tokens, stream.blocks(19), stream.blocks(20), stream.blocks(4)) == (20, 1, 0, 4)


@pytest.mark.parametrize(("start", "n"), [(-1, 2), (0, 21), (20, 1)])
def test_outside_the_stream(shard, start, n):
    with pytest.raises(DataError, match="20 tokens"):
        TokenStream(shard[0]).read(start, n)


def test_flags_of_other_shards(shard):
    with pytest.raises(DataError, match="7 documents"):
        TokenStream(shard[0], np.ones(6, bool))
