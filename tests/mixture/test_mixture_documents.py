"""Single documents: near duplicates counted once, documents kept or dropped, the random control beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hand_tables import build_influence
from tiny_shards import build_shards
from toy_tables import crossed, toy_table

from megatron_r1.artifacts.base import Artifact, open_workspace
from megatron_r1.artifacts.influence import InfluenceTable
from megatron_r1.artifacts.mixture import Mixture, load_kept, load_mixture
from megatron_r1.data.shards import ShardSet
from megatron_r1.mixture.config import MixtureConfig
from megatron_r1.mixture.keep import keep, upper_bounds
from megatron_r1.mixture.run import run
from megatron_r1.utils.errors import ArtifactError, ConfigError

N = 30


def config(**changes: object) -> MixtureConfig:
    plain = {"method": "influence", "inputs": {"shards": "corpus", "influence": "influence"}, "seed": 1, "floor": 0.0, "bootstrap": 200}
    return MixtureConfig.model_validate({**plain, **changes})


def texts(seed: int, count: int = N) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return [draw.integers(0, 500, int(draw.integers(60, 120))) for _ in range(count)]


def mix(rule: MixtureConfig, folder: Path, **inputs: Artifact) -> tuple[Artifact, Mixture]:
    made = run(rule, inputs, open_workspace(folder, "mix", "mixture", rule, inputs))
    return made, load_mixture(made)


def scored(folder: Path, documents: dict[str, list[np.ndarray]], rates: dict[str, np.ndarray]) -> Artifact:
    """Whole documents scored, in the order of the shards."""
    table = {}
    for name, rate in rates.items():
        tokens = [len(d) - 1 for d in documents[name]][: len(rate)]
        table[name] = (tokens, {"code@10": (rate * tokens).tolist()})
    return build_influence(folder, table, ["code"], [10])


# ------------------------------------------------------------------ near duplicates


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact]:
    """b is a with two tokens changed in every document; c is its own text and as good."""
    folder = tmp_path_factory.mktemp("copied")
    a, c = texts(1), texts(2)
    b = [np.concatenate([d[:10], [501, 502], d[12:]]) for d in a]
    documents = {"a": a, "b": b, "c": c}
    rate = np.random.default_rng(3).normal(1.0, 0.1, N)
    rates = {"a": rate, "b": rate, "c": np.random.default_rng(4).normal(1.0, 0.1, N)}
    shards = build_shards(folder, {name: {"train": found} for name, found in documents.items()})
    return shards, scored(folder, documents, rates)


def test_a_planted_copy_of_a_source_does_not_win_twice(copied: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    shards, influence = copied
    _, naive = mix(config(), tmp_path / "naive", shards=shards, influence=influence)
    _, once = mix(config(redundancy={}), tmp_path / "once", shards=shards, influence=influence)
    assert naive.weights["a"] + naive.weights["b"] == pytest.approx(2 / 3, abs=0.03)
    assert once.weights["a"] + once.weights["b"] == pytest.approx(1 / 2, abs=0.03)
    assert once.weights["a"] == pytest.approx(once.weights["b"], abs=0.01)
    found = once.redundancy
    assert found is not None
    assert naive.redundancy is None
    assert (found.clusters, found.documents, found.between) == (N, 2 * N, {"a + b": N})
    assert found.counted == {"a": 0.5, "b": 0.5, "c": 1.0}
    assert found.seen == {"a": 1.0, "b": 1.0, "c": 1.0}


def test_copies_within_a_source_count_once_and_are_drawn_together(tmp_path: Path) -> None:
    """10 of 30 documents are one excellent document: counted ten times it lifts a, and its noise is that of one."""
    a, c = texts(5), texts(6)
    a[:10] = [a[0].copy() for _ in range(10)]
    documents = {"a": a, "c": c}
    rate = np.full(N, 0.5)
    rate[:10] = 4.0
    shards = build_shards(tmp_path, {name: {"train": found} for name, found in documents.items()})
    influence = scored(tmp_path, documents, {"a": rate, "c": np.random.default_rng(7).normal(1.0, 0.1, N)})
    _, naive = mix(config(), tmp_path / "naive", shards=shards, influence=influence)
    _, once = mix(config(redundancy={}), tmp_path / "once", shards=shards, influence=influence)
    tokens = np.array([len(d) - 1 for d in a])
    share = np.where(np.arange(N) < 10, 0.1, 1.0)
    assert naive.rho["a"] == pytest.approx((rate * tokens).sum() / tokens.sum())
    assert once.rho["a"] == pytest.approx((rate * tokens * share).sum() / tokens.sum())
    assert once.redundancy.counted["a"] == pytest.approx(21 / 30)


def test_negative_copies_stay_negative_and_strangers_untouched(tmp_path: Path) -> None:
    a, c = texts(8), texts(9)
    documents = {"a": a, "b": [d.copy() for d in a], "c": c}
    shards = build_shards(tmp_path, {name: {"train": found} for name, found in documents.items()})
    bad = np.random.default_rng(10).normal(-1.0, 0.1, N)
    influence = scored(tmp_path, documents, {"a": bad, "b": bad, "c": np.random.default_rng(11).normal(1.0, 0.1, N)})
    _, once = mix(config(redundancy={}), tmp_path, shards=shards, influence=influence)
    assert once.harmful == ["a", "b"]
    assert once.weights == {"a": 0.0, "b": 0.0, "c": 1.0}


def test_documents_that_were_not_scored_like_this_are_refused(copied: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    _, influence = copied
    other = build_shards(tmp_path, {name: {"train": texts(20 + i)} for i, name in enumerate("abc")})
    with pytest.raises(ArtifactError, match=r"as were scored[\s\S]*shards that its influence was measured on"):
        mix(config(redundancy={}), tmp_path, shards=other, influence=influence)


# ------------------------------------------------------------------ documents kept


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact, dict[str, np.ndarray]]:
    """Of 30 documents of a and of b the first 20 are scored, half of a's and a quarter of b's above 0."""
    folder = tmp_path_factory.mktemp("pool")
    documents = {"a": texts(31), "b": texts(32)}
    rates = {"a": np.where(np.arange(20) % 2, 1.0, -0.5), "b": np.where(np.arange(20) % 4, -0.2, 1.5)}
    shards = build_shards(folder, {name: {"train": found} for name, found in documents.items()})
    return shards, scored(folder, documents, rates), rates


def test_the_papers_rule_keeps_what_helps(pool: tuple, tmp_path: Path) -> None:
    shards, influence, rates = pool
    opened = ShardSet.open(shards)
    for unscored in ("keep", "drop"):
        rule = config(filter={"rule": "paper", "unscored": unscored}, budget="3000 tokens", harmful="floor")
        made, found = mix(rule, tmp_path / unscored, shards=shards, influence=influence)
        lists = load_kept(made, found)
        assert lists is not None
        assert found.kept is not None
        for name, rate in rates.items():
            wanted = [*np.flatnonzero(rate > 0).tolist(), *(range(20, 30) if unscored == "keep" else ())]
            assert lists[name].tolist() == wanted
            tokens = int(opened.split(name).lengths[wanted].sum())
            assert (found.kept.tokens[name], found.kept.documents[name]) == (tokens, len(wanted))
            assert found.tokens[name] == tokens
            assert found.epochs[name] == pytest.approx(3000 * found.weights[name] / tokens)
        assert (found.kept.scored, found.kept.passed) == ({"a": 20, "b": 20}, {"a": 10, "b": 5})


def test_the_control_keeps_as_many_tokens_at_random_and_weighs_alike(pool: tuple, tmp_path: Path) -> None:
    shards, influence, _ = pool
    base = {"budget": "2000 tokens", "max_epochs": "2 epochs", "floor": 0.05, "harmful": "floor"}
    made, found = mix(config(filter={"rule": "paper"}, **base), tmp_path / "rule", shards=shards, influence=influence)
    control = config(filter={"rule": "paper", "control": True}, **base)
    other, beside = mix(control, tmp_path / "control", shards=shards, influence=influence)
    assert beside.weights == found.weights
    assert beside.capped == found.capped
    chosen, random = load_kept(made, found), load_kept(other, beside)
    longest = 120
    for name in "ab":
        assert random[name].tolist() != chosen[name].tolist()
        assert set(range(20, 30)) <= set(random[name].tolist())
        assert 0 <= beside.kept.tokens[name] - found.kept.tokens[name] < longest
    again, _ = mix(control, tmp_path / "again", shards=shards, influence=influence)
    assert all(np.array_equal(random[name], numbers) for name, numbers in load_kept(again, beside).items())
    third, record = mix(control.model_copy(update={"seed": 2}), tmp_path / "seed", shards=shards, influence=influence)
    assert any(not np.array_equal(random[name], numbers) for name, numbers in load_kept(third, record).items())


def test_the_confident_rule_drops_only_what_is_shown_not_to_help() -> None:
    """Documents without effect: the paper's rule drops half of them, this one at most about 5 %; harm it drops."""
    rng = np.random.default_rng(41)
    rates = crossed(rng, {"a": 0.0}, 400, 8, 0.0, 0.0, 1.0)
    rates["a"][:50] -= 3.0
    table = toy_table(rates)

    class Shard:
        lengths = np.full(400, 101)

        def __len__(self) -> int:
            return 400

    def kept(rule: str) -> np.ndarray:
        numbers, record, bound = keep(config(filter={"rule": rule}), table, {"a": Shard()}, 1)
        assert bound == record.tokens
        return np.isin(np.arange(400), numbers["a"])

    paper, confident = kept("paper"), kept("confident")
    assert not confident[:50].any()
    assert paper[50:].mean() == pytest.approx(0.5, abs=0.08)
    assert confident[50:].mean() == pytest.approx(0.95, abs=0.03)
    assert (paper <= confident).all()


