"""Near-duplicates: MinHash of word n-grams, found by locality-sensitive hashing in bands.

A text's signature holds, for each of HASHES random orders of all n-grams, the first n-gram the text has. Two texts agree in one
place with a probability equal to the Jaccard similarity of their sets of n-grams. Signatures are cut into bands of `rows`
places; texts with an equal band are compared by their whole signatures. `rows` is the largest for which a pair exactly at
the threshold has an equal band with probability FOUND or more.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np

from megatron_r1.corpus.filters import stretches

HASHES = 128
FOUND = 0.95
CHUNK = 1 << 14
_WORD = re.compile(r"\w+")
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mixed(values: np.ndarray) -> np.ndarray:
    """uint64 -> uint64, every bit of the result depending on every bit (splitmix64's finaliser)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


_ODD = _mixed(np.arange(1, HASHES + 1, dtype=np.uint64) * _GOLDEN) | np.uint64(1)
_PLUS = _mixed(np.arange(1001, HASHES + 1001, dtype=np.uint64) * _GOLDEN)


def grams(text: str, ngram: int) -> np.ndarray:
    """Hashes uint64 of the different word n-grams of a text; of all its words when they are fewer, of the text when it has none.
    Case, punctuation and layout do not count."""
    words = np.array([zlib.crc32(word.encode("utf-8")) for part in stretches(text) for word in _WORD.findall(part.lower())] or [zlib.crc32(text.encode("utf-8"))], np.uint64)
    n = min(ngram, len(words))
    rolled = np.zeros(len(words) - n + 1, np.uint64)
    for i in range(n):
        rolled = _mixed(rolled * _GOLDEN + words[i : len(words) - n + 1 + i] + np.uint64(i + 1))
    return np.unique(rolled)


def sketch(text: str, ngram: int) -> np.ndarray:
    """Signature uint64[HASHES] of a text, whose n-grams are hashed a few at a time."""
    found = np.full(HASHES, np.iinfo(np.uint64).max, np.uint64)
    every = grams(text, ngram)
    for start in range(0, len(every), CHUNK):
        # Multiply and add modulo 2^64; the high half of the product is what is well mixed.
        hashed = (every[start : start + CHUNK, None] * _ODD + _PLUS) >> np.uint64(16)
        np.minimum(found, hashed.min(axis=0), out=found)
    return found


def rows_of(threshold: float) -> int:
    """Places in a band."""
    for rows in range(HASHES, 0, -1):
        if 1 - (1 - threshold**rows) ** (HASHES // rows) >= FOUND:
            return rows
    return 1


def bands(sketches: Sequence[np.ndarray], threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Of n signatures: uint64[bands, 2, n], the hash of every band in ascending order and which text has it; and 16 bits of
    every place of the signatures, uint16[n, HASHES], to compare by."""
    rows = rows_of(threshold)
    signatures = np.array(sketches, np.uint64).reshape(-1, HASHES)
    found = np.empty((HASHES // rows, 2, len(signatures)), np.uint64)
    for band in range(len(found)):
        hashed = np.full(len(signatures), band, np.uint64)
        for place in range(band * rows, (band + 1) * rows):
            hashed = _mixed(hashed * _GOLDEN + signatures[:, place])
        order = np.argsort(hashed, kind="stable")
        found[band] = hashed[order], order.astype(np.uint64)
    return found, signatures.astype(np.uint16)
