"""Baselines beside influence: random mixtures, one source left out, RegMix. Oracles: closed forms and brute force."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hand_tables import build_influence, one_column
from pydantic import ValidationError
from tiny_shards import build_shards
from toy_trainings import family, trained

from megatron_r1.artifacts.base import Artifact, open_workspace
from megatron_r1.artifacts.mixture import Mixture, load_mixture
from megatron_r1.mixture.config import MixtureConfig, RegMixConfig, SamplingConfig, describe
from megatron_r1.mixture.regmix import Ridge, best_mean
from megatron_r1.mixture.run import run
from megatron_r1.mixture.sampling import draw
from megatron_r1.mixture.weights import Bounds
from megatron_r1.utils.errors import ArtifactError, ConfigError, EnvironmentProblem

TOKENS = {"a": 600, "b": 300, "c": 100}
FREE = Bounds(dict.fromkeys("abc", 0.0), dict.fromkeys("abc", 1.0))
SLOPES = {"code": np.array([-1.2, 0.1, 0.3]), "math": np.array([0.3, -1.0, 0.4])}
FAST = {"candidates": 4000, "best": 50}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return build_shards(tmp_path_factory.mktemp("shards"), {s: {"train": [np.arange(n // 2)] * 2} for s, n in TOKENS.items()})


def config(method: str, inputs: dict[str, Any] | None = None, **changes: object) -> MixtureConfig:
    return MixtureConfig.model_validate({"method": method, "inputs": {"shards": "corpus", **(inputs or {})}, "seed": 1, "bootstrap": 200, **changes})


def mix(settings: MixtureConfig, folder: Path, **inputs: Artifact | list[Artifact]) -> Mixture:
    return load_mixture(run(settings, inputs, open_workspace(folder, "mix", "mixture", settings, inputs)))


# -------------------------------------------------------------------------------------------- random


def test_moments_of_random_mixtures() -> None:
    """Dirichlet(s p): mean p, variance p (1 - p) / (s + 1); concentrations far below 1 included."""
    shares = {"a": 0.64, "b": 0.04, "c": 0.32}
    for strength in (0.1, 5.0):
        settings = SamplingConfig(lowest=strength, highest=strength, temperature=1.0, minimum=0.0)
        rows, strengths = draw(np.random.default_rng(0), shares, settings, FREE, 40_000)
        p = np.array(list(shares.values()))
        assert np.allclose(rows.sum(axis=1), 1)
        assert np.allclose(rows.mean(axis=0), p, atol=0.012)
        assert np.allclose(rows.var(axis=0), p * (1 - p) / (strength + 1), rtol=0.06)
        assert np.allclose(strengths, strength)
    tempered = SamplingConfig(lowest=5, highest=5, temperature=0.5, minimum=0.0)
    rows, _ = draw(np.random.default_rng(0), shares, tempered, FREE, 40_000)
    assert np.allclose(rows.mean(axis=0), np.sqrt(p) / np.sqrt(p).sum(), atol=0.01)


def test_small_shares_become_nothing_and_caps_are_kept() -> None:
    shares = {"a": 0.6, "b": 0.3, "c": 0.1}
    rows, _ = draw(np.random.default_rng(0), shares, SamplingConfig(minimum=0.05), FREE, 2000)
    assert ((rows == 0) | (rows >= 0.05)).all()
    assert (rows == 0).any()
    capped = Bounds(FREE.low, {"a": 1.0, "b": 0.5, "c": 0.3})
    rows, _ = draw(np.random.default_rng(0), shares, SamplingConfig(), capped, 500)
    assert (rows <= np.array([1.0, 0.5, 0.3]) + 1e-9).all()
    with pytest.raises(ConfigError, match=r"random mixtures can keep[\s\S]*raise max_epochs"):
        draw(np.random.default_rng(0), shares, SamplingConfig(highest=0.1), Bounds(FREE.low, {"a": 0.34, "b": 0.34, "c": 0.34}), 100)


def test_a_random_mixture_is_its_number(shards: Artifact, tmp_path: Path) -> None:
    found = [mix(config("random", random={"index": i}), tmp_path / str(k), shards=shards) for k, i in enumerate((0, 1, 0))]
    assert found[0] == found[2]
    assert found[0].weights != found[1].weights
    assert sum(found[1].weights.values()) == pytest.approx(1)
    assert found[1].strength is not None
    assert "random mixture 1 of seed 1" in (found[1].origin or "")


# -------------------------------------------------------------------------------------------- without


def test_leaving_one_out_keeps_the_others_in_proportion(shards: Artifact, tmp_path: Path) -> None:
    found = mix(config("without", without="b"), tmp_path / "natural", shards=shards)
    assert found.weights == pytest.approx({"a": 6 / 7, "b": 0, "c": 1 / 7})
    assert (found.without, found.origin) == ("b", "natural shares without b, the others in proportion")
    settings = config("uniform")
    base = run(settings, {"shards": shards}, open_workspace(tmp_path, "even", "mixture", settings, {"shards": shards}))
    found = mix(config("without", {"base": "even"}, without="a"), tmp_path / "even", shards=shards, base=base)
    assert found.weights == pytest.approx({"a": 0, "b": 0.5, "c": 0.5})
    assert found.base == pytest.approx(dict.fromkeys("abc", 1 / 3))


def test_what_cannot_be_left_out(shards: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\(a, b, c\)[\s\S]*'d'[\s\S]*correct `without`"):
        mix(config("without", without="d"), tmp_path, shards=shards)
    with pytest.raises(ConfigError, match="one source has everything"):
        mix(config("without", without="a", sources=["a"]), tmp_path, shards=shards)
    settings = config("explicit", weights={"a": 1})
    base = run(settings, {"shards": shards}, open_workspace(tmp_path, "one", "mixture", settings, {"shards": shards}))
    with pytest.raises(ConfigError, match="at least one source besides a"):
        mix(config("without", {"base": "one"}, without="a"), tmp_path / "b", shards=shards, base=base)
    with pytest.raises(ConfigError, match=r"shares of a[\s\S]*the same corpus step"):
        mix(config("without", {"base": "one"}, without="b", sources=["b", "c"]), tmp_path / "c", shards=shards, base=base)


# -------------------------------------------------------------------------------------------- regmix


def test_ridge_against_normal_equations_and_leaving_one_out_by_hand() -> None:
    rng = np.random.default_rng(0)
    x = rng.dirichlet(np.ones(4), 15)
    y = x @ np.array([1.0, -2.0, 0.5, 0.1]) + rng.normal(0, 0.05, 15)
    fit = Ridge.fit(x, y)

    def solved(x: np.ndarray, y: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray, float]:
        c, m = x.mean(0), y.mean()
        return np.linalg.solve((x - c).T @ (x - c) + penalty * np.eye(x.shape[1]), (x - c).T @ (y - m)), c, m

    scale = ((x - x.mean(0)) ** 2).sum() / 4
    slopes, _, _ = solved(x, y, fit.penalty * scale)
    assert np.allclose(fit.slopes, slopes)

    def left_out(penalty: float) -> float:
        """Each proxy foretold by a ridge fit to the others with this penalty."""
        errors = []
        for i in range(15):
            keep = np.arange(15) != i
            w, c, m = solved(x[keep], y[keep], penalty)
            errors.append(y[i] - (m + (x[i] - c) @ w))
        return float(np.mean(np.square(errors)))

    from megatron_r1.mixture.regmix import PENALTIES

    assert fit.penalty == pytest.approx(min(PENALTIES, key=lambda p: left_out(p * scale)))


def test_the_best_candidates_are_averaged() -> None:
    rng = np.random.default_rng(1)
    rows, foretold = rng.dirichlet(np.ones(3), 500), rng.normal(size=500)
    assert np.allclose(best_mean(rows, foretold, 20), rows[np.argsort(foretold)[:20]].mean(axis=0))


@pytest.fixture(scope="module")
def lawful(shards: Artifact, tmp_path_factory: pytest.TempPathFactory) -> list[Artifact]:
    return proxies(tmp_path_factory.mktemp("lawful"), shards)


def optimum(x: np.ndarray) -> np.ndarray:
    """The best of these mixtures by the law itself."""
    goal = np.mean([np.exp((x - 1 / 3) @ slopes) for slopes in SLOPES.values()], axis=0)
    return x[goal.argmin()]


def proxies(folder: Path, shards: Artifact, n: int = 24, noise: float = 0.002, seed: int = 0, **changes: Any) -> list[Artifact]:
    """Proxies whose log loss is linear in the shares."""
    rng = np.random.default_rng(seed)
    x = rng.dirichlet(np.ones(3), n)
    losses = {c: np.exp(1.2 + x @ slopes + rng.normal(0, noise, n)) for c, slopes in SLOPES.items()}
    return family(folder, shards, x, "abc", losses, **changes)


def test_regmix_finds_the_mixture_of_a_log_linear_law(shards: Artifact, lawful: list[Artifact], tmp_path: Path) -> None:
    """a helps code, b helps mathematics, c nothing: the best mixture lies between a and b."""
    found = mix(config("regmix", {"proxies": ["proxy-0"]}, regmix=FAST), tmp_path, shards=shards, proxies=lawful)
    best = optimum(np.random.default_rng(0).dirichlet(np.ones(3), 200_000))
    assert list(found.weights.values()) == pytest.approx(best, abs=0.06)
    assert 0.1 < best[0] < 0.9
    fit = found.regression
    assert fit is not None
    assert fit.proxies == [artifact.name for artifact in lawful]
    for capability, slopes in SLOPES.items():
        assert list(fit.slopes[capability].values()) == pytest.approx(slopes - slopes.mean(), abs=0.02)
        quality = fit.capabilities[capability]
        assert quality.spearman is not None
        assert quality.spearman > 0.97
        assert quality.error < 0.02
        assert quality.error < quality.spread / 5
        truth = np.exp(1.2 + np.array(list(found.weights.values())) @ slopes)
        assert quality.foretold == pytest.approx(truth, rel=0.01)
    assert fit.capabilities["joint"].foretold <= fit.capabilities["joint"].lowest + 0.02
    assert found.interval_covers == ["proxy runs"]
    assert found.intervals is not None
    assert all(low - 0.02 <= found.weights[name] <= high + 0.02 for name, (low, high) in found.intervals.items())
    assert found.notes == []
    assert "linear fit of 24 proxies" in (found.origin or "")


def test_regmix_weighs_capabilities_alike_whatever_the_size_of_their_loss(shards: Artifact, tmp_path: Path) -> None:
    """Losses of one capability times ten: the same weights."""
    x = np.random.default_rng(0).dirichlet(np.ones(3), 12)
    base = {c: np.exp(1.0 + x @ slopes) for c, slopes in SLOPES.items()}
    found = [
        mix(config("regmix", {"proxies": ["p"]}, regmix=FAST), tmp_path / f"mix{k}", shards=shards,
            proxies=family(tmp_path / str(k), shards, x, "abc", {**base, "math": k * base["math"]}))
        for k in (1, 10)
    ]  # fmt: skip
    assert found[0].weights == pytest.approx(found[1].weights)


def test_regmix_keeps_caps(shards: Artifact, lawful: list[Artifact], tmp_path: Path) -> None:
    settings = config("regmix", {"proxies": ["p"]}, regmix=FAST, budget="700 tokens", max_epochs="1 epoch")
    found = mix(settings, tmp_path, shards=shards, proxies=lawful)
    assert found.weights["b"] <= 300 / 700 + 1e-9
    assert found.weights["c"] <= 100 / 700 + 1e-9


def test_regmix_on_noise_says_so(shards: Artifact, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    losses = {c: np.exp(1 + rng.normal(0, 0.05, 12)) for c in ("code", "math")}
    found = mix(
        config("regmix", {"proxies": ["p"]}, regmix=FAST), tmp_path, shards=shards,
        proxies=family(tmp_path, shards, rng.dirichlet(np.ones(3), 12), "abc", losses),
    )  # fmt: skip
    assert any("rest on noise" in note for note in found.notes)


def test_regmix_beside_an_influence_table(shards: Artifact, lawful: list[Artifact], tmp_path: Path) -> None:
    """What influence measured is recorded beside the weights of every method, notes of both are kept."""
    rates = {name: rate + 0.01 * np.random.default_rng(0).normal(size=20) for name, rate in (("a", 1.0), ("b", 0.5), ("c", -0.2))}
    influence = build_influence(tmp_path, one_column(rates), ["code"], [10])
    settings = config("regmix", {"proxies": ["p"], "influence": "i"}, regmix=FAST)
    found = mix(settings, tmp_path, shards=shards, proxies=lawful, influence=influence)
    assert found.harmful == ["c"]
    assert found.interval_covers == ["proxy runs"]
    assert found.decision is not None


def test_trees_are_asked_for_by_name_and_refused_by_name(shards: Artifact, lawful: list[Artifact], tmp_path: Path) -> None:
    settings = config("regmix", {"proxies": ["p"]}, regmix={**FAST, "fit": "lightgbm"})
    try:
        import lightgbm  # noqa: F401
    except ImportError:
        with pytest.raises(EnvironmentProblem, match=r"regmix.fit is lightgbm[\s\S]*pip install lightgbm, or set regmix.fit: linear"):
            mix(settings, tmp_path, shards=shards, proxies=lawful)
        return
    found = mix(settings, tmp_path, shards=shards, proxies=proxies(tmp_path / "many", shards, n=120))
    assert found.intervals is None
    assert found.regression is not None
    assert found.regression.capabilities["joint"].spearman > 0.7  # type: ignore[operator]
    assert found.weights["c"] < 0.2


def test_bad_proxies_are_refused(shards: Artifact, lawful: list[Artifact], tmp_path: Path) -> None:
    settings = config("regmix", {"proxies": ["p"]}, regmix=FAST)
    good = lawful[:5]

    def refused(kind: type[Exception], message: str, given: list[Artifact], **changes: object) -> None:
        chosen = settings.model_copy(update=changes)
        with pytest.raises(kind, match=message):
            mix(chosen, tmp_path / "out", shards=shards, proxies=given)

    refused(ConfigError, r"at least 5 proxies for 3 sources[\s\S]*4[\s\S]*set repeat: 5", good[:4])
    refused(ConfigError, r"at least two sources[\s\S]*method natural", good, sources=["a"])
    other = trained(tmp_path, shards, {"a": 1.0}, {"code": 1.0, "math": 1.0}, "odd", shards="0" * 64)
    refused(ArtifactError, r"trained on the shards that are mixed[\s\S]*odd was trained on 00000000", [*good, other])
    strange = trained(tmp_path, shards, {"a": 0.5, "z": 0.5}, {"code": 1.0, "math": 1.0}, "strange")
    refused(ArtifactError, r"strange was also trained on z", [*good, strange])
    longer = trained(tmp_path, shards, {"a": 1.0}, {"code": 1.0, "math": 1.0}, "longer", tokens=9999)
    refused(ArtifactError, r"differ in their mixture only[\s\S]*longer differs in tokens[\s\S]*repeat:", [*good, longer])
    blind = trained(tmp_path, shards, {"a": 1.0}, None, "blind")
    refused(ArtifactError, r"probe losses of blind[\s\S]*none[\s\S]*inputs.probe", [*good, blind])
    nan = trained(tmp_path, shards, {"a": 1.0}, {"code": None, "math": 1.0}, "nan")  # type: ignore[dict-item]
    refused(ArtifactError, r"numbers that are none for code[\s\S]*diverged", [*good, nan])
    less = trained(tmp_path, shards, {"a": 1.0}, {"code": 1.0}, "less")
    refused(ArtifactError, r"the same capabilities[\s\S]*less", [*good, less])
    flat = family(tmp_path / "flat", shards, np.random.default_rng(0).dirichlet(np.ones(3), 6), "abc", {"code": np.full(6, 2.0)})
    refused(ArtifactError, r"losses differ[\s\S]*for code", flat)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("random", {}, "random must be given with method random"),
        ("uniform", {"random": {"index": 0}}, "random must be given with method random, and only then"),
        ("without", {}, "without must be given"),
        ("regmix", {}, "inputs.proxies must be given"),
        ("natural", {"inputs": {"shards": "c", "proxies": ["p"]}}, "inputs.proxies must be given"),
        ("natural", {"regmix": {}}, "regmix belongs to method regmix"),
        ("natural", {"inputs": {"shards": "c", "base": "b"}}, "inputs.base belongs to"),
        ("doremi", {"inputs": {"shards": "c", "proxies": ["p", "q"]}}, "one training with objective group_dro"),
        ("perplexity", {}, "inputs.checkpoint must be given"),
        ("random", {"random": {"index": 0, "lowest": 6}}, "lowest must not be above highest"),
        ("regmix", {"inputs": {"shards": "c", "proxies": ["p"]}, "regmix": {"candidates": 1000, "best": 1001}}, "best must not be above"),
    ],
)
def test_contradictory_settings_are_refused(method: str, changes: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MixtureConfig.model_validate({"method": method, "inputs": {"shards": "c"}, **changes})


def test_describe() -> None:
    assert describe(config("random", random={"index": 3})) == "share tokens by random mixture 3 around the natural shares"
    assert describe(config("without", {"base": "mix"}, without="a")) == "share tokens as mix, without a"
    assert describe(config("regmix", {"proxies": ["p", "q"]})) == "share tokens by a linear regression over 2 proxies (RegMix)"
    assert describe(config("perplexity", {"checkpoint": "t"})).endswith("middle perplexity, 50% of all tokens kept")
    assert RegMixConfig().best == 100


# -------------------------------------------------------------------------------------------- doremi


def dro(weights: dict[str, float], updates: int = 7) -> dict[str, Any]:
    return {"weights": weights, "last": weights, "excess": dict.fromkeys(weights, 0.1), "updates": updates, "step_size": 1.0, "smoothing": 1e-3, "reference": "ref"}


def test_doremi_takes_the_mean_domain_weights(shards: Artifact, tmp_path: Path) -> None:
    settings = config("doremi", {"proxies": ["dro"]})
    even = dict.fromkeys("abc", 1 / 3)
    given = trained(tmp_path, shards, even, None, "dro", objective="group_dro", group_dro=dro({"a": 0.2, "b": 0.5, "c": 0.3}))
    found = mix(settings, tmp_path, shards=shards, proxies=[given])
    assert found.weights == pytest.approx({"a": 0.2, "b": 0.5, "c": 0.3})
    assert found.group_dro is not None
    assert (found.group_dro.proxy, found.group_dro.reference, found.group_dro.steps) == ("dro", "ref", 7)
    capped = mix(settings.model_copy(update={"budget": 500, "max_epochs": 1.0}), tmp_path / "capped", shards=shards, proxies=[given])
    assert capped.weights == pytest.approx({"a": 0.4, "b": 0.4, "c": 0.2}, abs=0.21)
    assert capped.weights["c"] == pytest.approx(0.2)
    assert capped.capped == ["c"]
    idle = trained(tmp_path, shards, even, None, "idle", objective="group_dro", group_dro=dro(even, 0))
    assert any("never updated" in note for note in mix(settings, tmp_path / "idle", shards=shards, proxies=[idle]).notes)


def test_doremi_refuses_what_is_no_group_dro_training(shards: Artifact, tmp_path: Path) -> None:
    settings = config("doremi", {"proxies": ["dro"]})
    plain = trained(tmp_path, shards, {"a": 1.0}, None, "plain")
    with pytest.raises(ArtifactError, match=r"plain to be trained with objective group_dro[\s\S]*next_token"):
        mix(settings, tmp_path, shards=shards, proxies=[plain])
    part = trained(tmp_path, shards, {"a": 0.5, "b": 0.5}, None, "part", objective="group_dro", group_dro=dro({"a": 0.5, "b": 0.5}))
    with pytest.raises(ArtifactError, match=r"none of c in part[\s\S]*sources: uniform"):
        mix(settings, tmp_path, shards=shards, proxies=[part])
    other = trained(tmp_path, shards, {"a": 1.0}, None, "other", objective="group_dro", group_dro=dro(dict.fromkeys("abc", 1 / 3)), shards="0" * 64)
    with pytest.raises(ArtifactError, match="other was trained on 00000000"):
        mix(settings, tmp_path, shards=shards, proxies=[other])
