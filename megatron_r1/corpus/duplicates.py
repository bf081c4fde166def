"""Which documents repeat earlier ones: three searches, each over all parts, each cut into buckets by hash.

    ids     two documents of a source with one id (only where the user's own field holds it)
    equal   texts that are the same but for white space
    near    texts that share most of their word n-grams (off unless `near_duplicates` is set)

A bucket holds the keys of a range of hashes: a slice of every part's sorted keys, so a bucket reads no more than its own, and
memory does not grow with the corpus. What a search drops is not seen by the next. The first document in the order of sources,
partitions and positions stays. The result of a bucket is the numbers of the documents to drop, in ascending order.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.corpus import near
from megatron_r1.corpus.plan import Job, Part
from megatron_r1.corpus.scratch import save

SEARCHES = ("ids", "equal", "near")
COMPARED = 1 << 14


def buckets(job: Job, search: str) -> list[str]:
    """Names of the buckets of a search; none where there is nothing to look for."""
    if not _parts(job, search):
        return []
    count = max(1, -(-job.documents // job.sizes.bucket))
    if search != "near":
        return [f"{number}/{count}" for number in range(count)]
    assert job.config.near_duplicates is not None
    every = near.HASHES // near.rows_of(job.config.near_duplicates.threshold)
    return [f"{number}/{count}/{band}" for band in range(every) for number in range(count)]


def _parts(job: Job, search: str) -> list[Part]:
    if search == "near" and job.config.near_duplicates is None:
        return []
    return [
        part for part in job.parts if part.documents
        and (job.plans[part.source].source.given_ids if search == "ids" else job.plans[part.source].source.deduplicate)
    ]


def result(job: Job, search: str, bucket: str) -> Path:
    """Where the numbers to drop are written."""
    return job.made / search / (bucket.replace("/", "-") + ".npy")


def look(job: Job, search: str, bucket: str) -> dict[str, Any]:
    """Search one bucket."""
    number, count, *band = map(int, bucket.split("/"))
    ends = [np.uint64((number << 64) // count), np.uint64(((number + 1 << 64) // count) - 1)]
    high, low, documents, sources = [], [], [], []
    for part in _parts(job, search):
        keys = np.load(part.file(f"{'keys' if search == 'equal' else search}.npy"), mmap_mode="r")
        keys = keys[band[0]] if band else keys
        here = slice(int(np.searchsorted(keys[0], ends[0], "left")), int(np.searchsorted(keys[0], ends[1], "right")))
        if here.stop > here.start:
            high.append(np.asarray(keys[0, here]))
            low.append(np.asarray(keys[1, here]) if not band else np.zeros(here.stop - here.start, np.uint64))
            documents.append(np.asarray(keys[-1, here]).astype(np.int64) + part.start)
            across = job.config.across_sources and search != "ids"
            sources.append(np.full(here.stop - here.start, 0 if across else job.plans[part.source].number, np.int32))
    dropped = np.zeros(0, np.int64)
    if documents:
        key, second, who, where = np.concatenate(high), np.concatenate(low), np.concatenate(documents), np.concatenate(sources)
        gone = _gone(job, search, who)
        key, second, who, where = key[~gone], second[~gone], who[~gone], where[~gone]
        order = np.lexsort((who, where, second, key))
        key, second, who, where = key[order], second[order], who[order], where[order]
        again = np.zeros(len(who), bool)
        again[1:] = (key[1:] == key[:-1]) & (second[1:] == second[:-1]) & (where[1:] == where[:-1])
        firsts = who[np.maximum.accumulate(np.where(again, 0, np.arange(len(who))))]
        dropped, firsts = who[again], firsts[again]
        if band:
            dropped = dropped[_alike(job, dropped, firsts)]
    save(result(job, search, bucket), np.sort(dropped))
    return {"dropped": len(dropped)}


def _gone(job: Job, search: str, who: np.ndarray) -> np.ndarray:
    """bool[n]: dropped by an earlier search."""
    gone = np.zeros(len(who), bool)
    for earlier in SEARCHES[: SEARCHES.index(search)]:
        for bucket in buckets(job, earlier):
            gone |= _among(np.load(result(job, earlier, bucket), mmap_mode="r"), who)
    return gone


def _among(ascending: np.ndarray, values: np.ndarray) -> np.ndarray:
    if not len(ascending):
        return np.zeros(len(values), bool)
    at = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return np.asarray(ascending[at] == values)


def _alike(job: Job, who: np.ndarray, firsts: np.ndarray) -> np.ndarray:
    """bool[n]: whether the signatures of the pairs agree as often as the threshold says."""
    assert job.config.near_duplicates is not None
    alike = np.zeros(len(who), bool)
    for start in range(0, len(who), COMPARED):
        one, other = (_signatures(job, numbers[start : start + COMPARED]) for numbers in (who, firsts))
        alike[start : start + COMPARED] = (one == other).mean(axis=1) >= job.config.near_duplicates.threshold
    return alike


def _signatures(job: Job, numbers: np.ndarray) -> np.ndarray:
    found = np.empty((len(numbers), near.HASHES), np.uint16)
    parts = job.parts
    belongs = np.searchsorted(job.starts, numbers, "right") - 1
    for index in np.unique(belongs):
        part = parts[index]
        mine = belongs == index
        found[mine] = np.load(part.file("sketch.npy"), mmap_mode="r")[numbers[mine] - part.start]
    return found


REASONS = ("", "repeated id", "duplicate", "near_duplicate")
"""Why a document is dropped, by the code in `reasons`; the order is that of SEARCHES."""


def reasons(job: Job, parts: list[Part]) -> Iterator[np.ndarray]:
    """Of every document of each of the parts a code: 0 stays, else a place in REASONS. uint8[documents]."""
    found = [
        (code, np.load(result(job, search, bucket), mmap_mode="r"))
        for code, search in enumerate(SEARCHES, 1) for bucket in buckets(job, search)
    ]
    for part in parts:
        codes = np.zeros(part.documents, np.uint8)
        for code, numbers in found:
            first, last = np.searchsorted(numbers, [part.start, part.start + part.documents])
            mine = np.asarray(numbers[first:last]) - part.start
            codes[mine[codes[mine] == 0]] = code
        yield codes
