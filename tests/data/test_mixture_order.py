"""The data order as a function: shares at every prefix, no repeats within an epoch, any chunking, any change of weights."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.data.mixture_order import RESOLUTION, MixtureOrder, permuted, quantise
from megatron_r1.utils.errors import DataError

names = st.sampled_from("abcdefghijkl")
mixtures = st.dictionaries(names, st.tuples(st.floats(1e-3, 1.0), st.integers(1, 40)), min_size=1, max_size=12)
quick = settings(max_examples=50, deadline=None)


def order_of(mixture, seed=0, start=None):
    return MixtureOrder({k: blocks for k, (_, blocks) in mixture.items()}, {k: weight for k, (weight, _) in mixture.items()}, seed, start)


@given(mixtures, st.integers(0, 3), st.integers(1, 300))
@quick
def test_every_prefix_holds_its_share(mixture, seed, n):
    order = order_of(mixture, seed)
    total = sum(weight for weight, _ in mixture.values())
    seen = Counter()
    assert order.max_error < 1.25
    for i in range(n):
        seen[order.locate(i).source] += 1
        for name, (weight, _) in mixture.items():
            assert abs(seen[name] - (i + 1) * weight / total) <= order.max_error + 1e-6
    assert order.counts(n) == {name: seen[name] for name in mixture}


def test_shares_are_within_one_sample_for_a_mixture_of_the_quickstart():
    weights = {"code": 0.225, "codeio": 0.118, "docs": 0.097, "champ": 0.21, "facts": 0.169, "wiki": 0.1, "chat": 0.01, "noise": 0.071}
    total = sum(weights.values())
    order = MixtureOrder(dict.fromkeys(weights, 50), weights, 0)
    seen = Counter()
    for i in range(5000):
        seen[order.locate(i).source] += 1
        assert all(abs(seen[name] - (i + 1) * weight / total) < 1 for name, weight in weights.items())


@given(mixtures, st.integers(0, 3))
@quick
def test_no_block_twice_within_an_epoch_and_all_of_them(mixture, seed):
    order = order_of(mixture, seed)
    per_epoch = {}
    for i in range(400):
        source, block, epoch = order.locate(i)
        assert 0 <= block < mixture[source][1]
        assert block not in per_epoch.setdefault((source, epoch), set())
        per_epoch[source, epoch].add(block)
    for (source, epoch), blocks in per_epoch.items():
        if (source, epoch + 1) in per_epoch:
            assert blocks == set(range(mixture[source][1]))


@given(mixtures, mixtures, st.integers(0, 150), st.integers(0, 150))
@quick
def test_a_change_of_weights_loses_and_repeats_nothing(first, second, n, m):
    blocks = {name: 7 + len(name) for name in "abcdefghijkl"}
    one = MixtureOrder(blocks, {k: w for k, (w, _) in first.items()}, 5)
    two = MixtureOrder(blocks, {k: w for k, (w, _) in second.items()}, 5, one.counts(n))
    visits = [one.locate(i) for i in range(n)] + [two.locate(i) for i in range(m)]
    assert len(set(visits)) == len(visits)
    for source in {visit.source for visit in visits}:
        alone = MixtureOrder(blocks, {source: 1.0}, 5)
        mine = [visit for visit in visits if visit.source == source]
        assert mine == [alone.locate(i) for i in range(len(mine))]
    assert two.counts(m) == {name: sum(visit.source == name for visit in visits) for name in blocks}


@given(mixtures, st.permutations(range(60)))
@quick
def test_any_chunking_and_any_order_of_asking_gives_the_same(mixture, indices):
    order, again = order_of(mixture), order_of(mixture)
    straight = [order.locate(i) for i in range(60)]
    assert {i: again.locate(i) for i in indices} == dict(enumerate(straight))


def test_far_samples_cost_nothing():
    order = MixtureOrder({"a": 10**12, "b": 3}, {"a": 0.7, "b": 0.3}, 1)
    far = 10**12
    counts = order.counts(far)
    assert sum(counts.values()) == far
    assert abs(counts["a"] - 0.7 * far) < 2
    located = order.locate(far)
    assert order.counts(far + 1)[located.source] == counts[located.source] + 1


def test_seed_and_epoch_change_the_order():
    def blocks(seed, epoch):
        order = MixtureOrder({"a": 50}, {"a": 1.0}, seed)
        return [order.locate(epoch * 50 + i).block for i in range(50)]

    orders = [blocks(0, 0), blocks(0, 1), blocks(1, 0), list(range(50))]
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_the_order_is_pinned():
    """Changing this breaks every run in progress: its cursors would mean other blocks."""
    order = MixtureOrder({"a": 10, "b": 4}, {"a": 0.75, "b": 0.25}, 1234)
    assert [tuple(order.locate(i)) for i in range(8)] == [
        ("a", 1, 0), ("a", 0, 0), ("b", 1, 0), ("a", 7, 0), ("a", 6, 0), ("a", 9, 0), ("b", 3, 0), ("a", 3, 0),
    ]


@given(st.integers(1, 2000), st.integers(0, 2**63 - 1))
@quick
def test_permuted_is_a_bijection(size, key):
    assert sorted(permuted(i, size, key) for i in range(size)) == list(range(size))


def test_permuted_looks_random():
    """Mean distance between neighbours of a random permutation is n/3."""
    values = [permuted(i, 3000, 99) for i in range(3000)]
    steps = [abs(a - b) for a, b in pairwise(values)]
    assert abs(sum(steps) / len(steps) - 1000) < 60


def test_quantised_weights_sum_exactly():
    assert sum(quantise({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3, "d": 1e-9}).values()) == RESOLUTION
    assert quantise({"a": 2.0, "b": 0.0}) == {"a": RESOLUTION}


@pytest.mark.parametrize("weights", [{}, {"a": 0.0}, {"a": -1.0}, {"a": float("nan")}, {"a": float("inf")}, {"z": 1.0}, {"empty": 1.0}])
def test_wrong_weights(weights):
    with pytest.raises(DataError):
        MixtureOrder({"a": 3, "empty": 0}, weights, 0)


def test_a_negative_sample():
    with pytest.raises(DataError, match="0 or more"):
        MixtureOrder({"a": 3}, {"a": 1.0}, 0).locate(-1)
