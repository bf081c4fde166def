"""Mixtures compared at equal tokens, leave-one-out against predicted influence, families in the arc."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from fixture_run import CAPABILITIES, SOURCES, FixtureRun, write_report

from megatron_r1.artifacts.influence import InfluenceTable
from megatron_r1.report.collect import collect
from megatron_r1.report.graph import gathered
from megatron_r1.report.leave_one_out import ALL, JOINT, analyses, foretold, lines, ranks
from megatron_r1.report.settings import comparable
from megatron_r1.report.verdicts import judge

EVEN = {s: 1 / len(SOURCES) for s in SOURCES}


def left_out_run(folder: Path, sign: float = 1.0, influence: bool = True) -> FixtureRun:
    """Trainings whose loss rises without a source in proportion to its mean benefit (sign 1), or falls (sign -1)."""
    run = FixtureRun(folder)
    run.corpus()
    run.probe()
    run.mixture("mix_uniform", "uniform")
    run.train("pretrain1", "mix_uniform")
    run.influence("influence1", "pretrain1")
    if not influence:
        del run.artifacts["influence1"]
    run.mixture("mix_influence", "influence", "influence1" if influence else None)
    run.train("compared-influence", "mix_influence", "pretrain1", start=5.6, end=5.0, gain=0.15, tokens=491_520)
    run.train("compared-uniform", "mix_uniform", "pretrain1", start=5.6, end=5.0, tokens=491_520)
    run.mixture("mix_doremi", "doremi")  # its weights are uniform too, but a plain mixture is preferred as the control
    run.train("compared-doremi", "mix_doremi", "pretrain1", start=5.6, end=5.0, gain=0.05, tokens=491_520)
    table = None if not influence else InfluenceTable.open(run.artifacts["influence1"]).record.joint
    for i, source in enumerate(SOURCES):
        run.mixture(f"without-{source}", "without", without=source, base=EVEN)
        worth = sign * (0.05 * table[source].mean if table else 0.01 * i)
        run.train(f"left_out-{source}", f"without-{source}", "pretrain1", start=5.6, end=5.0, gain=-worth, tokens=491_520)
    return run


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> FixtureRun:
    return left_out_run(tmp_path_factory.mktemp("loo"))


def test_the_prediction_is_the_first_order_change_of_moving_the_share() -> None:
    """Written out: loss falls by sum w rho; without j the others keep their proportions."""
    rng = np.random.default_rng(0)
    w, rho = rng.dirichlet(np.ones(5)), rng.normal(size=5)
    names = list("abcde")
    for j, name in enumerate(names):
        rest = np.where(np.arange(5) == j, 0, w)
        wanted = (w * rho).sum() - (rest / rest.sum() * rho).sum()
        assert foretold(name, dict(zip(names, w)), dict(zip(names, rho))) == pytest.approx(wanted)
    assert foretold("z", dict(zip(names, w)), dict(zip(names, rho))) == 0


def test_truth_and_prediction_agree_in_a_run_made_so(good: FixtureRun) -> None:
    run = collect(good.artifacts.values())
    (analysis,) = analyses(run)
    assert set(analysis.left_out) == set(SOURCES)
    assert analysis.full.step == "compared-uniform"
    assert analysis.capabilities == (*CAPABILITIES, JOINT)
    joint = InfluenceTable.open(good.artifacts["influence1"]).record.joint
    for source in SOURCES:
        assert analysis.truth[source][JOINT] == pytest.approx(0.05 * joint[source].mean, abs=1e-9)
    (prediction,) = analysis.predictions
    found = {rank.capability: rank for rank in prediction.ranks}
    assert found[JOINT].spearman == pytest.approx(1)
    assert found[JOINT].low == pytest.approx(1)
    each = [found[c].spearman for c in CAPABILITIES]
    assert found[ALL].spearman == pytest.approx(np.mean(each))
    assert found[ALL].low < found[ALL].spearman < found[ALL].high
    said = "\n".join(lines(analysis))
    assert "Spearman with the prediction of influence1 (adam)" in said
    assert said.index("x_shuffled") > said.index("stdlib")


def test_verdicts_of_comparison_and_leave_one_out(good: FixtureRun, tmp_path: Path) -> None:
    verdicts = {v.key: v for v in judge(collect(good.artifacts.values()))}
    assert verdicts["leave_one_out"].status == "ok"
    assert verdicts["beats_baselines"].status == "ok"
    assert verdicts["beats_baselines"].detail.index("mix_influence") < verdicts["beats_baselines"].detail.index("mix_doremi")
    reverse = {v.key: v for v in judge(collect(left_out_run(tmp_path / "reverse", sign=-1).artifacts.values()))}
    assert reverse["leave_one_out"].status == "not ok"
    blind = {v.key: v for v in judge(collect(left_out_run(tmp_path / "blind", influence=False).artifacts.values()))}
    assert blind["leave_one_out"].status == "absent"


def test_a_better_baseline_is_named(tmp_path: Path) -> None:
    run = left_out_run(tmp_path)
    run.mixture("mix_regmix", "regmix")
    run.train("compared-regmix", "mix_regmix", "pretrain1", start=5.6, end=5.0, gain=0.4, tokens=491_520)
    verdict = {v.key: v for v in judge(collect(run.artifacts.values()))}["beats_baselines"]
    assert verdict.status == "not ok"
    assert "best first: mix_regmix" in verdict.detail


def test_no_such_trainings_no_such_lines(whole: FixtureRun) -> None:
    run = collect(whole.artifacts.values())
    assert analyses(run) == ()
    assert not {"leave_one_out", "beats_baselines"} & {v.key for v in judge(run)}


@pytest.mark.parametrize("change", [{"checkpoint": None}, {"extra": {"lr": {"peak": 1.0}}}])
def test_a_training_that_differs_otherwise_is_not_in_the_table(tmp_path: Path, change: dict) -> None:
    run = left_out_run(tmp_path)
    settings = {"checkpoint": "pretrain1", "start": 5.6, "end": 5.0, "tokens": 491_520, **change}
    run.train("left_out-champ", "without-champ", **settings)
    (analysis,) = analyses(collect(run.artifacts.values()))
    assert set(analysis.left_out) == set(SOURCES) - {"champ"}


def test_groups_leave_out_proxies(good: FixtureRun) -> None:
    (group,) = comparable(collect(good.artifacts.values()))
    assert sorted(mixture.method for _, mixture in group) == ["doremi", "influence", "uniform"]


def test_ranks_that_are_undefined(tmp_path: Path) -> None:
    flat = {s: {"code": 1.0, JOINT: 1.0} for s in "abc"}
    truth = {s: {"code": float(i), JOINT: float(i)} for i, s in enumerate("abc")}
    assert all((r.spearman, r.low) == (None, None) for r in ranks(truth, flat, ("code",)))


def test_page_and_tables(good: FixtureRun) -> None:
    report = write_report(good)
    page = report.file("report.html").read_text("utf-8")
    for words in ("Leave-one-out: what a source is really worth", "All mixtures at equal tokens", "left_out-* (9)", "without-* (9)", "influence1 (adam)"):
        assert words in page, words
    assert "Training loss of left_out-champ" not in page
    assert "2 training steps (pretrain1, compared-" in page
    assert "Training loss of compared-doremi" in page
    rows = list(csv.DictReader(io.StringIO(report.file("tables/leave_one_out.csv").read_text())))
    assert len(rows) == len(SOURCES) * (len(CAPABILITIES) + 1)
    assert {row["influence"] for row in rows} == {"influence1"}
    agreement = list(csv.DictReader(io.StringIO(report.file("tables/leave_one_out_agreement.csv").read_text())))
    assert {row["capability"] for row in agreement} == {*CAPABILITIES, JOINT, ALL}
    compared = list(csv.DictReader(io.StringIO(report.file("tables/mixtures_compared.csv").read_text())))
    assert {row["mixture"] for row in compared} == {"mix_influence", "mix_uniform", "mix_doremi"}


def test_a_family_is_one_box(good: FixtureRun) -> None:
    steps = gathered(collect(good.artifacts.values()).steps)
    names = [step.name for step in steps]
    assert len(names) == len(set(names)) == 10
    box = next(step for step in steps if step.name == "left_out-* (9)")
    assert {name for _, name, _ in box.parents} == {"corpus", "without-* (9)", "pretrain1", "probe"}
    assert box.seconds >= 0
