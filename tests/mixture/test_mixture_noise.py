"""Is the noise told truly? Simulations with known answers: coverage, false alarms, shrinkage, the rules that stop."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_tables import crossed, toy_table

from megatron_r1.artifacts.influence import InfluenceTable, Spread
from megatron_r1.artifacts.mixture import Decision, Mixture
from megatron_r1.mixture.config import MixtureConfig
from megatron_r1.mixture.shrink import shrink, variances
from megatron_r1.mixture.solve import choose_tau, measure, solve
from megatron_r1.mixture.stop import decide, lower_bounds, p_value
from megatron_r1.mixture.weights import Bounds, divergence, effective_sources, natural, tilt
from megatron_r1.utils.errors import ConfigError, DataError
from megatron_r1.utils.statistics import holm

MEANS = {"a": 1.0, "b": 0.7, "c": 0.4, "d": 0.2}


def config(method: str = "influence", **changes: object) -> MixtureConfig:
    inputs = {"shards": "corpus", "influence": "influence"}
    plain = {"method": method, "inputs": inputs, "seed": 1, "floor": 0.0, "bootstrap": 300, **changes}
    return MixtureConfig.model_validate(plain)


def sizes(table: InfluenceTable) -> dict[str, int]:
    return {name: 1000 * (i + 1) for i, name in enumerate(table.sources)}


# ------------------------------------------------------------------ coverage (both sides resampled)


@pytest.mark.parametrize(
    ("method", "documents", "folds", "probe_sd"),
    [("influence", 40, 8, 0.15), ("influence", 12, 8, 0.02), ("influence", 40, 4, 0.15), ("kl", 40, 8, 0.15)],
)
def test_intervals_cover_the_population_weight(method: str, documents: int, folds: int, probe_sd: float) -> None:
    """200 repetitions, noise of documents, of probe folds and of their pairs; nominal 95 %.

    Fails without the folds in the bootstrap (below, a test shows by how much).
    """
    rule = config(method, **({"kl": {"tau": 0.5}} if method == "kl" else {}))
    rng = np.random.default_rng(11)
    inside: dict[str, list[bool]] = {name: [] for name in MEANS}
    for repetition in range(200):
        table = toy_table(crossed(rng, MEANS, documents, folds, 0.5, probe_sd, 0.2))
        tokens = sizes(table)
        if method == "kl":
            truth = tilt(natural(tokens), MEANS, 0.5, Bounds.of(tokens, 0.0, set(), None, None))
        else:
            truth = {name: mean / sum(MEANS.values()) for name, mean in MEANS.items()}
        found = solve(rule, table, tokens, repetition).intervals
        for name, (low, high) in found.items():
            inside[name].append(low <= truth[name] <= high)
    coverage = {name: float(np.mean(values)) for name, values in inside.items()}
    assert all(0.90 <= value <= 0.99 for value in coverage.values()), coverage


def test_intervals_without_folds_do_not_cover_the_probe() -> None:
    """The same world scored along the whole probe only: the interval is honest about documents and silent about the rest."""
    rng = np.random.default_rng(11)
    inside = []
    for repetition in range(100):
        rates = crossed(rng, MEANS, 40, 8, 0.5, 0.3, 0.2)
        table = toy_table({name: rate.mean(axis=2, keepdims=True) for name, rate in rates.items()})
        assert table.record.interval_covers == ["scored documents"]
        low, high = solve(config(), table, sizes(table), repetition).intervals["a"]
        inside.append(low <= MEANS["a"] / sum(MEANS.values()) <= high)
    assert np.mean(inside) < 0.9


# ------------------------------------------------------------------ the null


def test_null_world_raises_few_alarms_and_stops() -> None:
    """100 draws in which no source does anything: at most 5 % of the intervals exclude 0, and there is nothing to gain."""
    rule = config(stop={"path": 0.1, "tolerance": 0.02})
    rng = np.random.default_rng(21)
    excluded, helped, stopped = [], 0, 0
    for repetition in range(100):
        table = toy_table(crossed(rng, dict.fromkeys("abcdef", 0.0), 40, 8, 0.5, 0.1, 0.2))
        measured = measure(rule, table, table.sources, repetition)
        excluded += [low > 0 or high < 0 for low, high in measured.rho_intervals.values()]
        weights = tilt(natural(sizes(table)), measured.used, 0.3, Bounds.of(sizes(table), 0.0, set(), None, None))
        decision = decide(rule, table, weights, natural(sizes(table)), None)
        helped += bool(decision.statistical.helping)
        stopped += decision.statistical.stop is True
        assert not decision.paper.stop  # half of all documents are above 0: the paper's rule never stops on noise
    assert np.mean(excluded) <= 0.05
    assert helped <= 5
    assert stopped >= 95


def test_a_source_that_helps_is_found_and_the_rule_goes_on() -> None:
    rng = np.random.default_rng(22)
    table = toy_table(crossed(rng, {"a": 0.5, "b": 0.0, "c": 0.0, "d": -0.5}, 40, 8, 0.5, 0.1, 0.2))
    shares = natural(sizes(table))
    decision = decide(config(stop={"path": 0.1}), table, {"a": 0.9, "b": 0.05, "c": 0.05, "d": 0.0}, shares, None)
    found = decision.statistical
    assert found.helping == ["a"]
    assert found.stop is False
    assert found.lower["a"] > 0 > found.lower["d"]
    rho = {name: table.spread(name).mean for name in table.sources}
    by_hand = 0.9 * rho["a"] + 0.05 * rho["b"] + 0.05 * rho["c"] - sum(shares[n] * rho[n] for n in rho)
    assert found.gain_rate == pytest.approx(by_hand)
    assert found.gain == pytest.approx(0.1 * by_hand)
    assert "a is shown to help" in decision.follows


def test_without_a_path_the_statistical_rule_does_not_say_stop() -> None:
    table = toy_table(crossed(np.random.default_rng(23), dict.fromkeys("abc", 0.0), 20, 8, 0.5, 0.1, 0.1))
    decision = decide(config(), table, natural(sizes(table)), natural(sizes(table)), None)
    assert decision.statistical.stop is None
    assert decision.statistical.gain is None
    assert "without stop.path" in decision.follows


def test_paper_rule_by_hand() -> None:
    """40 documents, 1 above 0: 2.5 % < 5 %; and a median a twelfth of the previous one."""
    rates = np.full((40, 1, 1), -1.0)
    rates[0] = 0.5
    table = toy_table({"a": rates})
    first = decide(config(), table, {"a": 1.0}, {"a": 1.0}, None)
    assert (first.paper.positive, first.paper.median, first.paper.stop) == (0.025, 1.0, True)
    half = toy_table({"a": np.where(np.arange(40) % 2, 1.0, -1.0)[:, None, None] / 12})

    def previous(decision: Decision) -> Mixture:
        return Mixture(method="influence", weights={"a": 1.0}, natural={"a": 1.0}, uniform={"a": 1.0}, floor=0.0, decision=decision)

    assert not decide(config(), half, {"a": 1.0}, {"a": 1.0}, None).paper.stop
    again = decide(config(), half, {"a": 1.0}, {"a": 1.0}, previous(first))
    assert again.paper.previous_median == 1.0
    assert again.paper.median == pytest.approx(1 / 12)
    assert again.paper.stop
    assert again.statistical.reference == "previous"
    assert again.statistical.gain_rate == 0.0
    assert decide(config(stop={"collapse": 0.05}), half, {"a": 1.0}, {"a": 1.0}, previous(first)).paper.stop is False


def test_p_values_and_bounds_say_the_same() -> None:
    spreads = {f"s{i}": Spread(mean, 0.04, 0.01, 30, 6) for i, mean in enumerate((-0.3, 0.1, 0.4, 0.7, 1.0))}
    adjusted = holm({name: p_value(spread) for name, spread in spreads.items()})
    lower = lower_bounds(spreads, 0.05)
    best = max(spreads, key=lambda name: spreads[name].mean)
    assert (adjusted[best] < 0.05) == (lower[best] > 0)
    assert {name for name, p in adjusted.items() if p < 0.05} <= {name for name, low in lower.items() if low > 0}
    assert p_value(Spread(1.0, math.inf, 0.0, 1, 1)) == 1.0
    assert p_value(Spread(1.0, 0.0, 0.0, 3, 1)) == 0.0
    assert lower_bounds({"x": Spread(1.0, math.inf, 0.0, 1, 1)}, 0.05) == {}


# ------------------------------------------------------------------ shrinkage


def test_shrinkage_lowers_the_squared_error_of_noisy_sources() -> None:
    """12 sources, true spread 0.3, noise of 0.3 to 0.9: 400 worlds. And costs nothing where there is no noise."""
    rng = np.random.default_rng(31)
    noise = np.linspace(0.3, 0.9, 12) ** 2
    raw, better = 0.0, 0.0
    for _ in range(400):
        truth = rng.normal(0.5, 0.3, 12)
        seen = rng.normal(truth, np.sqrt(noise))
        found = shrink(seen, noise)
        raw += ((seen - truth) ** 2).sum()
        better += ((found.values - truth) ** 2).sum()
        assert ((found.factors >= 0) & (found.factors <= 1)).all()
    assert better < 0.5 * raw
    truth = rng.normal(0.5, 0.3, 12)
    assert shrink(truth, np.full(12, 1e-6)).values == pytest.approx(truth, abs=1e-4)


def test_shrinkage_from_tables_end_to_end() -> None:
    """With both noises and the bootstrap's own variances instead of known ones."""
    rng = np.random.default_rng(32)
    raw, better = 0.0, 0.0
    for repetition in range(60):
        truth = {f"s{i}": float(x) for i, x in enumerate(rng.normal(0.3, 0.1, 10))}
        table = toy_table(crossed(rng, truth, 10, 6, 0.6, 0.2, 0.2))
        measured = measure(config(shrink="pooled"), table, table.sources, repetition)
        raw += sum((measured.rho[name] - mean) ** 2 for name, mean in truth.items())
        better += sum((measured.used[name] - mean) ** 2 for name, mean in truth.items())
    assert better < 0.6 * raw


