"""The data order as a function: shares at every prefix, no repeats within an epoch, any chunking, any change of weights."""

import tracemalloc
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.data.mixture_order import RESOLUTION, MixtureOrder, Rest, permuted, permuted_many, quantise
from megatron_r1.utils.errors import DataError

names = st.sampled_from("abcdefghijkl")
mixtures = st.dictionaries(names, st.tuples(st.floats(1e-3, 1.0), st.integers(1, 40)), min_size=1, max_size=12)
quick = settings(max_examples=50, deadline=None)


# Weights as wide as floats go, in ways that make trees bad: many scales, several of each, nearly equal ones.
scales = st.lists(st.tuples(st.integers(-300, 300), st.integers(1, 9)), min_size=1, max_size=6)
adversarial = st.one_of(
    st.lists(st.floats(1e-300, 1e300), min_size=1, max_size=40),
    scales.map(lambda groups: [10.0**exponent for exponent, copies in groups for _ in range(copies)]),
    st.tuples(st.integers(1, 60), st.floats(1e-12, 1.0)).map(lambda of: [1.0] * of[0] + [of[1]]),
    st.lists(st.integers(1, 3), min_size=1, max_size=60),
)


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


@given(adversarial, st.lists(st.integers(0, 2**50), min_size=1, max_size=20))
@quick
def test_shares_of_any_weights_at_any_prefix_are_within_the_bound(weights, prefixes):
    """Exact arithmetic: the weights are those the order itself counts with, the prefixes reach beyond 64-bit products."""
    order = MixtureOrder({f"s{i}": 1 for i in range(len(weights))}, {f"s{i}": w for i, w in enumerate(weights)}, 0)
    exact = {name: Fraction(count, RESOLUTION) for name, count in quantise({f"s{i}": w for i, w in enumerate(weights)}).items()}
    assert order.max_error < 1.68
    bound = Fraction(order.max_error) + Fraction(1, 10**9)
    counts = {n: order.counts(n) for n in prefixes}
    for n, found in counts.items():
        assert sum(found.values()) == n
        assert all(abs(found[name] - n * weight) <= bound for name, weight in exact.items())
    for a, b in pairwise(sorted(counts)):
        assert all(counts[b][name] >= counts[a][name] for name in exact)
        assert all(abs(counts[b][name] - counts[a][name] - (b - a) * weight) <= 2 * bound for name, weight in exact.items())


@pytest.mark.parametrize("weights", [[1.0] * 10_000, [1 / (i + 1) for i in range(10_000)], [0.999, *[1e-9] * 9_999]])
def test_ten_thousand_sources_and_two_billion_samples(weights):
    tracemalloc.start()
    order = MixtureOrder({f"s{i:05d}": 200_000 for i in range(10_000)}, {f"s{i:05d}": weight for i, weight in enumerate(weights)}, 3)
    first = order.locate(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20
    assert order.max_error < 1.2
    assert order.counts(1)[first.source] == 1
    samples = [2_099_999_999, 17, 1_234_567_890]
    sources, found, epochs = order.locate_many(samples)
    assert [(order.names[s], b, e) for s, b, e in zip(sources, found, epochs)] == [tuple(order.locate(i)) for i in samples]
    shares = quantise({f"s{i:05d}": weight for i, weight in enumerate(weights)})
    counts = order.counts(2_100_000_000)
    assert sum(counts.values()) == 2_100_000_000
    assert all(abs(counts[name] - 2_100_000_000 * share / RESOLUTION) <= order.max_error + 1e-3 for name, share in shares.items())


rests = st.dictionaries(names, st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(1, 40)), max_size=6)


@given(mixtures, rests, st.dictionaries(names, st.integers(0, 90)), st.lists(st.integers(0, 2**40 - 1), max_size=40))
@quick
def test_many_samples_at_once_are_where_each_is_alone(mixture, rest, start, far):
    order = MixtureOrder({k: blocks for k, (_, blocks) in mixture.items()}, {k: w for k, (w, _) in mixture.items()}, 2, start, {k: Rest(*r) for k, r in rest.items()})
    samples = [*range(60), *far]
    sources, found, epochs = order.locate_many(samples)
    assert [(order.names[s], b, e) for s, b, e in zip(sources.tolist(), found.tolist(), epochs.tolist())] == [tuple(order.locate(i)) for i in samples]


