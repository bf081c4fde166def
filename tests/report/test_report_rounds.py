"""Rounds of co-evolution: which measurements follow which, histograms on one set of bins, what was left out."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from fixture_run import CAPABILITIES, DOCUMENTS, SOURCES, FixtureRun, write_report

from megatron_r1.artifacts.base import Artifact
from megatron_r1.artifacts.influence import InfluenceTable
from megatron_r1.report.collect import collect
from megatron_r1.report.figures import round_histograms
from megatron_r1.report.records import Run
from megatron_r1.report.rounds import BINS, JOINT, chains, histogram
from megatron_r1.report.verdicts import control_pairs


def arms(folder: Path, preconditioner: str = "adam", tokens: int = 983_040) -> FixtureRun:
    """One first round, then two arms: documents kept by the rule, and as many at random. The second has a third round, which is
    measured after another training on a mixture that has nothing to do with influence."""
    run = FixtureRun(folder)
    run.corpus()
    run.probe()
    run.mixture("mix_uniform", "uniform")
    run.train("start", "mix_uniform")
    run.influence("influence1", "start")
    run.mixture("mix_kept", "influence", "influence1", kept=run.kept(False), decision=run.decision())
    run.mixture("mix_random", "influence", "influence1", kept=run.kept(True), decision=run.decision(None))
    run.train("on_kept", "mix_kept", "start")
    run.train("on_random", "mix_random", "start", tokens=tokens)
    run.influence("influence2_kept", "on_kept", strength=0.25, preconditioner=preconditioner)
    run.influence("influence2_random", "on_random", strength=0.5)
    run.mixture("mix2_random", "influence", "influence2_random", decision=run.decision(True))
    run.train("more", "mix2_random", "on_random")
    run.train("more_uniform", "mix_uniform", "more")
    run.influence("influence3_random", "more_uniform", strength=0.1)
    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> FixtureRun:
    return arms(tmp_path_factory.mktemp("rounds"))


@pytest.fixture(scope="module")
def run(made: FixtureRun) -> Run:
    return collect(made.artifacts.values())


@pytest.fixture(scope="module")
def report(made: FixtureRun) -> Artifact:
    return write_report(made)


def test_a_round_follows_the_one_whose_mixture_its_model_was_trained_on(run: Run) -> None:
    found = [[(r.name, [m.step for m in r.mixtures]) for r in chain.rounds] for chain in chains(run)]
    assert found == [
        [("influence1", ["mix_kept"]), ("influence2_kept", [])],
        [("influence1", ["mix_random"]), ("influence2_random", ["mix2_random"]), ("influence3_random", [])],
    ]


def test_a_run_of_one_measurement_has_a_chain_of_one_round_with_all_its_mixtures(made: FixtureRun) -> None:
    names = ["corpus", "mix_uniform", "start", "influence1", "mix_kept", "mix_random"]
    (chain,) = chains(collect(made.artifacts[name] for name in names))
    (only,) = chain.rounds
    assert [m.step for m in only.mixtures] == ["mix_kept", "mix_random"]
    assert only.filtered is not None
    assert only.filtered.step == "mix_kept"


def test_values_are_scores_over_the_size_of_the_first_rounds(made: FixtureRun, run: Run) -> None:
    chain = chains(run)[0]

    def by_hand(step: str) -> np.ndarray:
        """Benefit per token in nats, [N, C]: alpha 1/3 and 2/3 for two checkpoints whose scales are equal."""
        table = InfluenceTable.open(made.artifacts[step])
        raw = np.concatenate([table.scores(s).raw / table.scores(s).n_tokens[:, None, None] for s in SOURCES])
        return raw @ np.array([1 / 3, 2 / 3])

    first = by_hand("influence1")
    size = np.sqrt((first**2).mean(axis=0))
    for r in chain.rounds:
        values, wanted = chain.values(r), by_hand(r.name) / size
        for c, capability in enumerate(CAPABILITIES):
            np.testing.assert_allclose(values[capability], wanted[:, c], rtol=1e-9)
        own = r.benefit(next(iter(SOURCES)))
        assert (np.sign(values[JOINT][: len(own)]) == np.sign(own.mean(axis=1))).all()
    # The second table was made with a quarter of the spread around a quarter of the means.
    assert chain.shrinking(chain.rounds[0]) == pytest.approx(dict.fromkeys((*CAPABILITIES, JOINT), 1.0))
    assert all(0.15 < ratio < 0.35 for ratio in chain.shrinking(chain.rounds[1]).values())


def test_histograms_hold_every_document_once_on_the_same_bins(run: Run) -> None:
    for chain in chains(run):
        found = histogram(chain)
        assert list(found.edges) == [*CAPABILITIES, JOINT]
        for name, edges in found.edges.items():
            assert edges[BINS // 2] == pytest.approx(0.0, abs=1e-12)
            assert (found.counts[name].sum(axis=1) == len(SOURCES) * DOCUMENTS).all()
            above = found.counts[name][:, BINS // 2 :].sum(axis=1) / (len(SOURCES) * DOCUMENTS)
            np.testing.assert_allclose(above, [r.positive()[name] for r in chain.rounds])
            assert (found.dropped[name] <= found.counts[name]).all()
        # Narrower scores stand in fewer bins.
        filled = (found.counts["code"] > 0).sum(axis=1)
        assert filled[1] < filled[0]


def test_half_of_the_scored_documents_were_left_out_of_the_first_mixture_only(run: Run) -> None:
    chain = chains(run)[0]
    found = histogram(chain)
    assert found.dropped[JOINT].sum(axis=1).tolist() == [len(SOURCES) * DOCUMENTS / 2, 0]
    assert chain.rounds[0].dropped("champ").tolist() == [False] * (DOCUMENTS // 2) + [True] * (DOCUMENTS // 2)


def test_arms_of_several_rounds_are_compared_with_one_another(made: FixtureRun, tmp_path: Path) -> None:
    """The last trainings start from different models, whose own trainings differ in the mixture only; unless a budget differs."""
    found = {}
    for tokens in (983_040, 491_520):
        run = arms(tmp_path / str(tokens), tokens=tokens)
        run.mixture("mix2_kept", "influence", "influence2_kept", kept=run.kept(False))
        run.mixture("mix2_random_kept", "influence", "influence2_random", kept=run.kept(True))
        run.train("last_kept", "mix2_kept", "on_kept", gain=0.1)
        run.train("last_random", "mix2_random_kept", "on_random")
        found[tokens] = [(p.tested.step, p.control.step) for p in control_pairs(collect(run.artifacts.values()))]
    assert found == {983_040: [("on_kept", "on_random"), ("last_kept", "last_random")], 491_520: [("on_kept", "on_random")]}  # the report then says that tokens are unequal


def test_specialised_models_together_are_one_round(tmp_path: Path) -> None:
    run = FixtureRun(tmp_path)
    run.corpus()
    run.probe()
    run.mixture("mix_uniform", "uniform")
    for capability in CAPABILITIES:
        run.train(f"model_{capability}", "mix_uniform")
        run.influence(f"measured_{capability}", f"model_{capability}", capabilities=(capability,))
    run.mixture("mix", "influence", [f"measured_{c}" for c in CAPABILITIES])
    (chain,) = chains(collect(run.artifacts.values()))
    assert chain.capabilities == CAPABILITIES
    assert chain.values(chain.rounds[0])[JOINT].shape == (len(SOURCES) * DOCUMENTS,)
    figure = round_histograms(chain)
    assert "measured_code + measured_knowledge + measured_math" in figure.alt


def test_the_page_and_the_tables_show_the_rounds(report: Artifact, run: Run) -> None:
    page = report.file("report.html").read_text("utf-8").replace("\N{NO-BREAK SPACE}", " ")
    assert "influence1 → influence2_kept" in page
    assert "216 of 432 by the rule “confident”, and all that were not scored; 45.0 k tokens are left" in page
    assert "at random, as many tokens as would be 216 of 432 by the rule “confident”" in page
    assert "do not compare their widths" not in page
    assert {"rounds_influence2_kept.png", "rounds_influence3_random.png"} <= {p.name for p in (report.path / "figures").iterdir()}

    def rows(name: str) -> list[dict[str, str]]:
        return list(csv.DictReader(report.file(f"tables/{name}.csv").read_text().splitlines()))

    counts = rows("round_histograms")
    assert len(counts) == 5 * (len(CAPABILITIES) + 1) * BINS
    assert sum(int(r["documents"]) for r in counts) == 5 * (len(CAPABILITIES) + 1) * len(SOURCES) * DOCUMENTS
    assert {(r["influence"], r["capability"]) for r in rows("rounds")} == {(r.name, c) for chain in chains(run) for r in chain.rounds for c in (*CAPABILITIES, JOINT)}
    left_out = {(r["chain"], r["round"]): int(r["left_out"]) for r in rows("round_sources") if r["source"] == "champ"}
    assert left_out[("influence2_kept", "1")] == left_out[("influence3_random", "1")] == DOCUMENTS // 2


def test_rounds_measured_in_different_ways_are_not_to_be_compared(tmp_path: Path) -> None:
    page = write_report(arms(tmp_path, preconditioner="none")).file("report.html").read_text("utf-8")
    assert page.count("do not compare their widths") == 1


def test_without_influence_there_is_no_section(tmp_path: Path) -> None:
    run = FixtureRun(tmp_path)
    run.corpus()
    page = write_report(run).file("report.html").read_text("utf-8")
    assert 'id="rounds"' not in page
    assert 'href="#rounds"' not in page
