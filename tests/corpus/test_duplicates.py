"""Near-duplicates against the plain definition, and what a pair's order, source and settings change."""

import random
from itertools import combinations

import numpy as np
import pytest
from corpus_toys import config, make, write_jsonl

from megatron_r1.corpus import near
from megatron_r1.data.shards import SPLITS, ShardSet

WORDS = [f"word{i}" for i in range(400)]


def grams(text, n=5):
    words = text.lower().split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def jaccard(one, other):
    return len(grams(one) & grams(other)) / len(grams(one) | grams(other))


def versions(draw, count=12):
    """Texts, and later ones made of them by changing a random share of the words."""
    texts = [" ".join(draw.choices(WORDS, k=150)) for _ in range(count)]
    for text in texts[:count]:
        words = text.split()
        for place in draw.sample(range(150), draw.choice([0, 1, 2, 4, 10, 40])):
            words[place] = draw.choice(WORDS)
        texts.append(" ".join(words))
    return texts


@pytest.mark.parametrize("seed", range(4))
def test_the_estimate_is_the_similarity(seed):
    texts = versions(random.Random(seed))
    sketches = [near.sketch(text, 5) for text in texts]
    _, signatures = near.bands(sketches, 0.8)
    errors = [(signatures[i] == signatures[j]).mean() - jaccard(texts[i], texts[j]) for i, j in combinations(range(len(texts)), 2)]
    assert np.abs(errors).max() < 0.16  # four standard deviations of 128 draws
    assert abs(np.mean(errors)) < 0.01


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_rows_find_a_pair_at_the_threshold(threshold):
    rows = near.rows_of(threshold)
    assert 1 - (1 - threshold**rows) ** (near.HASHES // rows) >= near.FOUND
    more = rows + 1
    assert more > near.HASHES or 1 - (1 - threshold**more) ** (near.HASHES // more) < near.FOUND


def test_long_texts_in_stretches_and_short_ones(monkeypatch):
    text = " ".join(random.Random(0).choices(WORDS, k=3000))
    whole = near.sketch(text, 5)
    monkeypatch.setattr(near, "CHUNK", 64)
    assert np.array_equal(near.sketch(text, 5), whole)
    assert len(near.grams("Two words", 5)) == 1
    assert np.array_equal(near.sketch("Two words", 5), near.sketch("two -- WORDS!", 5))
    assert not np.array_equal(near.sketch("?!", 5), near.sketch("!!", 5))


def kept(artifact, source="a"):
    shards = ShardSet.open(artifact)
    return {identity for split in SPLITS for identity in shards.split(source, split).ids}


@pytest.mark.parametrize("seed", range(3))
def test_dropped_and_kept(tmp_path, seed):
    """Every document that is dropped resembles an earlier one; every one that clearly does is dropped."""
    texts = versions(random.Random(seed), 30)
    path = write_jsonl(tmp_path / "a.jsonl", [{"id": f"n{i:03d}", "text": text} for i, text in enumerate(texts)])
    settings = config({"a": {"kind": "jsonl", "path": str(path), "domain": "web", "id_field": "id"}}, near_duplicates={"threshold": 0.8})
    artifact = make(tmp_path / "runs", settings)
    left = kept(artifact)
    for i, text in enumerate(texts):
        nearest = max((jaccard(text, texts[j]) for j in range(i)), default=0.0)
        if f"n{i:03d}" not in left:
            assert nearest > 0.6
        else:
            assert nearest < 0.95
    dropped = ShardSet.open(artifact).sources["a"].dropped
    assert dropped["near_duplicate"] + dropped["duplicate"] == len(texts) - len(left)


@pytest.mark.parametrize("across", [False, True])
def test_within_a_source_or_across(tmp_path, across):
    texts = versions(random.Random(7), 6)
    sources = {}
    for name, chosen in (("a", texts[:3]), ("b", [*texts[:3], texts[4]]), ("c", texts[:2])):
        path = write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{text} "} for text in chosen])
        sources[name] = {"kind": "jsonl", "path": str(path), "domain": "web", "deduplicate": name != "c"}
    shards = ShardSet.open(make(tmp_path / "runs", config(sources, across_sources=across)))
    counts = {name: sum(entry.documents for entry in record.splits.values()) for name, record in shards.sources.items()}
    assert counts == ({"a": 3, "b": 1, "c": 2} if across else {"a": 3, "b": 4, "c": 2})


def test_a_document_dropped_for_its_id_hides_no_other(tmp_path):
    """The second has the first's id and goes; the third has the second's text and stays, or that text would be lost."""
    one, two = versions(random.Random(3), 2)[:2]
    path = write_jsonl(tmp_path / "a.jsonl", [{"id": "x", "text": one}, {"id": "x", "text": two}, {"id": "y", "text": two}])
    settings = config({"a": {"kind": "jsonl", "path": str(path), "domain": "web", "id_field": "id"}}, max_bad_ratio=0.5, near_duplicates={})
    artifact = make(tmp_path / "runs", settings)
    assert kept(artifact) == {"x", "y"}
    assert "the id 'x' was used before" in artifact.file("quarantine/a.jsonl").read_text()
