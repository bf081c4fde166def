"""How far the scores can be trusted: both sides resampled, reliability and its advice, folds on a part of the documents."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError
from small_world import influence_config
from toy_tables import at_checkpoints, crossed, toy_table

from megatron_r1.artifacts.base import Artifact, open_workspace
from megatron_r1.artifacts.influence import InfluenceTable, Reliability
from megatron_r1.influence.aggregate import advice, reliabilities
from megatron_r1.influence.run import run
from megatron_r1.utils.errors import ArtifactError

MEANS = {"a": 1.0, "b": 0.5, "c": 0.2, "d": -0.3}


@pytest.mark.parametrize("by_fold", [None, 10])
def test_variance_of_the_bootstrap_is_the_closed_form(by_fold: int | None) -> None:
    rng = np.random.default_rng(3)
    table = toy_table(crossed(rng, MEANS, 30, 6, 1.0, 0.4, 0.5, capabilities=2), by_fold=by_fold)
    for source in table.sources:
        spread = table.spread(source)
        draws = table.resample(source, 20_000, 1, confidence=None).mean(axis=1)
        assert draws.var() == pytest.approx(spread.variance, rel=0.05)
        assert draws.mean() == pytest.approx(spread.mean, abs=0.02)
        assert (spread.documents, spread.folds) == (30, 6)
        assert 5 <= spread.freedom <= 34


def test_variances_estimate_those_of_the_design() -> None:
    """Mean over 300 tables of both closed forms against what the crossed design says."""
    rng = np.random.default_rng(4)
    found = [toy_table(crossed(rng, {"a": 0.0}, 25, 5, 1.0, 0.5, 0.8)).spread("a") for _ in range(300)]
    assert np.mean([s.documents_variance for s in found]) == pytest.approx(1 / 25 + 0.64 / 125, rel=0.08)
    assert np.mean([s.probe_variance for s in found]) == pytest.approx(0.25 / 5 + 0.64 / 125, rel=0.1)


def test_one_probe_draw_serves_every_source_and_capability() -> None:
    """Without noise of documents, replicates of two sources with equal fold effects move in step."""
    fold = np.random.default_rng(5).normal(size=(1, 1, 6)).repeat(20, axis=0).repeat(2, axis=1)
    table = toy_table({"a": 1 + fold, "b": 3 + fold})
    a, b = (table.resample(source, 500, 7) for source in ("a", "b"))
    assert a.std() > 0.1
    assert np.allclose(a + 2, b)
    assert np.allclose(a[:, 0], a[:, 1])


def swaying(rng: np.random.Generator, sources: dict[str, float], documents: int, checkpoints: int, sway: float) -> dict[str, np.ndarray]:
    """Benefits per token [n, 2, T] where every checkpoint moves all documents, sources and capabilities together."""
    common = rng.normal(0, sway, checkpoints)
    return {name: mean + common + rng.normal(0, 0.3, (documents, 2, 1)) + np.zeros((1, 2, checkpoints)) for name, mean in sources.items()}


def test_checkpoints_that_move_all_documents_together_are_in_the_interval() -> None:
    """Over 300 worlds with true benefit 0, the share of 95 % intervals that hold it: far too few when only documents are drawn."""
    rng = np.random.default_rng(6)
    held, blind = [], []
    for world in range(300):
        table = at_checkpoints(swaying(rng, {"a": 0.0}, 20, 6, 0.2))
        for found, size in ((held, 6), (blind, 1)):
            part = table if size == 6 else at_checkpoints({"a": np.einsum("nct,t->nc", table.scores("a").raw / 100, table.alpha)[..., None]})
            low, high = np.quantile(part.resample("a", 400, world).mean(axis=1), [0.025, 0.975])
            found.append(low <= 0 <= high)
    assert np.mean(held) >= 0.93
    assert np.mean(blind) <= 0.85


def test_variance_over_checkpoints_is_the_closed_form_and_the_designs() -> None:
    rng = np.random.default_rng(7)
    table = at_checkpoints(swaying(rng, MEANS, 30, 8, 0.5))
    for source in table.sources:
        spread = table.spread(source)
        draws = table.resample(source, 20_000, 1, confidence=None).mean(axis=1)
        # A ratio of drawn sums has a little more variance than its first-order form.
        assert draws.var() == pytest.approx(spread.variance, rel=0.25)
        assert spread.checkpoints == 8
    found = [at_checkpoints(swaying(rng, {"a": 0.0}, 5, 40, 0.5)).spread("a").checkpoints_variance for _ in range(200)]
    alpha = table_alpha(40)
    assert np.mean(found) == pytest.approx(0.25 * (alpha**2).sum(), rel=0.1)


def table_alpha(count: int) -> np.ndarray:
    """Weights of Eq. 5 for steps 1 ... count."""
    return (np.arange(count) + 1) / (np.arange(count) + 1).sum()


def test_one_draw_of_checkpoints_serves_every_source_and_capability_of_a_model_and_few_are_not_drawn() -> None:
    common = np.random.default_rng(8).normal(size=(1, 1, 5)).repeat(20, axis=0).repeat(2, axis=1)
    table = at_checkpoints({"a": 1 + common, "b": 3 + common})
    a, b = (table.resample(source, 500, 7) for source in ("a", "b"))
    assert a.std() > 0.1
    assert np.allclose(a + 2, b)
    assert np.allclose(a[:, 0], a[:, 1])
    few = at_checkpoints({"a": 1 + common[..., :2]})
    assert few.resample("a", 500, 7).std() < 1e-12
    assert few.spread("a").checkpoints_variance == 0


def test_a_single_document_has_no_known_spread() -> None:
    table = toy_table({"a": np.ones((1, 1, 1)), "b": np.ones((2, 1, 1))})
    assert table.spread("a").documents_variance == np.inf
    assert table.spread("b").documents_variance == 0


def found_in(records: list[Reliability], of: str, over: str) -> Reliability:
    return next(r for r in records if (r.of, r.over, r.capability) == (of, over, "joint"))


def test_reliability_over_the_probe_falls_with_its_noise_and_the_advice_follows() -> None:
    rng = np.random.default_rng(6)
    means = {f"s{i}": float(x) for i, x in enumerate(rng.normal(size=12))}
    quiet, loud = (
        reliabilities(toy_table(crossed(np.random.default_rng(7), means, 20, 8, 0.3, sd, 0.1)), 1, 64) for sd in (0.2, 3.0)
    )
    for of in ("sources", "documents"):
        good, bad = found_in(quiet, of, "probe"), found_in(loud, of, "probe")
        assert good.have == bad.have == 64
        assert good.value is not None
        assert good.value > 0.9
        assert good.needed is not None
        assert good.needed <= 64
        assert bad.halves is not None
        assert bad.value is None or bad.value < 0.8
        assert bad.needed is None or bad.needed > 64
    assert found_in(quiet, "sources", "documents").have == 20


def test_the_prophecy_holds_on_new_data() -> None:
    """Folds foretold to be enough for 0.9 are enough: documents differ, the probe is the only noise."""
    rng = np.random.default_rng(8)
    truth = rng.normal(size=(400, 1, 1))

    def measured(folds: int) -> Reliability:
        table = toy_table({"a": truth + rng.normal(0, 2.0, (400, 1, folds)), "b": truth, "c": truth})
        table.record.sources.pop("b"), table.record.sources.pop("c")
        return found_in(reliabilities(table, 1, folds), "documents", "probe")

    few = measured(8)
    assert few.value is not None
    assert few.value == pytest.approx(8 / (8 + 4), abs=0.06)  # signal 1, noise 4 / folds
    assert few.needed is not None
    assert few.needed == pytest.approx(36, rel=0.25)
    again = measured(few.needed)
    assert again.value == pytest.approx(0.9, abs=0.03)


def test_advice_in_words() -> None:
    base = {"of": "sources", "over": "probe", "capability": "joint", "halves": 0.5, "have": 48}
    assert advice(Reliability(**base, value=2 / 3, needed=216)) == (
        "reliability of the ranking of sources (joint) over 48 probe windows per capability: 0.67; 0.9 would need about 216"
    )
    assert "enough for 0.9" in advice(Reliability(**base, value=0.95, needed=20))
    assert "no number of them is foretold" in advice(Reliability(**base, value=-0.1, needed=None))
    assert "no measurable reliability" in advice(Reliability(**base, value=None, needed=None))


def test_folds_on_a_part_of_the_documents(world: dict[str, Artifact], tmp_path) -> None:
    few = {"documents": 9, "checkpoints": 1, "validity": {"batches": 0}, "sources": ["left", "right", "twin_a"], "partition_documents": 4}

    def score(name: str, **changes: object) -> InfluenceTable:
        config = influence_config(**few, probe_folds=4, **changes)
        found = run(config, world, open_workspace(tmp_path / name, "influence", "influence", config, world))
        assert found is not None
        return InfluenceTable.open(found)

    whole, part = score("whole"), score("part", fold_documents=6)
    assert (whole.record.fold_documents, part.record.fold_documents) == (None, 6)
    for source in whole.sources:
        a, b = whole.scores(source), part.scores(source)
        assert a.by_fold.all()
        assert b.by_fold.tolist() == [True] * 6 + [False] * 3
        assert a.folds is not None
        assert b.folds is not None
        assert np.array_equal(a.index, b.index)
        # Batched in other company, so equal to rounding only.
        assert np.linalg.norm(a.raw - b.raw) / np.linalg.norm(a.raw) < 5e-3
        assert np.linalg.norm(a.folds[:6] - b.folds[:6]) / np.linalg.norm(a.folds[:6]) < 5e-3
    over = {(r.of, r.over) for r in part.record.reliabilities}
    assert over == {("sources", "documents"), ("sources", "probe"), ("documents", "probe")}
    assert {r.have for r in part.record.reliabilities if r.over == "probe"} == {16}
    assert part.record.interval_covers == ["scored documents", "probe folds"]


def test_folds_of_a_table_without_them_are_refused() -> None:
    table = toy_table({"a": np.ones((3, 1, 1))})
    with pytest.raises(ArtifactError, match=r"several probe folds[\s\S]*`probe_folds` above 1"):
        table.fold_benefits("a")


@pytest.mark.parametrize("changes", [{"fold_documents": 4}, {"fold_documents": 41, "probe_folds": 2}])
def test_fold_documents_needs_folds_and_documents(changes: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match="fold_documents"):
        influence_config(**changes)
