"""Every verdict can be yes, no and untested, and for the stated reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fixture_run import FixtureRun, whole_run

from megatron_r1.report.collect import collect
from megatron_r1.report.records import Run
from megatron_r1.report.verdicts import Verdict, equal_budget_pairs, judge, shuffled_sources


def verdicts(run: FixtureRun) -> dict[str, Verdict]:
    return {v.key: v for v in judge(collect(run.artifacts.values()))}


@pytest.fixture(scope="module")
def good(whole: FixtureRun) -> dict[str, Verdict]:
    return verdicts(whole)


def test_all_hold_in_the_good_run(good: dict[str, Verdict]) -> None:
    assert {key: v.status for key, v in good.items()} == dict.fromkeys(good, "ok")


@pytest.mark.parametrize(
    ("bend", "key", "status", "said"),
    [
        ({"shuffled": 0.4}, "shuffled_benefit", "not ok", "code (influence1)"),
        ({"again": 0.4}, "measured_again", "partly", "word frequencies"),
        ({"shuffled": 1.6}, "ahead_influence", "not ok", "stdlib on code (influence1)"),
        ({"noise": 0.01}, "shuffled_weight", "partly", "mix1 ("),
        ({"noise": 5.0}, "ahead_weight", "partly", "champ (mix1)"),
        ({"gain": -0.2}, "beats_uniform", "not ok", "code 5.2"),
        ({"sft": 0.06}, "sft_above_base", "not ok", "11.0 % against 10.0 % of 600 questions"),
        ({"control": 0.5}, "control", "partly", "allow: sft, country_mcq_control (50.0 %)."),
        ({"passed": False}, "parity", "not ok", "failed for export"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_each_claim_can_fail(tmp_path: Path, bend: dict[str, Any], key: str, status: str, said: str) -> None:
    verdict = verdicts(whole_run(tmp_path, **bend))[key]
    assert verdict.status == status
    assert said in verdict.detail


def test_an_empty_run_proves_nothing() -> None:
    assert {v.status for v in judge(Run(steps=()))} == {"absent"}


def test_a_pair_with_another_difference_is_no_evidence(tmp_path: Path) -> None:
    run = whole_run(tmp_path)
    run.train("pretrain2_uniform", "mix_uniform", "pretrain1", start=5.6, end=5.0, tokens=491_520, extra={"lr": {"peak": 1.0}})
    assert verdicts(run)["beats_uniform"].status == "absent"


def test_pair_needs_the_same_start(whole: FixtureRun) -> None:
    pairs = equal_budget_pairs(collect(whole.artifacts.values()))
    assert [(p.tested.step, p.control.step) for p in pairs] == [("pretrain2", "pretrain2_uniform")]
    assert pairs[0].capabilities == ("code", "knowledge", "math")
    assert pairs[0].equal_tokens


def test_uniform_without_a_mixture_step_counts_as_control(tmp_path: Path) -> None:
    run = whole_run(tmp_path)
    run.train("pretrain2_uniform", None, "pretrain1", start=5.6, end=5.0, tokens=491_520, extra={"sources": "uniform"})
    assert verdicts(run)["beats_uniform"].status == "ok"


def test_shuffled_source_by_name_or_by_setting(whole: FixtureRun) -> None:
    run = collect(whole.artifacts.values())
    assert shuffled_sources(run) == ("x_shuffled",)
    assert shuffled_sources(run, "x_minjs") == ("x_minjs",)


def test_unequal_tokens_are_no_evidence(tmp_path: Path) -> None:
    run = whole_run(tmp_path)
    run.folder = tmp_path / "shorter"  # the fixture's settings do not hold the tokens, so the first one has the same name
    run.train("pretrain2_uniform", "mix_uniform", "pretrain1", start=5.6, end=5.0, tokens=245_760)
    assert equal_budget_pairs(collect(run.artifacts.values()))[0].differences == ()
    assert verdicts(run)["beats_uniform"].status == "absent"


def test_weight_above_the_floor_in_every_mixture_is_a_plain_no(tmp_path: Path) -> None:
    run = whole_run(tmp_path, noise=0.01)
    del run.artifacts["mix2"]
    assert verdicts(run)["shuffled_weight"].status == "not ok"


def test_without_a_comparison_item_by_item_means_are_compared(tmp_path: Path) -> None:
    run = whole_run(tmp_path, sft=0.06)
    run.folder = tmp_path / "no_baseline"
    run.evaluate("eval_sft", "sft", 0.06)
    verdict = verdicts(run)["sft_above_base"]
    assert verdict.status == "not ok"
    assert "as a mean over 3 tasks" in verdict.detail
    run.folder = tmp_path / "better"
    run.evaluate("eval_sft", "sft", 0.5)
    assert verdicts(run)["sft_above_base"].status == "ok"


def test_rewards_are_judged_where_something_was_trained_on_them(tmp_path: Path, good: dict[str, Verdict]) -> None:
    assert "rewards_above_start" not in good
    run = whole_run(tmp_path)
    run.train("grpo_final", None, "sft", objective="grpo")
    assert verdicts(run)["rewards_above_start"].status == "absent"
    run.evaluate("eval_grpo_final", "grpo_final", 0.4, baseline="eval_sft")
    verdict = verdicts(run)["rewards_above_start"]
    assert verdict.status == "not ok"
    assert "grpo_final: 45.0 % against 55.0 %" in verdict.detail


def test_one_control_just_outside_its_own_interval_is_expected_among_several(tmp_path: Path) -> None:
    verdict = verdicts(whole_run(tmp_path, control=0.33))["control"]
    assert verdict.status == "ok"
    assert "in 2 of 3 measurements" in verdict.detail
