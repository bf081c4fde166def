"""The stages there are, looked up by name and imported when needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from megatron_r1.config.base import StageConfig


@dataclass(frozen=True)
class Stage:
    """Where a stage lives and what it makes."""

    name: str
    kind: str
    """Kind of artifact it writes."""
    distributed: bool = False
    """Whether every rank takes part; otherwise rank 0 works and the others wait for the artifact."""
    shared: bool = False
    """Whether the ranks that take part share the work; of evaluate and export all load the model and one works."""

    def entered_by_all(self, config: StageConfig) -> bool:
        """Whether every rank takes part in this very step: some settings of a distributed stage run no model
        (`needs_model`), and then a rank that comes late must not open a workspace that rank 0 has already sealed."""
        return self.distributed and getattr(config, "needs_model", True)

    def gains_from_processes(self, config: StageConfig) -> bool:
        """Whether this very step is done sooner by more processes: what launch scripts ask."""
        return self.shared and self.entered_by_all(config)

    @property
    def config(self) -> type[StageConfig]:
        """Its settings; imports no torch."""
        return getattr(import_module(f"megatron_r1.{self.name}.config"), f"{self.name.capitalize()}Config")

    def describe(self, config: StageConfig) -> str:
        """One line on what the stage would do."""
        return import_module(f"megatron_r1.{self.name}.config").describe(config)

    @property
    def run(self) -> Callable[..., Any]:
        """Its entry; imports whatever the stage needs."""
        return import_module(f"megatron_r1.{self.name}.run").run


STAGES = {
    stage.name: stage
    for stage in (
        Stage("corpus", "shards"),
        Stage("probe", "probe", distributed=True, shared=True),
        Stage("influence", "influence", distributed=True, shared=True),
        Stage("mixture", "mixture", distributed=True, shared=True),
        Stage("train", "checkpoint", distributed=True, shared=True),
        Stage("evaluate", "evaluation", distributed=True),
        Stage("export", "export", distributed=True),
        Stage("report", "report"),
    )
}

ROLE_KINDS = {
    "shards": "shards",
    "tokenizer": "shards",
    "probe": "probe",
    "influence": "influence",
    "mixture": "mixture",
    "previous": "mixture",
    "base": "mixture",
    "checkpoint": "checkpoint",
    "teacher": "checkpoint",
    "reference": "checkpoint",
    "proxies": "checkpoint",
    "evaluation": "evaluation",
}
"""Input role -> kind of artifact it takes; a role that is not listed takes any."""