@given(mixtures, rests, st.integers(0, 3))
@quick
def test_a_rest_comes_before_the_whole_epochs_that_follow_it(mixture, rest, seed):
    order = MixtureOrder({k: blocks for k, (_, blocks) in mixture.items()}, {k: w for k, (w, _) in mixture.items()}, seed, None, {k: Rest(*r) for k, r in rest.items()})
    visits = {}
    for i in range(400):
        source, block, epoch = order.locate(i)
        visits.setdefault(source, []).append((epoch, block))
        standing = order.position(source, len(visits[source]))
        assert standing[0] in (epoch, epoch + 1)
    for source, seen in visits.items():
        at = 0
        epoch = rest[source][0] if source in rest else 0
        while at < len(seen):
            size = rest[source][2] if source in rest and epoch == rest[source][0] else mixture[source][1]
            part = seen[at : at + size]
            assert {e for e, _ in part} == {epoch}
            assert len({b for _, b in part}) == len(part)
            assert all(0 <= b < size for _, b in part)
            at, epoch = at + size, epoch + 1


def test_the_fingerprint_tells_orders_apart():
    blocks, weights = {"a": 9, "b": 4}, {"a": 0.5, "b": 0.5}
    orders = [
        MixtureOrder(blocks, weights, 0), MixtureOrder(blocks, weights, 1), MixtureOrder({"a": 9, "b": 5}, weights, 0), MixtureOrder(blocks, {"a": 0.6, "b": 0.4}, 0),
        MixtureOrder(blocks, weights, 0, {"a": 1}), MixtureOrder(blocks, weights, 0, None, {"a": Rest(0, 1, 3)}),
    ]
    assert len({order.fingerprint for order in orders}) == len(orders)
    assert MixtureOrder(dict(reversed(blocks.items())), {"a": 2, "b": 2}, 0, {"a": 0}).fingerprint == orders[0].fingerprint


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
    alone = [permuted(i, size, key) for i in range(size)]
    assert sorted(alone) == list(range(size))
    assert permuted_many(np.arange(size), size, key).tolist() == alone


@given(st.integers(1, 2**61), st.integers(0, 2**63 - 1), st.data())
@quick
def test_permuted_many_of_any_size(size, key, data):
    index = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=5))
    assert permuted_many(np.asarray(index, np.uint64), size, key).tolist() == [permuted(i, size, key) for i in index]


def test_permuted_looks_random():
    """Mean distance between neighbours of a random permutation is n/3."""
    values = [permuted(i, 3000, 99) for i in range(3000)]
    steps = [abs(a - b) for a, b in pairwise(values)]
    assert abs(sum(steps) / len(steps) - 1000) < 60


def test_quantised_weights_sum_exactly():
    assert sum(quantise({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3, "d": 1e-9}).values()) == RESOLUTION
    assert quantise({"a": 2.0, "b": 0.0}) == {"a": RESOLUTION}


@given(adversarial)
@quick
def test_every_weight_above_zero_counts(weights):
    counts = quantise({str(i): weight for i, weight in enumerate(weights)})
    assert sum(counts.values()) == RESOLUTION
    assert len(counts) == len(weights)
    assert min(counts.values()) >= 1


@pytest.mark.parametrize("weights", [{}, {"a": 0.0}, {"a": -1.0}, {"a": float("nan")}, {"a": float("inf")}, {"z": 1.0}, {"empty": 1.0}])
def test_wrong_weights(weights):
    with pytest.raises(DataError):
        MixtureOrder({"a": 3, "empty": 0}, weights, 0)


def test_ten_thousand_sources_of_one_short_document_are_named_by_their_number():
    blocks = {f"s{i}": 0 for i in range(10_000)}
    with pytest.raises(DataError, match=r"10000 of 10000(?s:.)*and 9992 more(?s:.)*join them into larger sources"):
        MixtureOrder(blocks, dict.fromkeys(blocks, 1.0), 0)


def test_a_negative_sample():
    order = MixtureOrder({"a": 3}, {"a": 1.0}, 0)
    with pytest.raises(DataError, match="0 or more"):
        order.locate(-1)
    with pytest.raises(DataError, match="0 or more"):
        order.locate_many([3, -1])
