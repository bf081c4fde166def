"""Sieves, refusals and the promise that no probe document is trained on."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_shards import build_shards, documents, markov

from megatron_r1.artifacts.base import Artifact, open_workspace
from megatron_r1.artifacts.probe import ProbeSet, load_probe
from megatron_r1.data.shards import ShardSet
from megatron_r1.probe.config import ProbeConfig, describe
from megatron_r1.probe.overlap import NearDuplicates, OverlapIndex, ngram_hashes, stretches
from megatron_r1.probe.run import allocate, run
from megatron_r1.utils.errors import ConfigError, DataError

CODE, MATH = markov(1), markov(2)


def probe_config(**changes: object) -> ProbeConfig:
    settings_ = {
        "inputs": {"shards": "corpus"},
        "documents": 6,
        "tokens_per_document": 32,
        "seed": 3,
        "capabilities": {"code": {"sources": {"code_a": 2, "code_b": 1}}, "math": {"sources": {"math_a": 1}}},
        "rules": {"min_tokens": 20},
        **changes,
    }
    return ProbeConfig.model_validate(settings_)


def usual_sources() -> dict[str, dict[str, list[np.ndarray]]]:
    return {
        name: {
            "train": documents(sample, 10 * k, 30),
            "probe": documents(sample, 10 * k + 1, 12),
            "test": documents(sample, 10 * k + 2, 6),
        }
        for k, (name, sample) in enumerate([("code_a", CODE), ("code_b", CODE), ("math_a", MATH)], start=1)
    }


@pytest.fixture
def shards(tmp_path: Path) -> Artifact:
    return build_shards(tmp_path, usual_sources())


def make(config: ProbeConfig, shards: Artifact, folder: Path) -> ProbeSet:
    parents = {"shards": shards}
    return load_probe(run(config, parents, open_workspace(folder, "probe", "probe", config, parents)))


def test_picks_several_sources_from_the_probe_split(shards: Artifact, tmp_path: Path) -> None:
    probe = make(probe_config(), shards, tmp_path)
    counts = {
        source: sum(d.source == source for d in probe.capabilities["code"].documents) for source in ("code_a", "code_b")
    }
    assert counts == {"code_a": 4, "code_b": 2}
    assert {d.split for c in probe.capabilities.values() for d in c.documents} == {"probe"}
    assert all(d.n_tokens == 33 for c in probe.capabilities.values() for d in c.documents)


def test_windows_are_held_out_and_never_training_documents(shards: Artifact, tmp_path: Path) -> None:
    probe = make(probe_config(), shards, tmp_path)
    opened = ShardSet.open(shards)
    shards_by_name = {name: opened.split(name) for name in opened.sources}
    training = {name: shard.read(0, shard.n_tokens).astype("<i4").tobytes() for name, shard in shards_by_name.items()}
    for capability in probe.capabilities.values():
        for document in capability.documents:
            assert document.id == f"{document.source}-probe-{document.index}"
            assert document.tokens(opened).astype("<i4").tobytes() not in training[document.source]
    assert probe.checks == {"document ids also in training": 0}


def test_hash_covers_the_tokens(shards: Artifact, tmp_path: Path) -> None:
    opened, probe = ShardSet.open(shards), make(probe_config(), shards, tmp_path)
    assert probe.digest(opened) == probe.sha256
    capability = probe.capabilities["math"]
    # Documents have at least 40 tokens and windows 33, so both places exist: same reference but for the window.
    first = capability.documents[0]
    moved = first.model_copy(update={"start": 1 if first.start == 0 else 0})
    shifted = capability.model_copy(update={"documents": [moved, *capability.documents[1:]]})
    changed = probe.model_copy(update={"capabilities": {**probe.capabilities, "math": shifted}})
    assert changed.digest(opened) != probe.sha256


def test_same_seed_same_probe_other_seed_another(shards: Artifact, tmp_path: Path) -> None:
    first, again, other = (make(probe_config(seed=seed), shards, tmp_path / str(i)) for i, seed in enumerate((3, 3, 4)))
    assert first.sha256 == again.sha256 != other.sha256


def test_counts_of_every_sieve_chain_up(shards: Artifact, tmp_path: Path) -> None:
    records = [r for r in make(probe_config(), shards, tmp_path).capabilities["code"].sieves if r.source == "code_a"]
    assert [r.name for r in records] == [
        "draw",
        "length",
        "exact duplicates",
        "near duplicates",
        "overlap with training",
        "overlap with held-out",
    ]
    assert records[0].entered == 12
    assert all(before.left == after.entered for before, after in pairwise(records))


def test_duplicates_and_leaked_documents_are_sieved_out(tmp_path: Path) -> None:
    sources = usual_sources()
    original = sources["math_a"]["probe"][0]
    near = original.copy()
    near[5] = (near[5] + 1) % 512
    leaked, held_out = sources["math_a"]["train"][3], sources["code_a"]["test"][2]
    sources["math_a"]["probe"] += [original.copy(), near, leaked.copy(), held_out.copy()]
    probe = make(probe_config(window="first"), build_shards(tmp_path, sources), tmp_path)
    dropped = {r.name: r.entered - r.left for r in probe.capabilities["math"].sieves}
    assert dropped == {
        "draw": 0,
        "length": 0,
        "exact duplicates": 1,
        "near duplicates": 1,
        "overlap with training": 1,
        "overlap with held-out": 1,
    }


@pytest.mark.parametrize(
    ("rules", "sieve", "fix"),
    [
        ({"min_tokens": 500}, "length", "rules.min_tokens"),
        ({"min_tokens": 20, "max_tokens": 21}, "length", "rules.max_tokens"),
    ],
)
def test_refuses_when_a_sieve_leaves_nothing(
    shards: Artifact, tmp_path: Path, rules: dict, sieve: str, fix: str
) -> None:
    with pytest.raises(DataError) as caught:
        make(probe_config(rules=rules), shards, tmp_path)
    assert f"after the sieve {sieve!r}" in caught.value.expected
    assert "code_a" in caught.value.expected
    assert "12->0" in caught.value.found
    assert fix in caught.value.fix
    assert not list(tmp_path.glob("probe-????????"))


def test_refuses_when_everything_was_trained_on(tmp_path: Path) -> None:
    sources = usual_sources()
    sources["math_a"]["probe"] = [d.copy() for d in sources["math_a"]["train"][:5]]
    with pytest.raises(DataError, match=r"overlap with training[\s\S]*rules.max_overlap"):
        make(probe_config(), build_shards(tmp_path, sources), tmp_path)


def test_refuses_an_empty_probe_split(tmp_path: Path) -> None:
    sources = usual_sources()
    del sources["code_b"]["probe"]
    with pytest.raises(DataError, match=r"'code_b' after the sieve 'draw'[\s\S]*larger probe split"):
        make(probe_config(), build_shards(tmp_path, sources), tmp_path)


def test_missing_source_is_recorded_and_the_last_one_refused(shards: Artifact, tmp_path: Path) -> None:
    config = probe_config(capabilities={"code": {"sources": {"code_a": 1, "absent": 1}}})
    assert make(config, shards, tmp_path).capabilities["code"].missing == ["absent"]
    with pytest.raises(ConfigError, match=r"none of absent[\s\S]*capabilities.code.sources"):
        make(probe_config(capabilities={"code": {"sources": {"absent": 1}}}), shards, tmp_path)


def test_too_few_windows_are_said(shards: Artifact, tmp_path: Path) -> None:
    probe = make(probe_config(documents=40), shards, tmp_path).capabilities["math"]
    assert probe.short == {"math_a": 28}
    assert len(probe.documents) == 12


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(2, 64))
def test_allocation_adds_up_and_leaves_none_out(shares: list[float], total: int) -> None:
    named = {f"s{i}": share for i, share in enumerate(shares)}
    counts = allocate(total, named)
    assert sum(counts.values()) == total
    assert min(counts.values()) >= (1 if total >= len(shares) else 0)
    assert all(abs(count - total * named[name] / sum(shares)) < 1 + len(shares) for name, count in counts.items())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(3, 6))
def test_ngram_hashes_are_equal_exactly_when_ngrams_are(values: list[int], n: int) -> None:
    tokens = np.array(values)
    hashes = ngram_hashes(tokens, n)
    grams = [tuple(values[i : i + n]) for i in range(len(values) - n + 1)]
    assert len(hashes) == max(len(grams), 0)
    assert len(set(hashes.tolist())) == len(set(grams))


def test_overlap_share_by_hand(tmp_path: Path) -> None:
    body = np.arange(100)
    windows = [np.arange(10, 30), np.concatenate([np.arange(50, 60), np.arange(200, 210)]), np.arange(300, 320)]
    index = OverlapIndex(windows, 5)
    index.stream(body)
    assert index.shares().tolist() == [1.0, 6 / 16, 0.0]


def test_stretches_miss_no_ngram_at_their_borders() -> None:
    class OneShard:
        n_tokens = 1000
        all = np.random.default_rng(0).integers(0, 500, 1000)

        def read(self, start: int, n: int) -> np.ndarray:
            return self.all[start : start + n]

    found = np.concatenate([ngram_hashes(s, 13) for s in stretches(OneShard(), 13, 1000, size=64)])
    assert np.array_equal(found, ngram_hashes(OneShard.all, 13))


def test_near_duplicates_keep_different_documents() -> None:
    near, draw = NearDuplicates(0.7), np.random.default_rng(1)
    assert not any(near.seen(CODE(draw, 60)) for _ in range(20))


@pytest.mark.parametrize(("kept", "shared", "seen"), [(1000, 800, True), (1000, 400, False), (2000, 800, False), (500, 500, False)])
def test_near_duplicates_are_counted_in_the_larger_window(kept: int, shared: int, seen: bool) -> None:
    """Windows of 1000 tokens, `shared` of them from one of `kept` tokens; threshold 0.7, four out of five draws."""
    found, draw = [], np.random.default_rng(2)
    for _ in range(40):
        near, tokens = NearDuplicates(0.7), draw.integers(0, 1 << 16, kept + 1000)
        assert not near.seen(tokens[:kept])
        found.append(near.seen(np.concatenate([tokens[:shared], tokens[kept : kept + 1000 - shared]])))
    assert abs(np.mean(found) - seen) < 0.2


def test_describe_names_the_capabilities() -> None:
    assert (
        describe(probe_config()) == "pick 6 held-out windows of up to 32 tokens for each of code, math from 3 sources"
    )


def test_a_body_that_is_partly_compared_is_said(shards: Artifact, tmp_path: Path) -> None:
    probe = make(probe_config(rules={"min_tokens": 20, "compare": "1800 tokens"}), shards, tmp_path)
    assert all(note.startswith("overlap with ") and "its first 1800 of" in note for note in probe.notes)
    assert any("code_a/train" in note for note in probe.notes)
    assert make(probe_config(), shards, tmp_path).notes == []
