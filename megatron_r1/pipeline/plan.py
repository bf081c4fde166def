"""--dry-run: what a recipe says and what running it would mean. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from megatron_r1.pipeline.derive import derive, print_plans
from megatron_r1.pipeline.recipe import Recipe
from megatron_r1.pipeline.runner import select


def print_plan(recipe: Recipe, runs_dir: Path, only: str | None = None, until: str | None = None) -> None:
    """The resolved recipe, then the derived values of every step that would run. Raises ConfigError when `only` or `until` is none of its steps."""
    wanted = recipe.members(only) if only else select(recipe, None, until)
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # nothing is cut in a log
    console.print(yaml.safe_dump(_families_once(recipe), sort_keys=False, allow_unicode=True), markup=False, highlight=False, soft_wrap=True)
    print_plans([plan for plan in derive(recipe) if plan.step in wanted], console, recipe.families)
    console.print(f"artifacts would go to {Path(runs_dir) / recipe.name}", soft_wrap=True)


def _families_once(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe with the first step of every family standing for all of them."""
    plain = recipe.plain()
    first = {names[0]: f"{family}-* ({len(names)} steps, here {names[0]})" for family, names in recipe.families.items()}
    others = {name for names in recipe.families.values() for name in names[1:]}
    steps = {first.get(name, name): settings for name, settings in plain["steps"].items() if name not in others}
    return {**plain, "steps": steps}
