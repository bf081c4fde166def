"""The tasks there are, each in a module of its own, imported when switched on."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_r1.evaluate.config import EvaluateConfig
    from megatron_r1.evaluate.task import Task

# Field of TaskSettings -> module and class. The order of TaskSettings is the order in which tasks run.
TASKS = {
    "bits_per_byte": ("bits_per_byte", "BitsPerByte"),
    "generated": ("generated", "Generated"),
    "country_mcq": ("country_mcq", "CountryMcq"),
    "humaneval_ranking": ("humaneval", "Ranking"),
    "humaneval_pass": ("humaneval", "PassAtOne"),
}


def build(config: EvaluateConfig, name: str) -> Task:
    """The task `name` with its settings of `config`."""
    module, attribute = TASKS[name]
    return getattr(import_module(f"{__name__}.{module}"), attribute)(getattr(config.tasks, name))
