"""Which block comes next: a pure function of the sample number. No index, no state, no file.

**Shares.** Sources are the leaves of a binary tree. A node that has handed out n samples has given round(n * p) of them to
its left child (p: the left child's part of the node's weight) and the others to its right child. Both counts never fall as
n grows, so "how many samples of source s are among the first n" is a walk down the tree in integer arithmetic: exact, the
same on every machine, O(sources) time and memory for any n.

**How exact.** A rounding errs by at most 1/2 and is divided on the way down, so after any number of samples a leaf of weight w
is off by at most 1/2 * w * sum of 1/W over its ancestors below the root, itself included. `max_error` is the largest of these:
a bound that holds at every prefix, reached by some; in a window (from any sample to any other) it holds twice over. The tree is
chosen to make it small: about one sample (0.5 to 1.1 for what people train on), never more than 1.68 for any weights (`_build`).

**Blocks.** The k-th sample of a source is block pi_e(k mod n) of its n blocks in epoch e = k div n, where pi_e is a keyed
permutation (a Feistel network on the next power of four, walked until it lands inside). Every block is visited once
per epoch, in an order that depends on (seed, source, epoch) only: weights may change at any sample with nothing lost or
repeated, by handing the old order's `counts` to the new one as `start`. An epoch may begin with a `Rest`: what is left of an
epoch begun on other blocks (data/carry.py).
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from megatron_r1.utils.errors import DataError
from megatron_r1.utils.seeding import derive_seed

VERSION = 2
"""Of the order: part of `fingerprint`, to be raised when the same settings give another order."""
RESOLUTION = 1 << 40
"""Weights are rounded to multiples of 1/RESOLUTION, so shares drift by less than a sample in 10^12."""
_MASK = (1 << 64) - 1
_ROUNDS = 6
_TRIES = [(math.inf, 1), *((target, look) for target in (1.0, 1.03, 1.1, 1.2) for look in (1, 2))]
"""(target, look) of the trees that are made; the one with the smallest error is taken."""
_MANY = 1000
"""Of more sources only the first three trees are made: their errors differ little, and starting should take no time."""


class Located(NamedTuple):
    """Where a sample is: the source, its block and how often the source had been passed through before."""

    source: str
    block: int
    epoch: int


class Rest(NamedTuple):
    """What is left of epoch `epoch` of a source after a change of its blocks: `blocks` blocks of their own, its `leg`-th part (from 1)."""

    epoch: int
    leg: int
    blocks: int


def quantise(weights: Mapping[str, float]) -> dict[str, int]:
    """Weights as integers that sum to RESOLUTION: largest remainders first, and at least 1 for every weight above 0.

    Raises DataError for weights that are no weights.
    """
    bad = {name: weight for name, weight in weights.items() if not 0 <= weight < math.inf}
    largest = max(weights.values(), default=0.0) if not bad else 0.0
    if bad or not largest > 0:
        shown = dict(list((bad or weights).items())[:8])
        raise DataError(
            expected="weights that are finite, not negative and not all zero", found=f"{len(bad or weights)} that are not: {shown}" if bad else f"{shown or 'none'}",
            fix="correct the mixture's weights",
        )
    # Divided by the largest first: a sum of huge weights could overflow, one of tiny ones lose its digits.
    scaled = {name: weight / largest for name, weight in sorted(weights.items()) if weight > 0}
    total = math.fsum(scaled.values())
    exact = {name: weight / total * RESOLUTION for name, weight in scaled.items()}
    counts = {name: max(1, int(value)) for name, value in exact.items()}
    rest = RESOLUTION - sum(counts.values())
    if rest > 0:
        for name in sorted(exact, key=lambda name: (counts[name] - exact[name], name))[:rest]:
            counts[name] += 1
            rest -= 1
    # What is left comes of rounding tiny weights up to 1, and of the division's last bits.
    counts[max(counts, key=lambda name: (counts[name], name))] += rest
    return counts


class _Tree(NamedTuple):
    """Nodes 0 ... leaves - 1 are the leaves; node i above them has children left[i], right[i] (-1 for leaves). The last is the root."""

    weight: list[int]
    left: list[int]
    right: list[int]

    def errors(self) -> list[float]:
        """Largest possible error of every leaf."""
        above = [0.0] * len(self.weight)
        for node in range(len(self.weight) - 1, -1, -1):
            if self.left[node] >= 0:
                for child in (self.left[node], self.right[node]):
                    above[child] = above[node] + 1 / self.weight[child]
        return [0.5 * weight * up for weight, up, child in zip(self.weight, above, self.left) if child < 0]


def _merged(leaves: Sequence[int], target: float, look: int) -> _Tree:
    """Join the two nodes with the most room until one is left.

    The room of a node is how large the sum of 1/W over its ancestors (but the root) may become before a leaf below it errs by
    more than `target`: (2 target - 1) / w for a leaf, and for a node the smaller room of its children less its own 1/W. With the
    most roomy node goes the one of the next `look` that leaves the most room. target = infinity stands for room = 1/W: Huffman's tree.
    """
    tree = _Tree(list(leaves), [-1] * len(leaves), [-1] * len(leaves))
    huffman = math.isinf(target)
    heap = [(-(1.0 if huffman else 2 * target - 1) / weight, node) for node, weight in enumerate(leaves)]
    heapq.heapify(heap)
    while len(heap) > 1:
        room, a = heapq.heappop(heap)
        near = [heapq.heappop(heap) for _ in range(min(look, len(heap)))]
        rooms = [-1 / (tree.weight[a] + tree.weight[b]) if huffman else max(room, other) + 1 / (tree.weight[a] + tree.weight[b]) for other, b in near]
        best = min(range(len(near)), key=rooms.__getitem__)
        b = near.pop(best)[1]
        for item in near:
            heapq.heappush(heap, item)
        a, b = sorted((a, b), key=lambda node: (-tree.weight[node], node))
        tree.weight.append(tree.weight[a] + tree.weight[b])
        tree.left.append(a)
        tree.right.append(b)
        heapq.heappush(heap, (rooms[best], len(tree.weight) - 1))
    return tree


def _build(leaves: Sequence[int]) -> tuple[float, _Tree]:
    """(largest possible error, tree) over leaf weights: the best of a few trees, made in O(leaves log leaves) each.

    One is Huffman's, which proves the bound: of a leaf's ancestors there W_1 >= w, W_2 >= 2w and W_k+1 >= W_k + W_k-1, for what is joined to W_k
    was not smaller than either child of W_k; so the error is below 1/2 (1 + 1 + 1/2 + 1/3 + 1/5 + ...) = 1.68, the sum running over Fibonacci's numbers.
    """
    found: tuple[float, _Tree] | None = None
    for target, look in _TRIES if len(leaves) <= _MANY else _TRIES[:3]:
        tree = _merged(leaves, target, look)
        error = max(tree.errors())
        if found is None or error < found[0]:
            found = error, tree
    assert found is not None
    return found


def _share(n: np.ndarray, weight: np.ndarray, total: np.ndarray) -> np.ndarray:
    """round(n * weight / total), halves up, exactly. weight <= total <= RESOLUTION; int64 while n < 2^40, Python's integers above."""
    if n.dtype != object and n.size and int(n.max()) >= 1 << 40:
        n = n.astype(object)
    # Long division in digits of 20 bits: no intermediate result needs more than 62.
    high, rest = (n >> 20) * weight // total, (n >> 20) * weight % total
    return (high << 20) + ((rest << 20) + (n & 0xFFFFF) * weight + total // 2) // total


def _mix(value: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): a bijection of 64 bits that spreads every bit."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def permuted(index: int, size: int, key: int) -> int:
    """A bijection of range(size) chosen by `key`, evaluated at `index`: Feistel rounds, repeated until inside the range.

    The domain is at most four times the size, so four rounds of walking are expected at most.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low_mask = (1 << half) - 1
    while True:
        high, low = index >> half, index & low_mask
        for i in range(_ROUNDS):
            high, low = low, high ^ (_mix((key + low * _ROUNDS + i) & _MASK) & low_mask)
        index = high << half | low
        if index < size:
            return index


def permuted_many(index: np.ndarray, size: np.ndarray | int, key: np.ndarray | int) -> np.ndarray:
    """`permuted` of every element: int64[n]; size (below 2^62) and key one for all or one for each."""
    index = np.asarray(index).astype(np.uint64)
    sizes, keys = (np.broadcast_to(np.asarray(value, np.uint64), index.shape) for value in (size, key))
    # frexp gives the bit length exactly below 2^53; above, rounding up could give one more, which the comparison takes back.
    bits = np.frexp((sizes - np.uint64(1)).astype(np.float64))[1].astype(np.uint64)
    bits -= ((bits > 0) & ((sizes - np.uint64(1)) >> (np.maximum(bits, 1) - np.uint64(1)) == 0)).astype(np.uint64)
    halves = np.maximum(np.uint64(1), (bits + np.uint64(1)) // np.uint64(2))
    result, left = np.empty(index.shape, np.int64), np.arange(index.size)
    with np.errstate(over="ignore"):
        while left.size:
            half, key_of, size_of = halves[left], keys[left], sizes[left]
            mask = (np.uint64(1) << half) - np.uint64(1)
            high, low = index >> half, index & mask
            for i in range(_ROUNDS):
                value = key_of + low * np.uint64(_ROUNDS) + np.uint64(i)
                value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
                value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
                high, low = low, high ^ ((value ^ (value >> np.uint64(31))) & mask)
            index = high << half | low
            inside = index < size_of
            result[left[inside]] = index[inside].astype(np.int64)
            index, left = index[~inside], left[~inside]
    return result


def block_key(seed: int, source: str, epoch: int, leg: int = 0) -> int:
    """Key of the permutation of a source's blocks in an epoch, or in a later leg of it."""
    return derive_seed(seed, "mixture_order", source, epoch, *(["leg", leg] if leg else []))


class MixtureOrder:
    """The order of samples of a mixture.

    blocks: source -> number of blocks in one epoch; weights: source -> share (any positive scale; zeros are left out);
    seed: keys the permutations; rest: source -> blocks that come before the first whole epoch; start: source -> blocks already
    consumed by earlier phases (their `counts`), from the beginning of the rest, of epoch 0 where there is none.
    Raises DataError for weights of unknown or empty sources.
    """

    def __init__(
        self, blocks: Mapping[str, int], weights: Mapping[str, float], seed: int, start: Mapping[str, int] | None = None, rest: Mapping[str, Rest] | None = None
    ) -> None:
        unknown = sorted(set(weights) - set(blocks))
        if unknown:
            raise DataError(
                expected=f"weights of sources that have data ({_some(sorted(blocks))})", found=f"weights of {_some(unknown)}",
                fix="correct the names in the mixture, or use the shards it was made for",
            )
        quantised = quantise(weights)
        empty = sorted(name for name in quantised if blocks[name] <= 0)
        if empty:
            raise DataError(
                expected="at least one block in every source with a weight above zero", found=f"none in {len(empty)} of {len(quantised)}: {_some(empty)}",
                fix="give these sources weight zero, join them into larger sources, add documents, or use a shorter sequence",
            )
        self.blocks = {name: int(count) for name, count in blocks.items()}
        self.seed = int(seed)
        self.start = {name: int((start or {}).get(name, 0)) for name in self.blocks}
        self.rest = {name: Rest(*rest[name]) for name in self.blocks if name in rest} if rest else {}
        self.weights = {name: count / RESOLUTION for name, count in quantised.items()}
        leaves = sorted(((count, name) for name, count in quantised.items()), key=lambda leaf: (-leaf[0], leaf[1]))
        self.names = [name for _, name in leaves]
        """Sources with a weight, as `locate_many` numbers them."""
        self.max_error, self._tree = _build([count for count, _ in leaves])
        self._keys: dict[tuple[str, int], int] = {}
        self._weight, self._left, self._right = (np.asarray(values, np.int64) for values in self._tree)
        self._start, self._blocks = (np.asarray([of[name] for name in self.names], np.int64) for of in (self.start, self.blocks))
        rests = [self.rest.get(name, Rest(0, 0, 0)) for name in self.names]
        self._rest_blocks, self._rest_epoch = (np.asarray([value[i] for value in rests], np.int64) for i in (2, 0))

    @property
    def fingerprint(self) -> str:
        """What tells one order from another: equal fingerprints, equal samples."""
        content = [VERSION, self.seed, *([sorted(of.items()) for of in (self.weights, self.blocks, self.start, self.rest)])]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def counts(self, n_samples: int) -> dict[str, int]:
        """Blocks of every source consumed after the first `n_samples` samples, `start` included."""
        given = np.zeros(len(self._weight), np.int64 if n_samples < 1 << 40 else object)
        given[-1] = int(n_samples)
        nodes = np.asarray([len(self._weight) - 1])
        while (nodes := nodes[self._left[nodes] >= 0]).size:
            left, right = self._left[nodes], self._right[nodes]
            given[left] = _share(given[nodes], self._weight[left], self._weight[nodes])
            given[right] = given[nodes] - given[left]
            nodes = np.concatenate([left, right])
        return {**self.start, **{name: self.start[name] + n for name, n in zip(self.names, given[: len(self.names)].tolist())}}

    def locate(self, sample_index: int) -> Located:
        """Source, block (0 <= block < blocks[source], or of the rest's blocks while `epoch` is the rest's) and epoch of a sample (0-based)."""
        if sample_index < 0:
            raise DataError(expected="a sample number of 0 or more", found=str(sample_index), fix="count samples from 0")
        weights, lefts, rights = self._tree
        node, n = len(weights) - 1, int(sample_index)
        while lefts[node] >= 0:
            left, total = lefts[node], weights[node]
            double, weight = 2 * n * weights[left], 2 * weights[left]
            before, after = (double + total) // (2 * total), (double + weight + total) // (2 * total)
            node, n = (left, before) if after > before else (rights[node], n - before)
        name = self.names[node]
        epoch, position, size = self._place(name, self.start[name] + n)
        return Located(name, permuted(position, size, self._key(name, epoch)), epoch)

    def locate_many(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`locate` of many samples: number of the source in `names`, block, epoch, int64[n] each."""
        n = np.asarray(indices, np.int64)
        if n.size and int(n.min()) < 0:
            raise DataError(expected="sample numbers of 0 or more", found=str(int(n.min())), fix="count samples from 0")
        node, going = np.full(n.shape, len(self._weight) - 1), np.arange(n.size)
        n = n.copy()
        while (going := going[self._left[node[going]] >= 0]).size:
            at, here = node[going], n[going]
            weight, total = self._weight[self._left[at]], self._weight[at]
            before = _share(here, weight, total).astype(np.int64)
            to_left = _share(here + 1, weight, total).astype(np.int64) > before
            node[going] = np.where(to_left, self._left[at], self._right[at])
            n[going] = np.where(to_left, before, here - before)
        cursor, first = self._start[node] + n, self._rest_blocks[node]
        resting = cursor < first
        after = np.where(resting, cursor, cursor - first)
        size = np.where(resting, first, self._blocks[node])
        whole = np.where(first > 0, self._rest_epoch[node] + 1, 0) + after // size
        epoch = np.where(resting, self._rest_epoch[node], whole)
        pairs, which = np.unique(np.stack([node, epoch]), axis=1, return_inverse=True)
        keys = np.asarray([self._key(self.names[source], e) for source, e in pairs.T.tolist()], np.uint64)
        return node, permuted_many(after % size, size, keys[which.reshape(-1)] if n.size else 0), epoch

    def position(self, source: str, count: int) -> tuple[int, int, int]:
        """Where a source stands after `count` blocks (as `counts` counts them): epoch, leg of the epoch, blocks consumed of the leg."""
        epoch, taken, _ = self._place(source, count)
        rest = self.rest.get(source)
        return epoch, rest.leg if rest is not None and epoch == rest.epoch else 0, taken

    def _place(self, name: str, cursor: int) -> tuple[int, int, int]:
        """Epoch, position in it (or in the rest) and its blocks."""
        rest, size = self.rest.get(name), self.blocks[name]
        if rest is None:
            return *divmod(cursor, size), size
        if cursor < rest.blocks:
            return rest.epoch, cursor, rest.blocks
        epoch, position = divmod(cursor - rest.blocks, size)
        return rest.epoch + 1 + epoch, position, size

    def _key(self, source: str, epoch: int) -> int:
        key = self._keys.get((source, epoch))
        if key is None:
            if len(self._keys) > 1 << 16:
                self._keys.clear()
            rest = self.rest.get(source)
            leg = rest.leg if rest is not None and epoch == rest.epoch else 0
            key = self._keys[source, epoch] = block_key(self.seed, source, epoch, leg)
        return key


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
