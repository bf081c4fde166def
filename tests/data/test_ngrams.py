"""Near duplicates: the estimate against exact sets, clusters of planted copies, order of first members."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_r1.data.ngrams import minhash, near_duplicates, ngram_hashes, similarity


def exact(a: np.ndarray, b: np.ndarray, n: int = 5) -> float:
    first, second = ({tuple(d[i : i + n]) for i in range(len(d) - n + 1)} for d in (a, b))
    return len(first & second) / len(first | second)


def edited(tokens: np.ndarray, changes: int, rng: np.random.Generator) -> np.ndarray:
    copy = tokens.copy()
    copy[rng.choice(len(copy), changes, replace=False)] = rng.integers(0, 500, changes)
    return copy


def test_similarity_estimates_the_jaccard_index() -> None:
    rng = np.random.default_rng(0)
    errors = []
    for changes in (0, 2, 5, 20, 60) * 8:
        a = rng.integers(0, 500, 600)
        b = edited(a, changes, rng)
        errors.append(similarity(minhash(a, 5), minhash(b, 5)) - exact(a, b))
    assert np.abs(errors).max() < 0.16
    assert abs(np.mean(errors)) < 0.02
    short = rng.integers(0, 500, 40)
    other = edited(short, 3, rng)
    assert similarity(minhash(short, 5), minhash(other, 5)) == pytest.approx(exact(short, other))


def test_planted_copies_are_found_and_strangers_stay_apart() -> None:
    rng = np.random.default_rng(1)
    born = [rng.integers(0, 500, 300) for _ in range(200)]
    copies = [edited(document, 3, rng) for document in born[:50]]
    cluster = near_duplicates([*born, *copies], 5, 0.7)
    assert cluster[:200].tolist() == list(range(200))
    assert cluster[200:].tolist() == list(range(50))


def test_a_chain_of_small_changes_does_not_join_unlike_documents() -> None:
    rng = np.random.default_rng(2)
    chain = [rng.integers(0, 500, 300)]
    for _ in range(30):
        chain.append(edited(chain[-1], 4, rng))
    cluster = near_duplicates(chain, 5, 0.7)
    assert cluster[0] != cluster[-1]
    for number in set(cluster.tolist()):
        members = np.flatnonzero(cluster == number)
        assert all(exact(chain[members[0]], chain[m]) > 0.5 for m in members)


def test_shared_boilerplate_is_no_duplicate_and_tiny_documents_work() -> None:
    rng = np.random.default_rng(3)
    header = rng.integers(0, 500, 60)
    documents = [np.concatenate([header, rng.integers(0, 500, 300)]) for _ in range(20)]
    assert near_duplicates(documents, 5, 0.7).tolist() == list(range(20))
    assert near_duplicates([np.array([1, 2]), np.array([1, 2]), np.array([3])], 5, 0.7).tolist() == [0, 0, 1]
    assert near_duplicates([], 5, 0.7).tolist() == []
    assert len(ngram_hashes(np.array([1, 2]), 5)) == 0
