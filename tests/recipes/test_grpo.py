"""Recipes that train on rewards: the published ablation's numbers, and that the quickstart itself is untouched."""

from __future__ import annotations

import math
from typing import Any

import pytest

from megatron_r1.pipeline.derive import derive
from megatron_r1.pipeline.recipe import load_recipe


def test_the_published_ablation(tmp_path: Any) -> None:
    """Section 7.4: 100 steps of fine-tuning for the format, then 100 steps of 32 questions x 8 answers at 3e-6 without a divergence term."""
    path = tmp_path / "ablation.yaml"
    path.write_text("extends: [mobilellm_r1_950m, parts/mobilellm_r1_grpo.yaml]\nname: ablation\n")
    recipe, base = load_recipe(str(path)), load_recipe("mobilellm_r1_950m")
    steps: dict[str, Any] = dict(recipe.steps)
    assert {name: steps[name] for name in base.steps} == dict(base.steps)
    assert str(steps["sft_format"].budget) == "100 steps"
    for name, start in (("grpo_base", "sft_format"), ("grpo_final", "sft_reasoning")):
        config = steps[name]
        assert (config.objective, str(config.budget), config.lr.peak, config.inputs.checkpoint) == ("grpo", "100 steps", 3e-6, start)
        assert (config.sequences_per_step // config.grpo.generations, config.grpo.generations, config.grpo.kl_weight) == (32, 8, 0.0)
    whole = derive(load_recipe(str(path), ["steps.grpo_base.budget=1 epochs"]))
    # Every question of the 99.9 % that are not held out, 32 a step.
    assert any(f"at most {math.ceil(round(72441 * 0.999) / 32)}" in note for plan in whole if plan.step == "grpo_base" for note in plan.notes)
    assert [steps[name].grpo.max_new_tokens for name in ("grpo_base", "grpo_final")] == [1024, 4096]
    assert all(steps["sft_format"].plain()[key] == steps["sft_general"].plain()[key] for key in ("lr", "optimizer", "global_batch", "seq_length", "sft", "layout", "precision"))


def test_the_quickstart_is_the_same_with_steps_after_it() -> None:
    recipe, base = load_recipe("quickstart_grpo"), load_recipe("quickstart")
    assert {name: recipe.steps[name] for name in base.steps if name != "report"} == {name: config for name, config in base.steps.items() if name != "report"}
    steps: dict[str, Any] = dict(recipe.steps)
    differing = {key for key in (*steps["grpo_base"].plain(),) if steps["grpo_base"].plain()[key] != steps["grpo_final"].plain()[key]}
    assert differing == {"inputs"}
    assert {steps[name].inputs.checkpoint for name in ("grpo_base", "grpo_final")} == {"sft_format", "sft"}
    answers = {name: steps[name].tasks.generated for name in ("eval_sft", "eval_format", "eval_grpo_base", "eval_grpo_final")}
    assert len({repr(settings) for settings in answers.values()}) == 1
    plans = {plan.step: plan for plan in derive(recipe)}
    assert "32 questions x 8 answers a step" in plans["grpo_base"].does
    assert any("at most" in note for note in plans["grpo_base"].notes)


@pytest.mark.parametrize("name", ["quickstart", "quickstart_ci", "rehearsal_140m", "mobilellm_r1_950m"])
def test_off_by_default(name: str) -> None:
    assert all(getattr(config, "objective", "") != "grpo" for config in load_recipe(name).steps.values())
