"""Settings of the report stage (torch-free)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_r1.config.base import Frozen, StageConfig, StepName


class ReportInputs(Frozen):
    """The steps a report shows."""

    artifacts: list[StepName] = Field(
        description="Steps to show, usually every other step of the recipe. Parts whose step is not listed are named as "
        "absent in the page; nothing is invented for them.",
    )


class ReportConfig(StageConfig):
    """What the report page shows and how it judges it."""

    stage: Literal["report"] = Field(default="report", description="Which stage this step runs.")
    inputs: ReportInputs = Field(description="The steps the report reads.")
    title: str = Field(default="Run report", min_length=1, description="Heading of the page.")
    shuffled_source: str | None = Field(
        default=None,
        description="Name of the source whose tokens were shuffled, the known-answer test of the influence scores. "
        "Empty: the distractor sources whose name contains 'shuffl'.",
    )
    seeds: str | None = Field(
        default=None,
        description="JSON file of a comparison over several seeds to show in the page, as `benchmarks/evidence.py` writes it. "
        "Only its name is part of the step's fingerprint: give another result another name.",
    )
    curve_points: int = Field(
        default=400,
        ge=20,
        le=10_000,
        description="Curves with more logged points than this are thinned to it in the figures (the tables keep all).",
    )


def describe(config: ReportConfig) -> str:
    """Return one line that says what this step would do."""
    count = len(config.inputs.artifacts)
    return f"draw report.html, figures and tables from {count} step{'' if count == 1 else 's'}"
