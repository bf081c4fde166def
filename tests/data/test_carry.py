"""A ledger of every token, over changes of weights, sources, documents and sequence length at any sample."""

from __future__ import annotations

import numpy as np
import pytest
from data_toys import toy_shard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.artifacts.checkpoint import Leg, SourceCursor
from megatron_r1.data.carry import Continued, consumed
from megatron_r1.data.dataset import PretrainDataset
from megatron_r1.data.mixture_order import MixtureOrder
from megatron_r1.data.view import TokenStream, union
from megatron_r1.utils.errors import DataError

LENGTHS = {"a": [5, 30, 0, 1, 12, 2, 44, 7, 9, 1], "b": [60, 3, 3, 0, 21], "c": [8] * 12}
SEED = 3


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return {name: toy_shard(tmp_path_factory.mktemp("carry") / name, lengths, seed=i)[0] for i, (name, lengths) in enumerate(LENGTHS.items())}


def phase(shards, cursors, weights, keep, seq_length, lists, reset=True):
    """A phase as train/feed.py opens it."""
    continued = {}
    for name in weights:
        view = "" if keep.get(name) is None else f"{name}{keep[name].tolist()}"
        lists[view] = keep.get(name)
        continued[name] = Continued(shards[name], name, cursors.get(name, SourceCursor(epoch=0)), SEED, view, lists.__getitem__, seq_length)
    assert all(of.blocks for of in continued.values())
    order = MixtureOrder(
        {name: of.blocks for name, of in continued.items()}, weights, SEED, {name: of.start for name, of in continued.items()},
        {name: of.rest for name, of in continued.items() if of.rest},
    )
    rests = {name: of.rest_stream for name, of in continued.items() if of.rest}
    return continued, PretrainDataset({name: of.stream for name, of in continued.items()}, order, seq_length, reset, rests)


def targets(data, shards, index):
    """(source, epoch, tokens of the shard that are targets, tokens read) of a sample, found without the code under test: by matching the window's runs."""
    source, block, epoch = data.order.locate(index)
    rest = data.order.rest.get(source)
    stream = data.rests[source] if rest and epoch == rest.epoch else data.streams[source]
    # Place in the shard of every token of the stream, one by one.
    places, fresh = [], []
    if stream.documents is None:
        places, fresh = list(range(shards[source].n_tokens)), [True] * shards[source].n_tokens
    else:
        for piece, (start, length) in enumerate(zip(stream._starts.tolist(), np.diff(stream.offsets).tolist())):
            context = stream._repeated is not None and bool(stream._repeated[piece])
            places += range(start, start + length)
            fresh += [not (context and i == 0) for i in range(length)]
    s = data.seq_length
    window = slice(block * s, block * s + s + 1)
    return source, epoch, places[window], fresh[window], block


choices = st.fixed_dictionaries({
    "weights": st.dictionaries(st.sampled_from("abc"), st.floats(0.05, 1.0), min_size=1),
    "seq_length": st.sampled_from([3, 4, 4, 7]),
    "keep": st.fixed_dictionaries({name: st.one_of(st.none(), st.lists(st.booleans(), min_size=len(n), max_size=len(n)).map(np.asarray)) for name, n in LENGTHS.items()}),
    "samples": st.integers(0, 45),
    "reset": st.booleans(),
})  # fmt: skip


