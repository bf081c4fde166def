"""A comparison over several seeds: computed by the benchmark, read and shown by the report."""

from __future__ import annotations

import importlib.util
import json
import statistics
from pathlib import Path
from types import ModuleType

import pytest
from fixture_run import FixtureRun, write_report

from megatron_r1.report.seeds import read_seeds
from megatron_r1.utils.errors import ArtifactError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def evidence() -> ModuleType:
    spec = importlib.util.spec_from_file_location("evidence", ROOT / "benchmarks" / "evidence.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def losses(code: float, math: float) -> dict[str, dict[str, float]]:
    return {"probe": {"code": code, "math": math, "mean": (code + math) / 2}, "held_out": {"web": code - 3, "mean": code - 3}}


SEEDS = {
    1: {"influence": losses(5.0, 4.0), "uniform": losses(5.2, 4.2)},
    2: {"influence": losses(5.1, 4.2), "uniform": losses(5.0, 4.2)},
    3: {"influence": losses(4.9, 4.1), "uniform": losses(5.2, 4.4)},
}


def row(evidence: ModuleType) -> dict:
    agreement = {"adam": {"spearman": {"code": {"value": 0.7, "low": 0.1, "high": 0.95}, "math": {"value": None, "low": None, "high": None}}, "truth_between_seeds": 0.4}}
    return {
        "date": "2026-01-01", "command": "python benchmarks/evidence.py", "against": "influence", "seeds": {str(s): each for s, each in SEEDS.items()},
        "compared": evidence.compared(SEEDS, "influence"), "leave_one_out": agreement,
    }  # fmt: skip


def test_gains_are_paired_and_their_interval_is_students(evidence: ModuleType) -> None:
    found = evidence.compared(SEEDS, "influence")["uniform"]["probe"]["gain"]
    gains = [0.2, -0.1, 0.3]
    half = 4.302653 * statistics.stdev(gains) / 3**0.5  # Student's t, 2 degrees of freedom, from a table
    mean = statistics.fmean(gains)
    assert (found["code"]["mean"], found["code"]["low"], found["code"]["high"]) == pytest.approx((mean, mean - half, mean + half), abs=1e-4)
    assert found["code"]["wins"] == 2
    assert "gain" not in evidence.compared(SEEDS, "influence")["influence"]["probe"]


def test_the_page_shows_every_training_best_first(evidence: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "over_seeds.json"
    file.write_text(json.dumps(row(evidence)))
    run = FixtureRun(tmp_path)
    run.corpus()
    page = write_report(run, seeds=str(file)).file("report.html").read_text("utf-8")
    part = page[page.index('<section id="seeds">') : page.index("</section>", page.index('<section id="seeds">'))]
    assert "Over 3 seeds" in part
    assert part.index("influence</th>") < part.index("uniform</th>")
    assert "2 of 3" in part
    assert "not defined" in part
    assert "python benchmarks/evidence.py" in part


def test_without_a_file_there_is_no_such_part(tmp_path: Path) -> None:
    run = FixtureRun(tmp_path)
    run.corpus()
    assert 'id="seeds"' not in write_report(run).file("report.html").read_text("utf-8")


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"against": "influence", "compared": {}}'])
def test_another_file_is_refused(text: str | None, tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ArtifactError, match="comparison over seeds"):
        read_seeds(file)