def test_noisier_sources_are_drawn_further_and_a_common_shift_is_no_noise() -> None:
    rng = np.random.default_rng(33)
    found = shrink(np.array([1.0, 0.2, 0.5, 0.9, 0.1]), np.array([0.01, 0.02, 0.1, 0.3, 1.0]))
    assert (np.diff(found.factors) > 0).all()
    own = np.array([0.1, 0.5, 1.0, 2.0, 0.3])
    draws = rng.normal(0, np.sqrt(own), (20_000, 5)) + rng.normal(0, 3.0, (20_000, 1))
    assert variances(draws) == pytest.approx(own, rel=0.12, abs=0.02)


def test_replicates_are_drawn_to_their_own_mean_by_the_same_factors() -> None:
    found = shrink(np.array([1.0, 0.2, 0.5, 0.9]), np.array([0.1, 0.2, 0.1, 0.3]))
    assert found.applied(np.array([[1.0, 0.2, 0.5, 0.9]]))[0] == pytest.approx(found.values)
    assert found.applied(np.full((1, 4), 2.0))[0] == pytest.approx([2.0] * 4)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-2, 2), min_size=4, max_size=9), st.floats(0.01, 3), st.floats(-5, 5), st.floats(0.1, 10))
def test_shrinkage_moves_with_shift_and_scale_and_keeps_between(means: list[float], noise: float, shift: float, scale: float) -> None:
    x, v = np.array(means), np.linspace(noise, 2 * noise, len(means))
    found = shrink(x, v)
    moved = shrink(scale * x + shift, scale**2 * v)
    assert moved.values == pytest.approx(scale * found.values + shift, abs=1e-6 * scale + 1e-9)
    between = (found.values - x) * (found.pooled - found.values)
    assert (between >= -1e-12).all()