@given(st.lists(choices, min_size=1, max_size=7))
@settings(max_examples=40, deadline=None)
def test_nothing_is_lost_and_nothing_repeated_whatever_changes(shards, changes):
    cursors, lists = {}, {"": None}
    ledger, last, leg_firsts = {}, {}, {}
    for change in changes:
        keep = {name: change["keep"][name] for name in LENGTHS}
        weights, s = {}, change["seq_length"]
        for name, weight in change["weights"].items():
            if TokenStream(shards[name], keep[name]).blocks(s):
                weights[name] = weight
        if not weights:
            continue
        continued, data = phase(shards, cursors, weights, keep, s, lists, change["reset"])
        for name, of in continued.items():
            # A change that leaves no block of the running epoch ends it, with the documents kept then.
            if name in cursors and of.cursor(data.order.position(name, of.start)).epoch > cursors[name].epoch:
                last[name, cursors[name].epoch] = (keep[name], s)
        for i in range(change["samples"]):
            source, epoch, places, fresh, block = targets(data, shards, i)
            row, shard = data.sample(i), shards[source]
            # The row is these tokens, and its targets are among those not read before.
            assert [*row["tokens"].tolist(), int(row["labels"][-1])] == shard.read(0, shard.n_tokens)[places].tolist()
            assert all(not mask or new for mask, new in zip(row["loss_mask"], fresh[1:]))
            documents = np.searchsorted(shard.offsets, places, side="right") - 1
            joined = [b == a + 1 and da == db for a, b, da, db in zip(places, places[1:], documents, documents[1:])]
            if change["reset"]:
                assert row["loss_mask"].tolist() == [float(together) for together in joined]  # predicted from the token before it, and only then
            else:
                assert row["loss_mask"].tolist() == [float(new) for new in fresh[1:]]
            seen = ledger.setdefault((source, epoch), np.zeros(shard.n_tokens, int))
            seen[[place for place, new in zip(places[1:], fresh[1:]) if new]] += 1
            assert seen.max() <= 1
            if block == 0 and fresh[0]:
                leg_firsts.setdefault((source, epoch), set()).add(places[0])
            last[source, epoch] = (keep[source], s)
        cursors = {**cursors, **{name: of.cursor(data.order.position(name, data.order.counts(change["samples"])[name])) for name, of in continued.items()}}
        for name, cursor in cursors.items():
            for epoch in range(cursor.epoch):
                if (name, epoch) not in ledger or (name, epoch) not in last:
                    continue
                kept, length = last.pop((name, epoch))
                wanted = np.zeros(shards[name].n_tokens, bool)
                for document in range(len(shards[name])) if kept is None else np.flatnonzero(kept):
                    wanted[shards[name].offsets[document] : shards[name].offsets[document + 1]] = True
                missing = set(np.flatnonzero(wanted & (ledger[name, epoch] == 0)).tolist()) - leg_firsts.get((name, epoch), set())
                assert len(missing) <= length, (name, epoch)
    # What is kept of the state is short, and says by itself what was consumed.
    for name, cursor in cursors.items():
        assert len(cursor.legs) <= len(changes)
        assert SourceCursor.model_validate(cursor.plain()) == cursor
        starts, ends = consumed(shards[name], name, cursor, SEED, lists.__getitem__)
        known = np.zeros(shards[name].n_tokens, bool)
        for a, b in zip(starts, ends):
            known[a:b] = True
        seen = ledger.get((name, cursor.epoch), np.zeros(len(known), int)) > 0
        assert not (seen & ~known).any()
        assert set(np.flatnonzero(known & ~seen).tolist()) <= leg_firsts.get((name, cursor.epoch), set())


@given(st.lists(st.tuples(st.floats(0.1, 1), st.floats(0.1, 1), st.integers(0, 40)), min_size=2, max_size=6))
@settings(max_examples=30, deadline=None)
def test_changes_of_weights_alone_make_no_legs(shards, changes):
    """Then the samples of a source are those it would have had by itself."""
    cursors, lists, visits = {}, {"": None}, {"a": [], "b": []}
    for a, b, samples in changes:
        continued, data = phase(shards, cursors, {"a": a, "b": b}, {}, 4, lists)
        for i in range(samples):
            name, block, epoch = data.order.locate(i)
            visits[name].append((epoch, block))
        counts = data.order.counts(samples)
        cursors = {name: of.cursor(data.order.position(name, counts[name])) for name, of in continued.items()}
        assert all(len(cursor.legs) <= 1 for cursor in cursors.values())
    for name, seen in visits.items():
        alone = MixtureOrder({name: TokenStream(shards[name]).blocks(4)}, {name: 1.0}, SEED)
        assert seen == [tuple(alone.locate(i))[:0:-1] for i in range(len(seen))]


def test_legs_of_other_shards_are_refused(shards):
    cursor = SourceCursor(epoch=0, legs=[Leg(seq_length=4, blocks=9999, taken=3)])
    for length in (4, 5):
        with pytest.raises(DataError, match=r"9999 blocks of 4 tokens(?s:.)*carry_cursors: false"):
            Continued(shards["a"], "a", cursor, SEED, "", {"": None}.__getitem__, length)


@given(st.integers(0, 3), st.integers(1, 10), st.floats(0.1, 6))
@settings(max_examples=30, deadline=None)
def test_caps_count_passes_since_training_began(shards, epoch, taken, epochs):
    """With and without a rest: epochs end at whole counts, and a part of one is that part of its blocks."""
    blocks = TokenStream(shards["a"]).blocks(4)
    cursor = SourceCursor(epoch=epoch, legs=[Leg(seq_length=4, blocks=blocks, taken=taken)])
    same, longer = (Continued(shards["a"], "a", cursor, SEED, "", {"": None}.__getitem__, length) for length in (4, 6))
    assert same.limit(epochs) == int(epochs * blocks + 1e-9)
    assert same.start == epoch * blocks + taken
    assert longer.limit(epoch + 1) == longer.rest.blocks
    assert longer.limit(epoch + 3) == longer.rest.blocks + 2 * longer.blocks
    order = MixtureOrder({"a": longer.blocks}, {"a": 1.0}, SEED, None, {"a": longer.rest})
    assert order.position("a", longer.limit(epoch + 3)) == (epoch + 3, 0, 0)


ranges = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=12)


@given(ranges, ranges)
@settings(max_examples=100, deadline=None)
def test_union_of_ranges_against_sets(first, second):
    parts = [(np.asarray([a for a, _ in part], np.int64), np.asarray([a + n for a, n in part], np.int64)) for part in (first, second)]
    starts, ends = union(*parts)
    assert {i for a, b in zip(starts, ends) for i in range(a, b)} == {i for part in (first, second) for a, n in part for i in range(a, a + n)}
    assert (starts[1:] > ends[:-1]).all()
