"""Eq. 6 against numbers computed by hand; clipping, harm, baselines, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hand_tables import build_influence, one_column
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny_shards import build_shards

from megatron_r1.artifacts.base import Artifact, open_workspace
from megatron_r1.artifacts.influence import InfluenceTable
from megatron_r1.artifacts.mixture import Mixture, load_mixture
from megatron_r1.mixture.config import MixtureConfig, describe
from megatron_r1.mixture.run import run
from megatron_r1.mixture.solve import solve
from megatron_r1.mixture.tables import TABLES
from megatron_r1.pipeline.recipe import load_recipe
from megatron_r1.utils.errors import ArtifactError, ConfigError, DataError
from megatron_r1.utils.io import atomic_write_json

TOKENS = {"a": 600, "b": 300, "c": 100}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return build_shards(
        tmp_path_factory.mktemp("shards"), {s: {"train": [np.arange(n // 2)] * 2} for s, n in TOKENS.items()}
    )


def config(method: str = "influence", **changes: object) -> MixtureConfig:
    inputs = {"shards": "corpus", **({"influence": "influence"} if method == "influence" else {})}
    return MixtureConfig.model_validate(
        {"method": method, "inputs": inputs, "seed": 1, "floor": 0.0, "bootstrap": 400, **changes}
    )


def mix(settings_: MixtureConfig, folder: Path, **inputs: Artifact) -> Mixture:
    return load_mixture(run(settings_, inputs, open_workspace(folder, "mix", "mixture", settings_, inputs)))


def noisy(mean: float, spread: float = 0.01, seed: int = 0, n: int = 30) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=n)
    return mean + spread * (values - values.mean())


def test_equation_6_by_hand(shards: Artifact, tmp_path: Path) -> None:
    """Two capabilities, two checkpoints (alpha 1/4 and 3/4), documents of different length, scales that differ.

    source a: tokens 10 + 30 = 40
      code: 1/4 (20 + 60)/2 + 3/4 (8 + 32)/4  = 10 + 7.5 = 17.5     math: 1/4 (0 + 8)/1 + 3/4 (4 + 12)/8 = 2 + 1.5 = 3.5
      rho_a = (17.5 + 3.5) / 2 / 40 = 0.2625
    source b: tokens 50
      code: 1/4 4/2 + 3/4 16/4 = 3.5      math: 1/4 2/1 + 3/4 32/8 = 3.5      rho_b = 3.5 / 50 = 0.07
    source c: tokens 20: all scores 0 but math@30 = -16: 3/4 (-16)/8 / 2 / 20 = -0.0375 -> clipped
    """
    table = {
        "a": (
            [10, 30],
            {"code@10": [20.0, 60.0], "code@30": [8.0, 32.0], "math@10": [0.0, 8.0], "math@30": [4.0, 12.0]},
        ),
        "b": ([50], {"code@10": [4.0], "code@30": [16.0], "math@10": [2.0], "math@30": [32.0]}),
        "c": ([20], {"code@10": [0.0], "code@30": [0.0], "math@10": [0.0], "math@30": [-16.0]}),
    }
    scales = {"code@10": 2.0, "code@30": 4.0, "math@10": 1.0, "math@30": 8.0}
    influence = build_influence(tmp_path, table, ["code", "math"], [10, 30], scales)
    found = mix(config(), tmp_path, shards=shards, influence=influence)
    assert found.rho == pytest.approx({"a": 0.2625, "b": 0.07, "c": -0.0375}, abs=1e-12)
    assert found.weights == pytest.approx({"a": 0.2625 / 0.3325, "b": 0.07 / 0.3325, "c": 0.0}, abs=1e-12)
    assert found.rho_capability["a"] == pytest.approx({"code": 17.5 / 40, "math": 3.5 / 40})
    assert found.clipped == ["c"]
    assert (found.influence_sha256, found.normalise) == (influence.fingerprint, "rms")
    # The self scales are twice the rms scales here, so rho halves and the weights stay.
    by_self = mix(config(normalise="self"), tmp_path, shards=shards, influence=influence)
    assert by_self.rho["a"] == pytest.approx(0.13125)
    assert by_self.weights == pytest.approx(found.weights)
    raw = mix(config(normalise="none"), tmp_path, shards=shards, influence=influence)
    assert raw.rho["b"] == pytest.approx((0.25 * 4 + 0.75 * 16 + 0.25 * 2 + 0.75 * 32) / 2 / 50)


def test_long_documents_count_by_their_tokens(shards: Artifact, tmp_path: Path) -> None:
    """rho is a mean over tokens, not over documents: splitting a document in two changes nothing."""
    whole = {
        "a": ([30, 10], {"code@10": [30.0, 2.0]}),
        "b": ([10], {"code@10": [5.0]}),
        "c": ([10], {"code@10": [1.0]}),
    }
    split = {**whole, "a": ([10, 20, 10], {"code@10": [12.0, 18.0, 2.0]})}
    rhos = [
        mix(config(), tmp_path, shards=shards, influence=build_influence(tmp_path, t, ["code"], [10])).rho["a"]
        for t in (whole, split)
    ]
    assert rhos == pytest.approx([0.8, 0.8])


def test_known_harm_gets_nothing_and_doubt_gets_the_floor(shards: Artifact, tmp_path: Path) -> None:
    table = one_column({"a": noisy(1.0), "b": noisy(-0.001, spread=0.5), "c": noisy(-0.2)})
    influence = build_influence(tmp_path, table, ["code"], [10])
    found = mix(config(floor=0.01), tmp_path, shards=shards, influence=influence)
    assert found.clipped == ["b", "c"]
    assert found.harmful == ["c"]
    assert found.rho_intervals["b"][0] < 0 < found.rho_intervals["b"][1]
    assert found.rho_intervals["c"][1] < 0
    assert found.weights == pytest.approx({"a": 0.99, "b": 0.01, "c": 0.0})
    assert found.intervals is not None
    assert found.intervals["c"] == (0.0, 0.0)
    kept = mix(config(floor=0.01, harmful="floor"), tmp_path, shards=shards, influence=influence)
    assert kept.weights == pytest.approx({"a": 0.98, "b": 0.01, "c": 0.01})


def test_intervals_hold_the_weights_and_shrink_with_documents(shards: Artifact, tmp_path: Path) -> None:
    widths = []
    for n in (20, 500):
        table = one_column({"a": noisy(1.0, 0.5, 1, n), "b": noisy(0.5, 0.5, 2, n), "c": noisy(0.25, 0.5, 3, n)})
        found = mix(config(), tmp_path, shards=shards, influence=build_influence(tmp_path, table, ["code"], [10]))
        assert found.intervals is not None
        assert all(low < found.weights[name] < high for name, (low, high) in found.intervals.items())
        widths.append(found.intervals["a"][1] - found.intervals["a"][0])
    assert widths[1] < 0.35 * widths[0]


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.sampled_from("abcdef"), st.floats(-1, 1), min_size=2), st.floats(0, 0.05), st.integers(0, 5))
def test_properties_of_the_rule(
    tmp_path_factory: pytest.TempPathFactory, means: dict[str, float], floor: float, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("table")
    rates = {name: noisy(mean, 0.1, seed + i) for i, (name, mean) in enumerate(means.items())}
    table = InfluenceTable.open(build_influence(folder, one_column(rates), ["code"], [10]))
    rule = config(floor=floor, bootstrap=200)
    if max(means.values()) < 0.05:
        return
    found = solve(rule, table, dict.fromkeys(means, 1000), seed)
    assert sum(found.weights.values()) == pytest.approx(1, abs=1e-12)
    for name, mean in means.items():
        if mean < -0.1:
            assert name in found.harmful
            assert found.weights[name] == 0
        elif name not in found.harmful:
            assert found.weights[name] >= floor - 1e-12
        assert (name in found.clipped) == (found.rho[name] <= 0)


def test_weights_are_the_same_on_every_run(shards: Artifact, tmp_path: Path) -> None:
    table = one_column({"a": noisy(1.0, 0.5), "b": noisy(0.5, 0.5, 2), "c": noisy(0.25, 0.5, 3)})
    influence = build_influence(tmp_path, table, ["code"], [10])
    first, second = (mix(config(), tmp_path / str(i), shards=shards, influence=influence) for i in range(2))
    assert first == second


def test_baselines_epochs_and_caps(shards: Artifact, tmp_path: Path) -> None:
    natural = mix(config("natural", budget="2000 tokens"), tmp_path, shards=shards)
    assert natural.weights == natural.natural == pytest.approx({"a": 0.6, "b": 0.3, "c": 0.1})
    assert natural.epochs == pytest.approx({"a": 2.0, "b": 2.0, "c": 2.0})
    uniform = mix(config("uniform", budget="900 tokens"), tmp_path, shards=shards)
    assert uniform.weights == uniform.uniform == pytest.approx(dict.fromkeys("abc", 1 / 3))
    assert uniform.epochs == pytest.approx({"a": 0.5, "b": 1.0, "c": 3.0})
    capped = mix(config("uniform", budget="900 tokens", max_epochs="1 epoch"), tmp_path, shards=shards)
    assert capped.epochs == pytest.approx({"a": 500 / 600, "b": 1.0, "c": 1.0})
    assert capped.capped == ["b", "c"]


def test_explicit_weights_and_a_missing_source(shards: Artifact, tmp_path: Path) -> None:
    found = mix(config("explicit", weights={"a": 3, "c": 1, "gone": 4}), tmp_path, shards=shards)
    assert found.weights == pytest.approx({"a": 0.75, "c": 0.25})
    assert found.missing == ["gone"]


def test_change_from_the_previous_mixture(shards: Artifact, tmp_path: Path) -> None:
    before = config("uniform")
    previous = run(before, {"shards": shards}, open_workspace(tmp_path, "mix", "mixture", before, {"shards": shards}))
    after = config("explicit", weights={"a": 1, "b": 1, "c": 0}, inputs={"shards": "corpus", "previous": "mix0"})
    assert mix(after, tmp_path, shards=shards, previous=previous).change == pytest.approx(1 / 3)


def test_a_harmful_source_comes_back_only_when_it_helps_every_capability(shards: Artifact, tmp_path: Path) -> None:
    """b was harmful; now it helps code and harms math, and jointly helps."""
    before = build_influence(tmp_path, one_column({"a": noisy(1.0), "b": noisy(-0.5), "c": noisy(0.2)}), ["code"], [10])
    first = config()
    inputs = {"shards": shards, "influence": before}
    previous = run(first, inputs, open_workspace(tmp_path, "mix1", "mixture", first, inputs))
    rates = {"a": (1.0, 1.0), "b": (0.9, -0.2), "c": (0.2, 0.1)}

    def table(b_math: float) -> Artifact:
        means = {**rates, "b": (0.9, b_math)}
        content = {
            name: ([100] * 30, {"code@10": (noisy(code) * 100).tolist(), "math@10": (noisy(math) * 100).tolist()})
            for name, (code, math) in means.items()
        }
        return build_influence(tmp_path, content, ["code", "math"], [10])

    tables = {b_math: table(b_math) for b_math in (-0.2, 0.3)}

    def again(readmit: str, b_math: float = -0.2) -> Mixture:
        inputs = {"shards": "corpus", "influence": "influence", "previous": "mix1"}
        settings_ = config(inputs=inputs, readmit=readmit)
        folder = tmp_path / readmit / str(b_math)
        return mix(settings_, folder, shards=shards, influence=tables[b_math], previous=previous)

    out = again("every")
    assert (out.kept_out, out.harmful, out.weights["b"]) == (["b"], [], 0.0)
    for mode in ("joint", "anew"):
        found = again(mode)
        assert found.kept_out == []
        assert found.weights["b"] == pytest.approx(0.35 / (1.0 + 0.35 + 0.15))
    assert again("every", b_math=0.3).kept_out == []


def test_infeasible_caps_name_the_binding_source(shards: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"binding: c \(at most 5.00 %\), b[\s\S]*raise max_epochs"):
        mix(config("uniform", budget="2000 tokens", max_epochs="1 epoch"), tmp_path, shards=shards)


def test_nothing_left_to_gain_is_refused(shards: Artifact, tmp_path: Path) -> None:
    table = one_column({"a": noisy(-1.0), "b": noisy(-0.5), "c": noisy(-0.2)})
    with pytest.raises(DataError, match=r"positive benefit[\s\S]*gains nothing more"):
        mix(config(), tmp_path, shards=shards, influence=build_influence(tmp_path, table, ["code"], [10]))


def test_unscored_source_is_refused(shards: Artifact, tmp_path: Path) -> None:
    influence = build_influence(tmp_path, one_column({"a": noisy(1.0), "b": noisy(0.5)}), ["code"], [10])
    with pytest.raises(ArtifactError, match=r"none for c[\s\S]*`sources`"):
        mix(config(), tmp_path, shards=shards, influence=influence)
    assert set(mix(config(sources=["a", "b"]), tmp_path, shards=shards, influence=influence).weights) == {"a", "b"}


def test_scores_that_are_not_numbers_are_refused(shards: Artifact, tmp_path: Path) -> None:
    table = one_column({"a": noisy(1.0), "b": np.array([1.0, float("nan")]), "c": noisy(0.1)})
    with pytest.raises(ArtifactError, match="1 that are not numbers"):
        mix(config(), tmp_path, shards=shards, influence=build_influence(tmp_path, table, ["code"], [10]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "influence", "inputs": {"shards": "c"}}, "inputs.influence must be given"),
        ({"method": "kl", "kl": {"tau": 1}, "inputs": {"shards": "c"}}, "inputs.influence must be given with method kl"),
        ({"method": "uniform", "inputs": {"shards": "c"}, "filter": {"rule": "paper"}}, "must be given with filter.rule"),
        ({"method": "uniform", "inputs": {"shards": "c"}, "filter": {"control": True}}, "needs a filter.rule"),
        ({"method": "uniform", "inputs": {"shards": "c"}, "shrink": "pooled"}, "belong to the methods influence and kl"),
        ({"method": "kl", "inputs": {"shards": "c", "influence": "i"}}, "kl must be given with method kl"),
        ({"method": "kl", "kl": {}, "inputs": {"shards": "c", "influence": "i"}}, "exactly one of tau"),
        ({"method": "published", "inputs": {"shards": "c"}}, "table must be given"),
        ({"method": "published", "inputs": {"shards": "c"}, "table": "none"}, "there are mobilellm_r1_pretrain1"),
        ({"method": "uniform", "inputs": {"shards": "c"}, "origin": "DoReMi"}, "origin belongs to"),
        ({"method": "explicit", "inputs": {"shards": "c"}}, "weights must be given"),
        ({"method": "explicit", "inputs": {"shards": "c"}, "weights": {"a": 0}}, "at least one above 0"),
        ({"method": "explicit", "inputs": {"shards": "c"}, "weights": {"a": -1, "b": 2}}, "not negative"),
        ({"method": "uniform", "inputs": {"shards": "c"}, "max_epochs": "2 epochs"}, "needs a budget"),
        ({"method": "uniform", "inputs": {"shards": "c"}, "budget": 500}, "write the unit"),
    ],
)
def test_contradictory_settings_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MixtureConfig.model_validate(changes)


def test_a_mixture_that_does_not_sum_to_one_is_refused() -> None:
    with pytest.raises(ValidationError, match="sum to 1"):
        Mixture(method="uniform", weights={"a": 0.5}, natural={"a": 1.0}, uniform={"a": 1.0}, floor=0.0)


def test_every_method_is_recorded_alike_from_one_influence_table(shards: Artifact, tmp_path: Path) -> None:
    """A recipe can make several mixtures from one table and train on each: what was measured stands beside all weights."""
    table = one_column({"a": noisy(1.0, 0.1), "b": noisy(0.5, 0.1, 2), "c": noisy(-0.2, 0.1, 3)})
    influence = build_influence(tmp_path, table, ["code"], [10])
    rules = {
        "influence": {},
        "kl": {"kl": {"tau": 0.5}},
        "uniform": {},
        "natural": {},
        "explicit": {"weights": {"a": 1, "b": 2, "c": 1}, "origin": "a proxy run of another method"},
    }
    found = {
        method: mix(config(method, inputs={"shards": "c", "influence": "i"}, **more), tmp_path / method, shards=shards, influence=influence)
        for method, more in rules.items()
    }
    reference = found["influence"]
    for method, mixture in found.items():
        assert (mixture.method, mixture.harmful, mixture.interval_covers) == (method, ["c"], ["scored documents"])
        assert (mixture.rho, mixture.rho_intervals) == (reference.rho, reference.rho_intervals)
        assert mixture.decision is not None
        assert mixture.decision.paper == reference.decision.paper
        assert mixture.divergence is not None
        assert mixture.effective_sources is not None
        assert 1 <= mixture.effective_sources <= 3
    assert found["natural"].decision.statistical.gain_rate == pytest.approx(0, abs=1e-12)
    assert found["influence"].decision.statistical.gain_rate > found["uniform"].decision.statistical.gain_rate
    assert found["natural"].divergence == pytest.approx(0, abs=1e-12)
    assert found["explicit"].origin == "a proxy run of another method"
    # a and b as 6 : 3 times exp of their benefits over tau; c is known to harm.
    ratio = 2 * np.exp((found["kl"].rho["a"] - found["kl"].rho["b"]) / 0.5)
    assert found["kl"].weights["a"] / found["kl"].weights["b"] == pytest.approx(ratio)
    assert found["kl"].weights["c"] == 0
    assert found["kl"].tau == 0.5


def test_published_table_by_name(tmp_path: Path) -> None:
    names = {"starcoder": 100, "openwebmath": 100, "wiki": 100}
    made = build_shards(tmp_path, {name: {"train": [np.arange(n)]} for name, n in names.items()})
    found = mix(config("published", table="mobilellm_r1_pretrain1"), tmp_path, shards=made)
    assert found.weights == pytest.approx({"starcoder": 10.66 / 22.62, "openwebmath": 6.93 / 22.62, "wiki": 5.03 / 22.62})
    assert found.missing == ["algebraic_stack", "arxiv", "fineweb_edu", "stackexchange"]
    assert (found.table, found.origin) == ("mobilellm_r1_pretrain1", "arXiv 2509.24945 v1, Table 3, phase 1")


def test_published_tables_are_those_of_the_recipes() -> None:
    recipe = load_recipe("mobilellm_r1_140m")
    for name, table in TABLES.items():
        step = recipe.steps["mix_" + name.removeprefix("mobilellm_r1_")]
        assert step.weights == table.weights  # type: ignore[attr-defined]


def test_a_baseline_with_unscored_sources_says_what_it_does_not_record(shards: Artifact, tmp_path: Path) -> None:
    influence = build_influence(tmp_path, one_column({"a": noisy(1.0), "b": noisy(0.5)}), ["code"], [10])
    found = mix(config("uniform", inputs={"shards": "c", "influence": "i"}), tmp_path, shards=shards, influence=influence)
    assert found.decision is None
    assert found.notes == ["what the influence measured is not recorded: it has no scores of c"]


def test_shrinkage_is_recorded_and_off_by_default(tmp_path: Path) -> None:
    names = "abcdef"
    made = build_shards(tmp_path, {name: {"train": [np.arange(100)]} for name in names})
    rates = {name: noisy(0.3 + 0.1 * i, 1.0 + i, i) for i, name in enumerate(names)}
    influence = build_influence(tmp_path, one_column(rates), ["code"], [10])
    plain = mix(config(), tmp_path / "plain", shards=made, influence=influence)
    drawn = mix(config(shrink="pooled"), tmp_path / "drawn", shards=made, influence=influence)
    assert (plain.shrinkage, plain.shrunk, plain.pooled) == ({}, {}, None)
    assert plain.rho == drawn.rho
    assert drawn.pooled is not None
    for name in names:
        wanted = drawn.rho[name] - drawn.shrinkage[name] * (drawn.rho[name] - drawn.pooled)
        assert drawn.shrunk[name] == pytest.approx(wanted)
    assert list(drawn.shrinkage.values()) == sorted(drawn.shrinkage.values())
    total = sum(max(value, 0) for value in drawn.shrunk.values())
    assert drawn.weights == pytest.approx({name: max(value, 0) / total for name, value in drawn.shrunk.items()})


def test_a_mixture_of_an_earlier_release_is_still_read(tmp_path: Path) -> None:
    work = open_workspace(tmp_path, "old", "mixture", {})
    old = {"method": "uniform", "weights": {"a": 1.0}, "natural": {"a": 1.0}, "uniform": {"a": 1.0}, "floor": 0.0, "intervals": None}
    atomic_write_json(work.path / "mixture.json", old)
    found = load_mixture(work.complete({}))
    assert (found.decision, found.kept, found.interval_covers, found.shrinkage) == (None, None, [], {})


def test_describe() -> None:
    assert describe(config("kl", kl={"tau": 2}, inputs={"shards": "c", "influence": "i"}, shrink="pooled", redundancy={})) == (
        "share tokens by influence, tilted from the natural shares, shrunk to the mean, near duplicates counted once, "
        "floor 0, harmful sources dropped"
    )
    kept = config("uniform", inputs={"shards": "c", "influence": "i"}, filter={"rule": "confident", "control": True})
    assert describe(kept).endswith("documents: as many at random as the rule confident keeps")
    assert describe(config(floor=0.002)) == "share tokens by influence (Eq. 6), floor 0.002, harmful sources dropped"
    assert (
        describe(config("uniform", budget="1k tokens", max_epochs="2 epochs"))
        == "share tokens equally, at most 2 epochs"
    )