def test_fewer_than_four_sources_stay_as_they_are_and_it_is_said() -> None:
    table = toy_table(crossed(np.random.default_rng(34), {"a": 1.0, "b": 0.1, "c": 0.4}, 10, 1, 0.5, 0.0, 0.1))
    measured = measure(config(shrink="pooled"), table, table.sources, 1)
    assert measured.used == measured.rho
    assert any("shrinkage needs 4 sources" in note for note in measured.notes)


# ------------------------------------------------------------------ choosing tau


def test_tau_for_a_budget_and_for_effective_sources() -> None:
    tokens = {"a": 100, "b": 300, "c": 500, "d": 100}
    shares, rho = natural(tokens), {"a": 1.0, "b": 0.2, "c": -0.3, "d": 0.5}
    free = Bounds.of(tokens, 0.0, set(), None, None)

    def chosen(**kl: float) -> tuple[float, dict[str, float]]:
        tau = choose_tau(config("kl", kl=kl).kl, shares, rho, free)
        return tau, tilt(shares, rho, tau, free)

    tau, weights = chosen(divergence=0.1)
    assert divergence(weights, shares) == pytest.approx(0.1, rel=1e-5)
    assert divergence(tilt(shares, rho, 0.99 * tau, free), shares) > 0.1
    _, weights = chosen(effective_sources=2.0)
    assert effective_sources(weights) == pytest.approx(2.0, rel=1e-5)
    assert weights["a"] == max(weights.values())
    with pytest.raises(ConfigError, match=r"leaves 4 effective sources[\s\S]*at most 3\.[\s\S]*method uniform"):
        chosen(effective_sources=4.0)
    tight = Bounds.of(tokens, 0.2, set(), None, None)
    with pytest.raises(ConfigError, match=r"within 1e-06 nats[\s\S]*at least 0\.[\s\S]*set kl.divergence to"):
        choose_tau(config("kl", kl={"divergence": 1e-6}).kl, shares, rho, tight)


