"""--dry-run: what a recipe says and what running it would mean. Imports no torch."""

from __future__ import annotations

from pathlib import Path

import yaml
from rich.console import Console

from megatron_r1.pipeline.derive import derive, print_plans
from megatron_r1.pipeline.recipe import Recipe


def print_plan(recipe: Recipe, runs_dir: Path) -> None:
    """The resolved recipe, then the derived values of every step."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # nothing is cut in a log
    console.print(yaml.safe_dump(recipe.plain(), sort_keys=False, allow_unicode=True), markup=False, highlight=False, soft_wrap=True)
    print_plans(derive(recipe), console)
    console.print(f"artifacts would go to {Path(runs_dir) / recipe.name}", soft_wrap=True)