def test_upper_bounds_cover_a_documents_benefit() -> None:
    """95 % one-sided, over worlds that differ in their probe only."""
    rng = np.random.default_rng(42)
    truth = rng.normal(0, 1, (50, 1, 1))
    above = []
    for _ in range(40):
        table = toy_table({"a": truth + rng.normal(0, 1, (50, 2, 5))}, by_fold=49)
        bounds = upper_bounds(table, "a", "rms", 0.95) / 100  # of the sum over 100 tokens
        assert bounds[49] == np.inf
        above.append(bounds[:49] >= truth[:49, 0, 0])
    assert np.mean(above) == pytest.approx(0.95, abs=0.015)


def test_a_source_of_which_nothing_is_left_gets_nothing(tmp_path: Path) -> None:
    documents = {"a": texts(51, 10), "b": texts(52, 10), "c": texts(53, 10)}
    shards = build_shards(tmp_path, {name: {"train": found} for name, found in documents.items()})
    rates = {"a": np.full(10, 1.0), "b": np.full(10, 0.0), "c": np.linspace(0.5, 1, 10)}
    influence = scored(tmp_path, documents, rates)
    for method in ({}, {"method": "uniform"}, {"method": "kl", "kl": {"tau": 1.0}}):
        rule = config(filter={"rule": "paper", "unscored": "drop"}, **method)
        made, found = mix(rule, tmp_path / str(len(method)), shards=shards, influence=influence)
        assert found.kept.emptied == ["b"]
        assert found.weights["b"] == 0.0
        assert found.epochs == {}
        assert load_kept(made, found)["b"].tolist() == []


