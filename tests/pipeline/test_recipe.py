"""Recipes: graph, seeds, errors, explanation."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_r1.pipeline.recipe import explain, load_recipe
from megatron_r1.utils.errors import ConfigError

TEXT = """\
name: toy
description: two sources joined
seed: 7
steps:
  joined:
    stage: join
    inputs: {shards: first, others: [second]}
  first:
    stage: make
    text: one
  second: {stage: make, seed: 9}
"""


@pytest.fixture
def toy(tmp_path: Path, fake_stages) -> Path:
    path = tmp_path / "toy.yaml"
    path.write_text(TEXT)
    return path


def test_steps_are_ordered_by_their_inputs_and_seeded(toy: Path) -> None:
    recipe = load_recipe(toy)
    assert list(recipe.steps) == ["first", "second", "joined"]
    assert recipe.steps["first"].seed == 7
    assert recipe.steps["second"].seed == 9
    assert recipe.parents("joined") == ["first", "second"]


@pytest.mark.parametrize(
    ("override", "expected", "fix"),
    [
        ("steps.joined.inputs.shards=frist", "a step of this recipe", "did you mean 'first'"),
        ("steps.joined.inputs.shards=joined", "makes a shards artifact", "first, second"),
        ("steps.first.txet=x", "known keys only", "did you mean 'text'"),
        ("steps.first.stage=mke", "a known stage", "did you mean 'make'"),
        ("stepz.first.text=x", "known keys only", "did you mean 'steps'"),
        ("seed=many", "a whole number", "seed: 1"),
        ("steps.new.text=x", "`stage:`", "stage: one of"),
    ],
)
def test_errors_say_what_was_meant(toy: Path, override: str, expected: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(toy, [override])
    assert expected in caught.value.expected
    assert fix in caught.value.fix


def test_a_circle_is_refused(toy: Path) -> None:
    toy.write_text(TEXT + "  third: {stage: join, inputs: {shards: first, others: [fourth]}}\n  fourth: {stage: join, inputs: {shards: first, others: [third]}}\n")
    with pytest.raises(ConfigError, match="circle"):
        load_recipe(toy)


def test_unknown_recipe_lists_the_shipped_ones() -> None:
    with pytest.raises(ConfigError, match="quickstart"):
        load_recipe("quikstart")


def test_explain(toy: Path) -> None:
    recipe = load_recipe(toy, ["steps.second.text=two"])
    assert explain(recipe, "steps.first.text") == {
        "key": "steps.first.text", "meaning": "what to write", "type": "str", "value": "'one'", "origin": "toy.yaml:10",
    }  # fmt: skip
    assert "--set steps.second.text=two" in explain(recipe, "steps.second.text")["origin"]
    assert explain(recipe, "steps.first.seed")["origin"].startswith("the default")
    assert explain(recipe, "seed")["value"] == "7"
    with pytest.raises(ConfigError, match="did you mean 'text'"):
        explain(recipe, "steps.first.texd")
