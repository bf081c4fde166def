"""Entry of the report stage."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_r1.artifacts.base import Artifact, Workspace
from megatron_r1.report.collect import collect
from megatron_r1.report.config import ReportConfig
from megatron_r1.report.leave_one_out import analyses, lines
from megatron_r1.report.page import draw_all, own_step, render
from megatron_r1.report.seeds import read_seeds
from megatron_r1.report.tables import tables
from megatron_r1.report.verdicts import Verdict, judge
from megatron_r1.utils import io
from megatron_r1.utils.logging import get_logger

ANSWERS = {"ok": "yes", "partly": "in part", "not ok": "no", "absent": "not tested"}
log = get_logger(__name__)


def run(config: ReportConfig, inputs: Mapping[str, Artifact | list[Artifact] | None], work: Workspace) -> Artifact:
    """Write report.html, figures/*.png and tables/*.csv. Raises ArtifactError when an input is not in this release's format."""
    given = inputs.get("artifacts") or []
    artifacts = given if isinstance(given, list) else [given]
    over_seeds = None if config.seeds is None else read_seeds(config.seeds)
    found = collect(artifacts)
    verdicts = judge(found, config.shuffled_source)
    drawn = draw_all(found, config.curve_points)
    for figure in drawn:
        io.atomic_write_bytes(work.path / "figures" / f"{figure.name}.png", figure.png)
    for table in tables(found, verdicts):
        io.atomic_write_text(work.path / "tables" / f"{table.name}.csv", table.csv())
    own = own_step(work.name, work.fingerprint, found.steps)
    io.atomic_write_text(work.path / "report.html", render(found, verdicts, drawn, config.title, own, over_seeds))
    for analysis in analyses(found):
        for line in lines(analysis):
            log.info("%s", line)
    for verdict in verdicts:
        log.info("%s: %s. %s", ANSWERS[verdict.status], verdict.claim, verdict.detail)
    return work.complete({"headline": [headline(verdict) for verdict in verdicts], "steps": len(artifacts)})


def headline(verdict: Verdict) -> dict[str, str]:
    """One line of the table that a run ends with."""
    return {"question": verdict.claim, "verdict": ANSWERS[verdict.status], "figure": verdict.detail}
