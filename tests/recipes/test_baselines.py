"""The recipe that compares mixtures: what it claims to compare is there, and differs in the mixture only."""

from __future__ import annotations

import pytest

from megatron_r1.pipeline.derive import derive, together
from megatron_r1.pipeline.recipe import Recipe, load_recipe


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("baselines")


def test_every_method_is_trained_on_from_one_start(recipe: Recipe) -> None:
    methods = {}
    first = recipe.steps["compared-uniform"].plain()
    for step in recipe.families["compared"]:
        config = recipe.steps[step].plain()
        methods[step.removeprefix("compared-")] = recipe.steps[config["inputs"]["mixture"]].method  # type: ignore[attr-defined]
        assert {**config, "inputs": {**config["inputs"], "mixture": ""}} == {**first, "inputs": {**first["inputs"], "mixture": ""}}
    assert methods == {
        "influence": "influence", "gradient_dot": "influence", "uniform": "uniform", "natural": "natural", "regmix": "regmix", "doremi": "doremi",
        "perplexity": "perplexity",
    }  # fmt: skip
    plain = recipe.steps["influence_plain"].plain()
    assert plain["preconditioner"] == "none"
    assert {**plain, "preconditioner": "adam"} == recipe.steps["influence1"].plain()


def test_every_source_is_left_out_once_and_nothing_else_differs(recipe: Recipe) -> None:
    sources = list(recipe.steps["corpus"].sources)  # type: ignore[attr-defined]
    full = recipe.steps["compared-uniform"].plain()
    assert recipe.families["left_out"] == [f"left_out-{source}" for source in sources]
    for source in sources:
        config = recipe.steps[f"left_out-{source}"].plain()
        mixture = recipe.steps[config["inputs"]["mixture"]]
        assert (mixture.method, mixture.without, mixture.inputs.base) == ("without", source, full["inputs"]["mixture"])  # type: ignore[attr-defined]
        assert {**config, "inputs": {**config["inputs"], "mixture": full["inputs"]["mixture"]}} == full


def test_proxies_are_enough_and_draw_different_mixtures(recipe: Recipe) -> None:
    names = recipe.families["proxy"]
    assert recipe.inputs("mix_regmix")["proxies"] == names
    assert len(names) >= len(recipe.steps["corpus"].sources) + 2  # type: ignore[attr-defined]
    assert [recipe.steps[f"draw-{n}"].random.index for n in range(len(names))] == list(range(len(names)))  # type: ignore[attr-defined]
    drawn, candidates = recipe.steps["draw-0"].random, recipe.steps["mix_regmix"].regmix.sampling  # type: ignore[attr-defined]
    assert candidates.plain() == {key: value for key, value in drawn.plain().items() if key != "index"}


def test_the_report_shows_every_step(recipe: Recipe) -> None:
    assert set(recipe.parents("report")) == set(recipe.steps) - {"report"}
    assert len(together(derive(recipe), recipe.families)) < len(recipe.steps) / 2


def test_only_the_mixture_that_reads_with_a_model_is_entered_by_all_ranks(recipe: Recipe) -> None:
    mixtures = [step for step in recipe.steps if recipe.stage(step).name == "mixture"]
    assert [step for step in mixtures if recipe.stage(step).entered_by_all(recipe.steps[step])] == ["mix_perplexity"]
    assert recipe.stage("dro").entered_by_all(recipe.steps["dro"])
    assert not recipe.stage("corpus").entered_by_all(recipe.steps["corpus"])
