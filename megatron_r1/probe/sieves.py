"""From the candidates of one source to those worth probing with: each rule counts what it received and let through.

Candidates are columns of numbers; a window's tokens are read when a rule looks at them, so that millions of candidates fit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_r1.artifacts.probe import SieveRecord
from megatron_r1.probe.config import ProbeConfig
from megatron_r1.probe.overlap import NearDuplicates, OverlapIndex
from megatron_r1.utils.errors import DataError
from megatron_r1.utils.seeding import generator


@dataclass
class SourceSieve:
    """The candidates of one source that are still in, in keyed random order, and what happened so far."""

    source: str
    shard: Any
    index: np.ndarray  # int64 [n], position of the document in its split
    start: np.ndarray  # int64 [n], first token of the window in the document
    place: np.ndarray  # int64 [n], the same in the split's tokens end to end
    size: np.ndarray  # int64 [n], tokens of the window
    score: np.ndarray  # float64 [n], of the last rule that scores; 0 before
    records: list[SieveRecord] = field(default_factory=list)

    def __len__(self) -> int:
        """Candidates that are still in."""
        return len(self.index)

    def window(self, i: int) -> np.ndarray:
        """Tokens of candidate i, [size(i)]."""
        return np.asarray(self.shard.read(int(self.place[i]), int(self.size[i])))

    def windows(self) -> Iterator[np.ndarray]:
        """Tokens of every candidate, one after the other."""
        return (self.window(i) for i in range(len(self)))

    def keep(self, name: str, passed: np.ndarray, fix: str, threshold: str = "", relaxed: str = "") -> None:
        """Apply one rule: `passed` bool [n]. Raises DataError when it leaves nothing: which rule, and how to relax it."""
        self.record(name, len(self), int(passed.sum()), fix, threshold, relaxed)
        for column in ("index", "start", "place", "size", "score"):
            setattr(self, column, getattr(self, column)[passed])

    def record(self, name: str, entered: int, left: int, fix: str, threshold: str = "", relaxed: str = "") -> None:
        """Note the counts of a rule, and refuse an empty result."""
        self.records.append(SieveRecord(name=name, source=self.source, entered=entered, left=left, threshold=threshold, relaxed=relaxed))
        if left == 0:
            history = ", ".join(f"{record.name} {record.entered}->{record.left}" for record in self.records)
            raise DataError(
                expected=f"at least one probe document of {self.source!r} after the sieve {name!r}",
                found=f"none of {entered} (sieves so far: {history})",
                fix=f"{fix}, or leave {self.source!r} out of the probe's capabilities",
            )


def draw(config: ProbeConfig, source: str, shard: Any) -> SourceSieve:
    """Candidates of one source in keyed random order, cut to their windows; the length rules are applied here."""
    rules = config.rules
    total = len(shard)
    order = generator(config.seed or 0, "probe order", source).permutation(total)
    places = generator(config.seed or 0, "probe window", source).random(total)
    chosen = order[: rules.candidates]
    lengths = np.asarray(shard.lengths)[chosen].astype(np.int64)
    spare = np.maximum(lengths - (config.tokens_per_document + 1), 0)
    start = (places[: len(chosen)] * (spare + 1)).astype(np.int64) if config.window == "random" else np.zeros(len(chosen), np.int64)
    place = np.asarray(shard.offsets)[chosen] + start
    sieve = SourceSieve(source, shard, chosen, start, place, np.minimum(lengths, config.tokens_per_document + 1), np.zeros(len(chosen)))
    sieve.record("draw", total, len(chosen), "give the corpus a larger probe split (its `splits` setting)")
    upper = np.inf if rules.max_tokens is None else rules.max_tokens
    sieve.keep(
        "length",
        (lengths >= rules.min_tokens) & (lengths <= upper),
        f"lower rules.min_tokens ({rules.min_tokens}) or raise rules.max_tokens ({rules.max_tokens})",
    )
    return sieve


def drop_exact_duplicates(sieves: Sequence[SourceSieve]) -> None:
    """Windows with the same tokens, across all sources: the first in keyed order stays."""

    def digest(tokens: np.ndarray) -> int:
        return int.from_bytes(hashlib.blake2b(np.ascontiguousarray(tokens, dtype="<i4").tobytes(), digest_size=8).digest(), "little")

    digests = np.concatenate([np.fromiter(map(digest, sieve.windows()), np.uint64, len(sieve)) for sieve in sieves])
    first = np.zeros(len(digests), bool)
    first[np.unique(digests, return_index=True)[1]] = True
    for sieve, passed in zip(sieves, split(first, sieves)):
        sieve.keep("exact duplicates", passed, "check the corpus step's de-duplication")


def drop_near_duplicates(config: ProbeConfig, sieves: Sequence[SourceSieve]) -> None:
    """Windows that share most of their 5-grams with an earlier one, across all sources."""
    near = NearDuplicates(config.rules.near_duplicate)
    for sieve in sieves:
        fresh = np.fromiter((not near.seen(tokens) for tokens in sieve.windows()), bool, len(sieve))
        sieve.keep("near duplicates", fresh, f"raise rules.near_duplicate ({config.rules.near_duplicate:g})")


def drop_overlap(
    config: ProbeConfig,
    sieves: Sequence[SourceSieve],
    name: str,
    body: Iterator[np.ndarray],
    advance: Callable[[int], None],
) -> None:
    """Windows that share too many n-grams with a body of documents, streamed once for all sources."""
    rules = config.rules
    index = OverlapIndex([tokens for sieve in sieves for tokens in sieve.windows()], rules.ngram)
    for stretch in body:
        index.stream(stretch)
        advance(len(stretch))
    for sieve, shares in zip(sieves, split(index.shares(), sieves)):
        sieve.keep(name, shares <= rules.max_overlap, f"raise rules.max_overlap ({rules.max_overlap:g})")


def split(values: np.ndarray, sieves: Sequence[SourceSieve]) -> list[np.ndarray]:
    """Values of all candidates, source after source, [N, ...] -> those of each source."""
    return np.split(values, np.cumsum([len(sieve) for sieve in sieves])[:-1])


def best(scores: np.ndarray, count: int) -> np.ndarray:
    """bool [n]: the `count` highest scores; of equal ones the first."""
    chosen = np.zeros(len(scores), bool)
    chosen[np.argsort(-scores, kind="stable")[:count]] = True
    return chosen


def above(scores: np.ndarray, literal: float, lower: float, fewest: int) -> tuple[np.ndarray, str, str]:
    """Which scores pass (bool [n]), the threshold, and how it was relaxed: score > literal; fewer than `fewest` -> score >= lower;
    still fewer -> the best `fewest`."""
    passed = scores > literal
    if passed.sum() >= fewest:
        return passed, f"score > {literal:g}", ""
    said = f"{passed.sum()} of {len(scores)} scored above {literal:g}, fewer than {fewest}"
    passed = scores >= lower
    if passed.sum() >= fewest:
        return passed, f"score >= {lower:g}", f"{said}: {lower:g} is enough"
    return *_best(scores, fewest), f"{said}, and {passed.sum()} reached {lower:g}: the best {min(fewest, len(scores))}"


def top(scores: np.ndarray, share: float, fewest: int) -> tuple[np.ndarray, str, str]:
    """Which scores pass (bool [n]), the threshold, and how it was relaxed: the highest `share`; fewer than `fewest` -> the best
    `fewest`."""
    count = round(share * len(scores))
    if count >= fewest:
        passed, _ = _best(scores, count)
        return passed, f"best {100 * share:g} %", ""
    return *_best(scores, fewest), f"{100 * share:g} % of {len(scores)} are {count}, fewer than {fewest}: the best {min(fewest, len(scores))}"


def _best(scores: np.ndarray, count: int) -> tuple[np.ndarray, str]:
    passed = best(scores, count)
    return passed, f"best {min(count, len(scores))}: score >= {scores[passed].min():.4g}" if passed.any() else ""