def test_windows_of_documents_cannot_decide_about_documents(pool: tuple, tmp_path: Path) -> None:
    shards, _, _ = pool
    windows = build_influence(tmp_path, {name: ([30] * 10, {"code@10": [30.0] * 10}) for name in "ab"}, ["code"], [10])
    with pytest.raises(ConfigError, match=r"whole documents of a scored[\s\S]*10 of 10 scored by one window[\s\S]*score_unit: document"):
        mix(config(filter={"rule": "paper"}), tmp_path, shards=shards, influence=windows)


def test_confidence_about_documents_needs_probe_folds(pool: tuple, tmp_path: Path) -> None:
    shards, influence, _ = pool
    with pytest.raises(ArtifactError, match=r"several probe folds[\s\S]*probe_folds"):
        mix(config(filter={"rule": "confident"}), tmp_path, shards=shards, influence=influence)


def test_a_damaged_list_of_documents_is_refused(pool: tuple, tmp_path: Path) -> None:
    shards, influence, _ = pool
    made, found = mix(config(filter={"rule": "paper"}), tmp_path, shards=shards, influence=influence)
    np.save(made.path / "kept" / "a.npy", np.array([3, 1]))
    with pytest.raises(ArtifactError, match=r"20 ascending document numbers[\s\S]*found: 2"):
        load_kept(made, found)


def test_tables_of_the_toys_are_what_the_reader_expects(tmp_path: Path) -> None:
    """The in-memory tables of these tests behave as those read from files."""
    table = InfluenceTable.open(build_influence(tmp_path, {"a": ([10, 20], {"code@10": [5.0, 10.0]})}, ["code"], [10]))
    toy = toy_table({"a": np.full((2, 1, 1), 0.5)}, tokens={"a": np.array([10, 20])})
    assert table.spread("a").mean == toy.spread("a").mean == 0.5
