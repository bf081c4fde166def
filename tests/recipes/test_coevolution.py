"""The recipe of co-evolution: three arms that differ in the documents they may train on, each measured anew with its own model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_r1.cli import main
from megatron_r1.pipeline.recipe import Recipe, load_recipe

PATH = str(Path(__file__).parents[2] / "benchmarks" / "recipes" / "coevolution.yaml")
ARMS = ("dropped", "random", "reweighted")


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(PATH)


def plain(recipe: Recipe, step: str, *without: str) -> dict[str, Any]:
    return {key: value for key, value in recipe.steps[step].plain().items() if key not in without}


@pytest.mark.parametrize("round_", [1, 2])
def test_arms_differ_in_the_documents_only(recipe: Recipe, round_: int) -> None:
    first = plain(recipe, f"mix{round_}_dropped", "filter", "inputs")
    train = "round1" if round_ == 1 else "trained"
    for arm in ARMS:
        assert plain(recipe, f"mix{round_}_{arm}", "filter", "inputs") == first
        assert plain(recipe, f"{train}-{arm}", "inputs") == plain(recipe, f"{train}-dropped", "inputs")
    filters = {arm: recipe.steps[f"mix{round_}_{arm}"].filter for arm in ARMS}  # type: ignore[attr-defined]
    assert {arm: (f.rule, f.control) for arm, f in filters.items()} == {"dropped": ("paper", False), "random": ("paper", True), "reweighted": ("none", False)}
    assert filters["dropped"].unscored == filters["random"].unscored == "drop"


def test_every_arm_goes_on_from_its_own_model_and_scores(recipe: Recipe) -> None:
    for arm in ARMS:
        assert recipe.inputs(f"mix1_{arm}")["influence"] == "influence1"
        assert recipe.inputs(f"round1-{arm}") == {**recipe.inputs("round1-dropped"), "mixture": f"mix1_{arm}"}
        assert recipe.inputs(f"measured-{arm}")["checkpoint"] == f"round1-{arm}"
        assert recipe.inputs(f"mix2_{arm}") == {**recipe.inputs("mix2_dropped"), "influence": f"measured-{arm}", "previous": f"mix1_{arm}"}
        assert recipe.inputs(f"trained-{arm}") == {**recipe.inputs("trained-dropped"), "checkpoint": f"round1-{arm}", "mixture": f"mix2_{arm}"}
        assert plain(recipe, f"measured-{arm}", "inputs") == plain(recipe, "influence1", "inputs")


def test_the_stop_rules_path_is_the_rounds_mean_rate_times_its_updates(recipe: Recipe) -> None:
    train = recipe.steps["round1-dropped"]
    updates = int(train.budget) / int(train.global_batch)  # type: ignore[attr-defined]
    mean = train.lr.peak * (1 + train.lr.final_ratio) / 2  # type: ignore[attr-defined]
    assert recipe.steps["mix1_dropped"].stop.path == pytest.approx(mean * updates, rel=0.05)  # type: ignore[attr-defined]


def test_dry_run_and_report(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(recipe.parents("report")) == set(recipe.steps) - {"report"}
    assert main(["run", PATH, "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "documents: as many at random as the rule paper keeps" in said
    assert "trained-* (3)" in said
