"""Weights that change within a phase, and caps: against counting the samples one by one."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.data.mixture_order import MixtureOrder, Rest
from megatron_r1.data.schedule import ScheduledOrder, interpolated
from megatron_r1.utils.errors import DataError

BLOCKS = {"a": 7, "b": 30, "c": 1, "d": 12}
tables = st.dictionaries(st.sampled_from("abcd"), st.floats(0.02, 1.0), min_size=1)
schedules = st.lists(st.tuples(st.integers(1, 60), tables), max_size=4)
quick = settings(max_examples=80, deadline=None)


def pieces_of(first, later):
    at, pieces = 0, [(0, first)]
    for length, table in later:
        at += length
        pieces.append((at, table))
    return pieces


@given(tables, schedules, st.dictionaries(st.sampled_from("abcd"), st.integers(0, 40)), st.integers(1, 300), st.dictionaries(st.sampled_from("abcd"), st.integers(0, 9)))
@quick
def test_shares_caps_and_cursors_sample_by_sample(first, later, limits, total, start):
    pieces = pieces_of(first, later)
    rest = {"b": Rest(2, 1, 5)}
    try:
        order = ScheduledOrder(BLOCKS, pieces, 4, start, rest, limits, total)
    except DataError as error:
        assert "all of them at their caps" in error.found  # noqa: PT017 - what is refused is looked at below
        return
    seen = Counter({name: start.get(name, 0) for name in BLOCKS})
    visits = {name: [] for name in BLOCKS}
    begun, base = 0, dict(seen)
    really = order.pieces
    for i in range(total):
        piece = max(k for k, (at, _) in enumerate(really) if at <= i)
        if really[piece][0] == i:
            begun, base = i, dict(seen)
        source, block, epoch = order.locate(i)
        assert seen[source] < limits.get(source, 10**9)
        seen[source] += 1
        visits[source].append((epoch, block))
        # What has a share is what the table says without those at their caps, in the same proportions.
        table = [table for at, table in pieces if at <= i][-1]
        left = {name: share for name, share in table.items() if name not in {capped.source for capped in order.capped if capped.sample <= i}}
        assert really[piece][1] == pytest.approx({name: share / sum(left.values()) for name, share in left.items()}, abs=1e-9)
        for name, share in really[piece][1].items():
            assert abs(seen[name] - base[name] - (i + 1 - begun) * share) <= order.max_error + 1e-6
        if i % 7 == 0:
            assert order.counts(i + 1) == dict(seen)
    for capped in order.capped:
        assert order.counts(capped.sample)[capped.source] >= limits[capped.source]
    for name, found in visits.items():
        alone = MixtureOrder({name: BLOCKS[name]}, {name: 1.0}, 4, start, {k: r for k, r in rest.items() if k == name})
        assert found == [alone.locate(i)[:0:-1] for i in range(len(found))]
    assert sum(order.weights.values()) == pytest.approx(1)
    sources, blocks, epochs = order.locate_many(range(total))
    assert [(order.names[s], b, e) for s, b, e in zip(sources.tolist(), blocks.tolist(), epochs.tolist())] == [tuple(order.locate(i)) for i in range(total)]


@given(tables, st.dictionaries(st.sampled_from("abcd"), st.integers(0, 40), min_size=4), st.integers(1, 300))
@quick
def test_a_schedule_is_refused_exactly_when_all_sources_are_at_their_caps_too_early(weights, limits, total):
    room = sum(limits[name] for name in weights)
    if room < total:
        with pytest.raises(DataError, match=rf"after {room} samples(?s:.)*max_epochs"):
            ScheduledOrder(BLOCKS, [(0, weights)], 0, None, None, limits, total)
    else:
        counts = ScheduledOrder(BLOCKS, [(0, weights)], 0, None, None, limits, total).counts(total)
        assert all(counts[name] <= limits[name] for name in weights)


@given(tables, tables, st.integers(0, 50), st.integers(1, 90), st.integers(1, 12))
@quick
def test_interpolation_moves_evenly_from_one_table_to_the_other(before, after, first, length, jumps):
    before, after = ({name: share / sum(table.values()) for name, share in table.items()} for table in (before, after))
    pieces = interpolated(before, after, first, length, jumps)
    assert pieces[0][0] == first
    assert pieces[-1] == (first + length, after)
    assert all(a < b for (a, _), (b, _) in pairwise(pieces))
    assert all(sum(table.values()) == pytest.approx(1) for _, table in pieces)
    for name in {*before, *after}:
        path = [before.get(name, 0.0), *(table.get(name, 0.0) for _, table in pieces)]
        assert path == pytest.approx(sorted(path, reverse=path[0] > path[-1]))
    if length % jumps == 0:
        spent = sum((b - a) * table.get("a", 0.0) for (a, table), (b, _) in pairwise(pieces))
        assert spent == pytest.approx(length * (before.get("a", 0.0) + after.get("a", 0.0)) / 2)


def test_starts_that_do_not_ascend():
    for pieces in ([], [(1, {"a": 1.0})], [(0, {"a": 1.0}), (0, {"b": 1.0})]):
        with pytest.raises(DataError, match="begin at sample 0 and ascend"):
            ScheduledOrder(BLOCKS, pieces, 0)


def test_fingerprints_of_schedules():
    orders = [ScheduledOrder(BLOCKS, [(0, {"a": 1.0}), (at, {"b": share, "a": 0.5})], 0) for at, share in ((5, 0.5), (6, 0.5), (5, 0.4))]
    assert len({order.fingerprint for order in orders}) == 3
