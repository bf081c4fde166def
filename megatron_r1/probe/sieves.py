"""From the candidates of one source to those worth probing with: each rule counts what it received and let through."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_r1.artifacts.probe import SieveRecord
from megatron_r1.probe.config import ProbeConfig
from megatron_r1.probe.overlap import NearDuplicates, OverlapIndex
from megatron_r1.utils.errors import DataError
from megatron_r1.utils.seeding import generator


@dataclass(frozen=True)
class Candidate:
    """A window of a document of the probe split."""

    source: str
    index: int
    id: str
    start: int
    tokens: np.ndarray  # int [n]


@dataclass
class SourceSieve:
    """The candidates of one source that are still in, and what happened so far."""

    source: str
    left: list[Candidate]
    records: list[SieveRecord] = field(default_factory=list)

    def keep(self, name: str, keep: Callable[[Candidate], bool], relax: str) -> None:
        """Apply one rule. Raises DataError when it leaves nothing: which rule, and how to relax it."""
        passed = [candidate for candidate in self.left if keep(candidate)]
        self.record(name, len(self.left), len(passed), relax)
        self.left = passed

    def record(self, name: str, entered: int, left: int, relax: str) -> None:
        """Note the counts of a rule, and refuse an empty result."""
        self.records.append(SieveRecord(name=name, source=self.source, entered=entered, left=left))
        if left == 0:
            history = ", ".join(f"{record.name} {record.entered}->{record.left}" for record in self.records)
            raise DataError(
                expected=f"at least one probe document of {self.source!r} after the sieve {name!r}",
                found=f"none of {entered} (sieves so far: {history})",
                fix=f"{relax}, or leave {self.source!r} out of the probe's capabilities",
            )


def draw(config: ProbeConfig, source: str, shard: Any) -> SourceSieve:
    """Candidates of one source in keyed random order, cut to their windows; the length rules are applied here."""
    rules = config.rules
    total = len(shard)
    sieve = SourceSieve(source, [])
    order = generator(config.seed or 0, "probe order", source).permutation(total)
    places = generator(config.seed or 0, "probe window", source).random(total)
    chosen = order[: rules.candidates]
    sieve.record("draw", total, len(chosen), "give the corpus a larger probe split (its `splits` setting)")
    lengths = np.asarray(shard.lengths)[chosen]
    upper = np.inf if rules.max_tokens is None else rules.max_tokens
    fits = (lengths >= rules.min_tokens) & (lengths <= upper)
    sieve.record(
        "length",
        len(chosen),
        int(fits.sum()),
        f"lower rules.min_tokens ({rules.min_tokens}) or raise rules.max_tokens ({rules.max_tokens})",
    )
    ids = shard.ids
    for index, place in zip(chosen[fits].tolist(), places[: len(chosen)][fits].tolist()):
        tokens = np.asarray(shard.tokens(index))
        spare = max(len(tokens) - (config.tokens_per_document + 1), 0)
        start = int(place * (spare + 1)) if config.window == "random" else 0
        window = np.array(tokens[start : start + config.tokens_per_document + 1])
        sieve.left.append(Candidate(source, index, ids[index], start, window))
    return sieve


def drop_duplicates(config: ProbeConfig, sieves: list[SourceSieve]) -> None:
    """Exact and near duplicates, across all sources: the first in keyed order stays."""
    exact: set[bytes] = set()
    near = NearDuplicates(config.rules.near_duplicate)
    threshold = config.rules.near_duplicate

    def unseen(candidate: Candidate) -> bool:
        key = np.ascontiguousarray(candidate.tokens, dtype="<i4").tobytes()
        fresh = key not in exact
        exact.add(key)
        return fresh

    for sieve in sieves:
        sieve.keep("exact duplicates", unseen, "check the corpus step's de-duplication")
        sieve.keep(
            "near duplicates",
            lambda candidate: not near.seen(candidate.tokens),
            f"raise rules.near_duplicate ({threshold:g})",
        )


def drop_overlap(
    config: ProbeConfig,
    sieves: list[SourceSieve],
    name: str,
    body: Iterator[np.ndarray],
    advance: Callable[[int], None],
) -> None:
    """Windows that share too many n-grams with a body of documents, streamed once for all sources."""
    rules = config.rules
    every = [candidate for sieve in sieves for candidate in sieve.left]
    index = OverlapIndex([candidate.tokens for candidate in every], rules.ngram)
    for stretch in body:
        index.stream(stretch)
        advance(len(stretch))
    shares = {id(candidate): share for candidate, share in zip(every, index.shares())}
    for sieve in sieves:
        sieve.keep(
            name,
            lambda candidate: shares[id(candidate)] <= rules.max_overlap,
            f"raise rules.max_overlap ({rules.max_overlap:g})",
        )