# ------------------------------------------------------------------ bad and borderline input


def test_single_source_all_equal_and_order() -> None:
    rng = np.random.default_rng(41)
    one = toy_table(crossed(rng, {"a": 0.5}, 20, 1, 0.3, 0.0, 0.1))
    found = solve(config(shrink="pooled"), one, {"a": 10}, 1)
    assert (found.weights, found.intervals) == ({"a": 1.0}, {"a": (1.0, 1.0)})
    same = np.random.default_rng(42).normal(1, 0.3, (20, 1, 1))
    equal = toy_table({name: same for name in "abcd"})
    for rule in (config(), config(shrink="pooled"), config("kl", kl={"tau": 1.0})):
        assert solve(rule, equal, dict.fromkeys("abcd", 10), 1).weights == pytest.approx(dict.fromkeys("abcd", 0.25))
    rates = crossed(rng, MEANS, 20, 4, 0.3, 0.1, 0.1)
    forward, backward = (
        solve(config(shrink="pooled"), toy_table({n: rates[n] for n in names}), dict.fromkeys(names, 10), 1)
        for names in ("abcd", "dcba")
    )
    assert forward.weights == pytest.approx(backward.weights)
    assert forward.intervals["b"] == pytest.approx(backward.intervals["b"])


def test_all_scores_negative() -> None:
    """Eq. 6 has no weights then, and says so; the tilted rule has, if harm is given the floor."""
    table = toy_table(crossed(np.random.default_rng(43), {"a": -1.0, "b": -2.0}, 20, 1, 0.1, 0.0, 0.1))
    with pytest.raises(DataError, match=r"positive benefit[\s\S]*gains nothing more"):
        solve(config(), table, {"a": 10, "b": 10}, 1)
    with pytest.raises(ConfigError, match=r"room for 0\.0 %"):
        solve(config("kl", kl={"tau": 1.0}), table, {"a": 10, "b": 10}, 1)
    kept = solve(config("kl", kl={"tau": 1.0}, harmful="floor"), table, {"a": 10, "b": 10}, 1)
    assert kept.weights["a"] == pytest.approx(1 / (1 + math.exp(-1)), abs=0.05)
    assert kept.harmful == ["a", "b"]


def test_a_single_scored_document_is_never_called_harmful() -> None:
    table = toy_table({"a": np.full((20, 1, 1), 1.0), "b": np.full((1, 1, 1), -1.0)})
    found = solve(config(floor=0.01), table, {"a": 10, "b": 10}, 1)
    assert found.harmful == []
    assert found.weights["b"] == pytest.approx(0.01)
    assert any("b: a single scored document" in note for note in found.measured.notes)


def test_scores_that_are_not_numbers_are_refused_in_tables_too(tmp_path: Path) -> None:
    table = toy_table({"a": np.full((3, 1, 1), np.nan), "b": np.ones((3, 1, 1))})
    with pytest.raises(DataError, match="finite"):
        solve(config("kl", kl={"tau": 1.0}), table, {"a": 10, "b": 10}, 1)
    with pytest.raises(DataError, match="finite"):
        solve(config(), table, {"a": 10, "b": 10}, 1)
