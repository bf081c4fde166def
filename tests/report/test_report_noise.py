"""What the page says about noise: reliability with its advice, what intervals cover, both stop rules, filter and control."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from fixture_run import SOURCES, FixtureRun, write_report

from megatron_r1.artifacts.base import Artifact
from megatron_r1.report.collect import collect
from megatron_r1.report.page import reliability_rows
from megatron_r1.report.records import Reliable
from megatron_r1.report.verdicts import control_pairs, judge


def made(folder: Path, **settings: object) -> FixtureRun:
    """A filtered mixture and its random control, a training on each."""
    run = FixtureRun(folder)
    run.corpus()
    run.probe()
    run.mixture("mix_uniform", "uniform")
    run.train("pretrain1", "mix_uniform")
    run.influence("influence1", "pretrain1")
    rho = {s: 0.1 * i for i, s in enumerate(SOURCES)}
    common = {
        "rho": rho, "rho_intervals": {s: (r - 0.05, r + 0.0512) for s, r in rho.items()}, "shrunk": {s: 0.9 * r for s, r in rho.items()},
        "shrinkage": dict.fromkeys(SOURCES, 0.37), "effective_sources": 6.54, "divergence": 0.123, "decision": run.decision(**settings),
        "notes": ["something to know"],
    }  # fmt: skip
    run.mixture("mix_kept", "influence", "influence1", kept=run.kept(False), **common)
    run.mixture("mix_random", "influence", "influence1", kept=run.kept(True), **common)
    run.train("on_kept", "mix_kept", "pretrain1", start=5.6, end=5.0, gain=0.2)
    run.train("on_random", "mix_random", "pretrain1", start=5.6, end=5.0)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FixtureRun:
    return made(tmp_path_factory.mktemp("noise"))


@pytest.fixture(scope="module")
def report(run: FixtureRun) -> Artifact:
    return write_report(run)


def text_of(report: Artifact) -> str:
    return report.file("report.html").read_text("utf-8").replace("\N{NO-BREAK SPACE}", " ").replace("\N{MINUS SIGN}", "-")


def test_the_page_says_what_intervals_cover_and_how_reliable_rankings_are(report: Artifact) -> None:
    page = text_of(report)
    assert "The interval covers the choice of scored documents, nothing else." in page
    assert page.count("Both intervals cover the choice of scored documents and probe folds, nothing else.") == 2
    assert "48 probe windows per capability" in page
    assert "48 scored documents per source" in page
    assert "about 216" in page
    assert ">enough<" in page


def test_the_page_shows_both_rules_and_what_would_follow(report: Artifact) -> None:
    page = text_of(report)
    assert "62.0 % of scored documents have benefit above 0 (stop below 5.0 %)" in page
    assert "shown to help (Holm over 9 sources): champ, stdlib, smallest p 0.0010" in page
    assert "+0.0307 nats over this phase" in page or "+0.0308 nats over this phase" in page
    assert "The paper&#39;s rule says go on; the statistical rule says something." in page
    assert "Something to know." in page
    assert "drawn to the mean" in page
    assert "37 %" in page


@pytest.mark.parametrize(("stop", "word"), [(True, "stop"), (None, "not known")])
def test_all_answers_of_the_statistical_rule_have_words(tmp_path: Path, stop: bool | None, word: str) -> None:
    page = text_of(write_report(made(tmp_path, stop=stop), ["influence1", "mix_kept"]))
    assert f'<th scope="row">statistical</th><td>{word}</td>' in page


def test_tables_hold_the_numbers(report: Artifact) -> None:
    def rows(name: str) -> list[dict[str, str]]:
        return list(csv.DictReader(report.file(f"tables/{name}.csv").read_text().splitlines()))

    assert {r["interval_covers"] for r in rows("influence")} == {"scored documents"}
    assert {r["interval_covers"] for r in rows("mixtures") if r["step"] == "mix_kept"} == {"scored documents + probe folds"}
    found = [r for r in rows("reliability") if (r["ranking_of"], r["halves_of"], r["capability"]) == ("documents", "probe", "joint")]
    assert [(float(r["reliability"]), r["needed_for_0.9"]) for r in found] == [(0.667, "216")]
    (decision, other) = rows("decisions")
    assert (decision["helping"], decision["gain"], decision["statistical_stop"]) == ("champ stdlib", "0.03075", "False")
    assert other["step"] == "mix_random"
    assert {(r["control"], r["tokens"]) for r in rows("kept_documents")} == {("False", "5000"), ("True", "5001")}


def test_kept_documents_are_judged_against_as_many_at_random(run: FixtureRun, tmp_path: Path) -> None:
    found = collect(run.artifacts.values())
    assert [(p.tested.step, p.control.step) for p in control_pairs(found)] == [("on_kept", "on_random")]
    verdict = next(v for v in judge(found) if v.key == "beats_control")
    assert verdict.status == "ok"
    alone = collect(a for name, a in run.artifacts.items() if name != "on_random")
    missing = next(v for v in judge(alone) if v.key == "beats_control")
    assert missing.status == "absent"
    assert "no training on a random part" in missing.detail


def test_without_a_filter_the_verdict_is_not_there(whole: FixtureRun) -> None:
    assert "beats_control" not in {v.key for v in judge(collect(whole.artifacts.values()))}


def test_the_page_says_which_parameters_carry_the_scores(report: Artifact) -> None:
    text = text_of(report)
    assert "embedding 107 %, norm -7 %" in text
    assert "scaled as the trainer" in text


def test_reliability_in_words() -> None:
    rows = reliability_rows([Reliable("sources", "documents", "code", None, 5, None), Reliable("sources", "documents", "joint", None, 5, None),
                             Reliable("documents", "probe", "joint", -0.1, 48, None)])  # fmt: skip
    assert [(row["of"], row["needs"]) for row in rows] == [("documents", "cannot be foretold")]
