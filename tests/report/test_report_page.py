"""The page: self-contained, complete, honest about what is missing, the same bytes every time."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import ClassVar

import pytest
from fixture_run import SOURCES, FixtureRun, whole_run, write_report

from megatron_r1.artifacts.base import Artifact, open_artifact, open_workspace
from megatron_r1.report.collect import collect
from megatron_r1.report.config import ReportConfig, ReportInputs, describe
from megatron_r1.report.records import origin_parts
from megatron_r1.utils.errors import ArtifactError

NBSP = "\N{NO-BREAK SPACE}"


class Outline(HTMLParser):
    """Ids, links inside the page, anything that would load something, and whether every element is closed."""

    VOID: ClassVar = {"meta", "link", "br", "i/", "path/", "use/"}

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.loads: list[str] = []
        self.open: list[str] = []
        self.text = ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes(tag, attrs)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element at {self.getpos()}"
        if tag in ("td", "th", "dt"):
            self.text += " "

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data

    def attributes(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            value = value or ""
            if name == "id":
                self.ids.append(value)
            elif name in ("href", "xlink:href") and value.startswith("#"):
                self.targets.append(value[1:])
            elif name in ("src", "href", "xlink:href", "srcset", "data", "poster", "action") and value != "data:,":
                self.loads.append(f"{tag} {name}={value[:60]}")


@pytest.fixture(scope="module")
def outline(page: str) -> Outline:
    found = Outline()
    found.feed(page)
    return found


def test_page_loads_nothing_from_anywhere(page: str, outline: Outline) -> None:
    assert outline.loads == []
    assert "<script" not in page
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)", page)


def test_page_is_well_formed_and_its_links_lead_somewhere(outline: Outline) -> None:
    assert outline.open == []
    assert len(outline.ids) == len(set(outline.ids))
    assert set(outline.targets) <= set(outline.ids)


def test_settings_and_artifact_texts_are_escaped(page: str) -> None:
    assert "A &lt;b&gt;bold&lt;/b&gt; title" in page
    assert "<b>bold" not in page


def test_every_step_fingerprint_source_and_machine_is_named(outline: Outline, whole: FixtureRun) -> None:
    for name, artifact in whole.artifacts.items():
        assert name in outline.text
        assert artifact.fingerprint[:12] in outline.text
        assert artifact.manifest.machine["cpu"] in outline.text
        assert artifact.manifest.versions["torch"] in outline.text
    for source in SOURCES:
        assert re.search(f"{source.replace('_', '-')}-dataset 1\\.\\d\\.0 \\(Apache-2.0\\)", outline.text)


def test_distractors_are_labelled_and_others_are_not(page: str) -> None:
    rows = re.findall(r'<th scope="row">(.*?)</th>', page)
    marked = {re.sub(r"<.*", "", row) for row in rows if ">distractor<" in row}
    assert marked == {"x_minjs", "x_shuffled"}


def test_probe_sieves_are_a_funnel_and_the_judge_is_measured(outline: Outline, report: Artifact) -> None:
    text = re.sub(r"\s+", " ", outline.text)
    assert "champ 20 12 6* " in text
    assert "champ, reasoning: too few of champ" in text
    assert "reasoning: two kinds 0.48 0.37 to 0.59 54 and 54 no better than chance" in text
    assert "the published classifier was not used; a small one was trained in this run" in text
    assert "A remark on the judge." in text
    rows = list(csv.DictReader(report.file("tables/probe_sieves.csv").read_text().splitlines()))
    assert {(r["rule"], r["threshold"]) for r in rows} == {("length", ""), ("reasoning", "best 6: score >= 0.5")}


def test_heat_map_shows_stored_means_with_their_intervals(outline: Outline, whole: FixtureRun) -> None:
    text = re.sub(r"\s+", " ", outline.text.replace("\N{MINUS SIGN}", "-"))
    for step in ("influence1", "influence2"):
        record = whole.artifacts[step].json("influence.json")
        for row in record["sources"].values():
            for cell in row.values():
                low, high = cell["interval"]
                mean = re.sub(r"[+-](0\.00)$", r"\1", f"{cell['mean']:+.2f}")
                assert f"{mean}{low:+.2f} to {high:+.2f}" in text


def test_nothing_is_shown_as_absent_in_a_whole_run(outline: Outline) -> None:
    assert "Absent:" not in outline.text
    assert "not tested –" not in outline.text


def test_figures_and_tables_are_written(report: Artifact) -> None:
    files = report.manifest.files
    for name in ("influence_influence1", "influence_influence2", "mixture_mix1", "mixture_mix2", "rankme", "validity_influence1", "evaluation_answers", "evaluation_text", "evaluation_solutions", "loss_sft", "probe_pretrain2_code"):
        data = report.file(f"figures/{name}.png").read_bytes()
        assert data.startswith(b"\x89PNG")
    for name in ("verdicts", "corpora", "probe_sieves", "influence", "validity", "mixtures", "probe_loss", "training", "training_scores", "evaluation", "artifacts"):
        rows = list(csv.DictReader(report.file(f"tables/{name}.csv").read_text().splitlines()))
        assert rows, name
    assert "report.html" in files


def test_tables_hold_unrounded_values(report: Artifact, whole: FixtureRun) -> None:
    rows = list(csv.DictReader(report.file("tables/influence.csv").read_text().splitlines()))
    record = whole.artifacts["influence1"].json("influence.json")
    found = {(r["source"], r["capability"]): float(r["mean"]) for r in rows if r["step"] == "influence1"}
    assert found["champ", "math"] == record["sources"]["champ"]["math"]["mean"]
    assert found["champ", "joint"] == record["joint"]["champ"]["mean"]


def test_scores_made_while_training(report: Artifact, outline: Outline) -> None:
    assert "Documents scored while training: pretrain2" in outline.text
    assert "every 20 steps (rank 16, preconditioner adam)" in outline.text
    assert "that the rank left out: code 21.6 %, knowledge 1.8 %, math 10.0 %." in outline.text.replace("\xa0", " ").replace("\u2009", " ")
    assert "2 documents with a score that is not a number are left out" in outline.text
    assert "-21± 1.2" in outline.text
    rows = list(csv.DictReader(report.file("tables/training_scores.csv").read_text().splitlines()))
    (row,) = (r for r in rows if (r["source"], r["capability"]) == ("codeio", "math"))
    assert (row["training_step"], float(row["mean_per_token"]), row["documents"]) == ("pretrain2", -8.5, "121")


def test_summary_of_the_manifest_is_the_headline(report: Artifact) -> None:
    headline = report.manifest.summary["headline"]
    assert [row["verdict"] for row in headline] == ["yes"] * 9
    assert all(row["question"] and row["figure"] for row in headline)


def test_same_artifacts_give_the_same_bytes(whole: FixtureRun, report: Artifact, tmp_path: Path) -> None:
    config = ReportConfig.model_validate(report.manifest.config)
    inputs = {"artifacts": [whole.artifacts[name] for name in config.inputs.artifacts]}
    from megatron_r1.report.run import run

    again = run(config, inputs, open_workspace(tmp_path, "report", "report", config, inputs))
    assert {k: v.sha256 for k, v in again.manifest.files.items()} == {k: v.sha256 for k, v in report.manifest.files.items()}


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        ([], ["the corpora", "the influence heat map", "an influence mixture", "the comparison of two mixtures", "the training curves", "evaluations", "the parity proof"]),
        (["corpus", "mix_uniform", "pretrain1"], ["the influence heat map", "an influence mixture", "evaluations", "the parity proof"]),
        (["eval_sft", "export"], ["the corpora", "the training curves"]),
    ],
    ids=["nothing", "no-influence", "results-only"],
)
def test_missing_parts_are_named_instead_of_failing(whole: FixtureRun, kept: list[str], expected: list[str]) -> None:
    text = write_report(whole, kept).file("report.html").read_text()
    for part in expected:
        assert f"Absent: {part}" in text
    assert "– not tested" in text


def test_influence_without_corpus_or_probe_still_shows_its_map(whole: FixtureRun) -> None:
    text = write_report(whole, ["influence1"]).file("report.html").read_text()
    assert "x_shuffled" in text
    assert ">distractor<" not in text  # the label stands in the corpus artifact, which is not among the inputs


def test_a_format_this_release_does_not_know_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    run = FixtureRun(tmp_path)
    work = run.open("eval_old", "evaluation", {"stage": "evaluate"})
    (work.path / "evaluation.json").write_text(json.dumps({"results": [{"task": "gcd"}]}))
    run.seal(work)
    with pytest.raises(ArtifactError) as caught:
        collect(run.artifacts.values())
    assert "evaluation artifact in the format of this release" in caught.value.expected
    assert "KeyError: 'group'" in caught.value.found
    assert "make the step 'eval_old' again" in caught.value.fix


def test_report_that_failed_leaves_no_artifact(tmp_path: Path) -> None:
    run = FixtureRun(tmp_path)
    work = run.open("export", "export", {"stage": "export"})
    run.seal(work)  # no parity.json
    with pytest.raises(ArtifactError, match=r"parity\.json"):
        write_report(run)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("report-") and not p.name.endswith(".partial")]


def test_description_counts_steps() -> None:
    config = ReportConfig(inputs=ReportInputs(artifacts=["corpus"]))
    assert describe(config) == "draw report.html, figures and tables from 1 step"


def test_result_is_an_artifact_that_verifies(report: Artifact) -> None:
    assert open_artifact(report.path, "report", verify="full").fingerprint == report.fingerprint


def test_two_steps_with_equal_settings_are_both_shown(tmp_path: Path) -> None:
    run = FixtureRun(tmp_path)
    run.corpus()
    run.mixture("first", "uniform")
    run.mixture("second", "uniform")
    assert run.artifacts["first"].fingerprint == run.artifacts["second"].fingerprint
    assert {step.name for step in collect(run.artifacts.values()).steps} == {"corpus", "first", "second"}


def test_unequal_tokens_are_called_out(tmp_path: Path) -> None:
    run = whole_run(tmp_path)
    run.train("pretrain2_uniform", "mix_uniform", "pretrain1", tokens=245_760, extra={"budget": "short"})
    text = write_report(run).file("report.html").read_text()
    assert "NOT equal" in text
    assert "differ besides the mixture: budget" in text


def test_what_could_not_be_had_is_said(outline: Outline) -> None:
    text = re.sub(r"\s+", " ", outline.text)
    assert "Missing corpora (not replaced by anything): science: package scipy-docs not found." in text
    assert "humaneval_extra, not measured on sft" in text
    assert "1 bad input put into quarantine. Control: 2 groups kept out" in text


def test_paired_changes_are_read_by_their_interval_and_direction(outline: Outline) -> None:
    text = re.sub(r"\s+", " ", outline.text.replace("\N{MINUS SIGN}", "-"))
    assert "sft minus eval_midtrain, item by item" in text
    assert "chain_sum accuracy 200 +45.0 points +40.0 to +50.0 better" in text
    assert "country_mcq accuracy 160 0.0 points -5.0 to +5.0 no clear change" in text
    assert "text_code bits per byte 48 +0.200 +0.150 to +0.250 worse" in text


@pytest.mark.parametrize(
    ("origin", "parts"),
    [
        ({"packages": [{"package": "a", "version": "1", "sha256": "0", "licence": "MIT"}]}, ["a 1 (MIT)"]),
        ({"installed": {"sympy": "1.14", "mpmath": "1.3"}, "python": "3.11.7"}, ["sympy 1.14 (as installed)", "mpmath 1.3 (as installed)", "Python 3.11.7"]),
        ({"files": [{"name": "x.jsonl", "bytes": 1, "sha256": "0"}]}, ["x.jsonl"]),
        ({"files": [{"name": f"{i}.txt", "bytes": 1, "sha256": "0"} for i in range(3)]}, ["3 files, 0.txt and on"]),
        ({"kind": "embedded"}, []),
    ],
)
def test_origin_in_words(origin: dict, parts: list[str]) -> None:
    assert origin_parts(origin) == parts
