"""Which block comes next: a pure function of the sample number. No index, no state, no file.

**Shares.** Sources are the leaves of a binary tree. A node that has handed out n samples has given round(n * p) of them to
its left child (p: the left child's part of the node's weight) and the others to its right child. Both counts never fall as
n grows, so "how many samples of source s are among the first n" is a walk down the tree in integer arithmetic: exact, the
same on every machine, O(sources) time and memory for any n. A rounding errs by at most 1/2 and is divided on the way down,
so a leaf of weight w is off by at most 1/2 * w * sum of 1/weight over its ancestors below the root, itself included
(`max_error`); the tree is chosen to make that small: about one sample for any weights.

**Blocks.** The k-th sample of a source is block pi_e(k mod n) of its n blocks in epoch e = k div n, where pi_e is a keyed
permutation (a Feistel network on the next power of four, walked until it lands inside). Every block is visited once
per epoch, in an order that depends on (seed, source, epoch) only: weights may change at any sample with nothing lost or
repeated, by handing the old order's `counts` to the new one as `start`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from megatron_r1.utils.errors import DataError
from megatron_r1.utils.seeding import derive_seed

RESOLUTION = 1 << 40
"""Weights are rounded to multiples of 1/RESOLUTION, so shares drift by less than a sample in 10^12."""
_MASK = (1 << 64) - 1
_ROUNDS = 6
_WIDE = 8
"""Runs of more leaves than this do not try every cut when the tree is built."""


class Located(NamedTuple):
    """Where a sample is: the source, its block and how often the source had been passed through before."""

    source: str
    block: int
    epoch: int


@dataclass(frozen=True, slots=True)
class _Node:
    total: int
    name: str = ""
    left: _Node | None = None
    right: _Node | None = None


def quantise(weights: Mapping[str, float]) -> dict[str, int]:
    """Weights as integers that sum to RESOLUTION: largest remainders first. Raises DataError for weights that are no weights."""
    bad = {name: weight for name, weight in weights.items() if not weight >= 0 or weight == float("inf")}
    total = sum(weights.values())
    if bad or not total > 0:
        raise DataError(
            expected="weights that are finite, not negative and not all zero", found=f"{bad or dict(weights)}", fix="correct the mixture's weights"
        )
    exact = {name: weight / total * RESOLUTION for name, weight in weights.items() if weight > 0}
    counts = {name: int(value) for name, value in exact.items()}
    order = sorted(exact, key=lambda name: (counts[name] - exact[name], name))
    rest = RESOLUTION - sum(counts.values())
    for i in range(abs(rest)):
        counts[order[i % len(order)]] += 1 if rest > 0 else -1
    return {name: count for name, count in counts.items() if count > 0}


def _build(leaves: tuple[tuple[int, str], ...]) -> tuple[float, _Node]:
    """(largest possible error, tree) over leaves sorted by falling weight; every subtree is a run of that sequence.

    Runs of up to _WIDE leaves try every cut; wider ones take the cut that is best if halving went on below it.
    """
    sums = [0]
    for weight, _ in leaves:
        sums.append(sums[-1] + weight)

    def middle(i: int, j: int) -> int:
        return min(range(i + 1, j), key=lambda k: abs(2 * sums[k] - sums[i] - sums[j]))

    def halved(i: int, j: int, above: float) -> float:
        if j - i == 1:
            return 0.5 * leaves[i][0] * above
        return after_cut(i, j, middle(i, j), above)

    def after_cut(i: int, j: int, k: int, above: float) -> float:
        return max(halved(i, k, above + 1 / (sums[k] - sums[i])), halved(k, j, above + 1 / (sums[j] - sums[k])))

    def cuts(i: int, j: int, above: float) -> list[int]:
        if j - i <= _WIDE:
            return list(range(i + 1, j))
        half = middle(i, j)
        near = sorted(k for k in {half - 1, half, half + 1, i + 1, j - 1} if i < k < j)
        return [min(near, key=lambda k: after_cut(i, j, k, above))]

    def build(i: int, j: int, above: float) -> tuple[float, _Node]:
        if j - i == 1:
            return 0.5 * leaves[i][0] * above, _Node(*leaves[i])
        found: tuple[float, _Node] | None = None
        for k in cuts(i, j, above):
            left, right = above + 1 / (sums[k] - sums[i]), above + 1 / (sums[j] - sums[k])
            if found is not None and 0.5 * max(leaves[i][0] * left, leaves[k][0] * right) >= found[0]:
                continue
            error_l, tree_l = build(i, k, left)
            if found is not None and error_l >= found[0]:
                continue
            error_r, tree_r = build(k, j, right)
            if found is None or max(error_l, error_r) < found[0]:
                found = max(error_l, error_r), _Node(sums[j] - sums[i], left=tree_l, right=tree_r)
        assert found is not None
        return found

    return build(0, len(leaves), 0.0)


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


class MixtureOrder:
    """The order of samples of a mixture.

    blocks: source -> number of blocks in one epoch; weights: source -> share (any positive scale; zeros are left out);
    seed: keys the permutations; start: source -> blocks already consumed by earlier phases (their `counts`).
    Raises DataError for weights of unknown or empty sources.
    """

    def __init__(self, blocks: Mapping[str, int], weights: Mapping[str, float], seed: int, start: Mapping[str, int] | None = None) -> None:
        unknown = sorted(set(weights) - set(blocks))
        if unknown:
            raise DataError(
                expected=f"weights of sources that have data ({', '.join(sorted(blocks))})", found=f"weights of {', '.join(unknown)}",
                fix="correct the names in the mixture, or use the shards it was made for",
            )
        quantised = quantise(weights)
        empty = sorted(name for name in quantised if blocks[name] <= 0)
        if empty:
            raise DataError(
                expected="at least one block in every source with a weight above zero", found=f"none in {', '.join(empty)}",
                fix="give these sources weight zero, add documents, or use a shorter sequence",
            )
        self.blocks = {name: int(count) for name, count in blocks.items()}
        self.seed = int(seed)
        self.start = {name: int((start or {}).get(name, 0)) for name in self.blocks}
        self.weights = {name: count / RESOLUTION for name, count in quantised.items()}
        leaves = tuple(sorted(((count, name) for name, count in quantised.items()), key=lambda leaf: (-leaf[0], leaf[1])))
        self.max_error, self._root = _build(leaves)
        self._keys: dict[tuple[str, int], int] = {}

    def counts(self, n_samples: int) -> dict[str, int]:
        """Blocks of every source consumed after the first `n_samples` samples, `start` included."""
        counts = dict(self.start)
        stack = [(self._root, int(n_samples))]
        while stack:
            node, n = stack.pop()
            if node.left is None or node.right is None:
                counts[node.name] += n
                continue
            first = (2 * n * node.left.total + node.total) // (2 * node.total)
            stack += [(node.left, first), (node.right, n - first)]
        return counts

    def locate(self, sample_index: int) -> Located:
        """Source, block (0 <= block < blocks[source]) and epoch of a sample (0-based)."""
        if sample_index < 0:
            raise DataError(expected="a sample number of 0 or more", found=str(sample_index), fix="count samples from 0")
        node, n = self._root, int(sample_index)
        while node.left is not None and node.right is not None:
            double, weight, total = 2 * n * node.left.total, 2 * node.left.total, node.total
            before, after = (double + total) // (2 * total), (double + weight + total) // (2 * total)
            node, n = (node.left, before) if after > before else (node.right, n - before)
        cursor = self.start[node.name] + n
        epoch, position = divmod(cursor, self.blocks[node.name])
        return Located(node.name, permuted(position, self.blocks[node.name], self._key(node.name, epoch)), epoch)

    def _key(self, source: str, epoch: int) -> int:
        key = self._keys.get((source, epoch))
        if key is None:
            if len(self._keys) > 4096:
                self._keys.clear()
            key = self._keys[source, epoch] = derive_seed(self.seed, "mixture_order", source, epoch)
        return key
