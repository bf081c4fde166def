"""Small stages that stand in for the real ones, so that the pipeline is tested alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from pydantic import Field

from megatron_r1.config.base import Frozen, StageConfig, StepName
from megatron_r1.pipeline import recipe as recipe_module
from megatron_r1.pipeline import stages


class MakeConfig(StageConfig):
    stage: Literal["make"] = Field(description="stage")
    text: str = Field("hello", description="what to write")


class JoinInputs(Frozen):
    shards: StepName = Field(description="first")
    others: list[StepName] = Field([], description="more")


class JoinConfig(StageConfig):
    stage: Literal["join"] = Field(description="stage")
    inputs: JoinInputs = Field(description="inputs")


@dataclass(frozen=True)
class FakeStage:
    name: str
    kind: str
    config: type[StageConfig]
    run: Callable[..., Any]
    distributed: bool = False
    calls: list[str] = field(default_factory=list)

    def describe(self, config: StageConfig) -> str:
        return self.name

    def entered_by_all(self, config: StageConfig) -> bool:
        return self.distributed


@pytest.fixture
def fake_stages(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeStage]:
    def make(config, inputs, work):
        registry["make"].calls.append(work.name)
        (work.path / "text").write_text(f"{config.text} {config.seed}")
        return work.complete({"length": len(config.text)})

    def join(config, inputs, work):
        registry["join"].calls.append(work.name)
        parts = [inputs["shards"], *inputs.get("others", [])]
        (work.path / "text").write_text(" + ".join(part.file("text").read_text() for part in parts))
        return work.complete()

    registry = {"make": FakeStage("make", "shards", MakeConfig, make), "join": FakeStage("join", "probe", JoinConfig, join)}
    monkeypatch.setattr(recipe_module, "STAGES", registry)
    monkeypatch.setattr(stages, "STAGES", registry)
    return registry
