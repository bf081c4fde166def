"""What a user reads at the end of a run, of a run's artifacts, and of the shipped recipes."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from megatron_r1.artifacts.ledger import draw, mermaid, read_run
from megatron_r1.pipeline.recipe import load_recipe, shipped
from megatron_r1.pipeline.runner import Done
from megatron_r1.utils.logging import duration, is_main_rank

WIDE = 120
"""Columns when the output is no terminal: nothing is cut in a log."""


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=WIDE)


def print_summary(done: list[Done]) -> None:
    """Steps with their times, the report's headline figures, and where to look."""
    if not is_main_rank():
        return
    console = _console()
    table = Table("step", "stage", "time", "artifact", title="run", title_justify="left")
    for item in done:
        seconds = duration(item.artifact.manifest.seconds)
        table.add_row(item.step, item.artifact.kind, f"{seconds} (skipped)" if item.skipped else seconds, item.artifact.path.name)
    console.print(table)
    for item in done:
        if item.artifact.kind != "report":
            continue
        headline = item.artifact.manifest.summary.get("headline", [])
        results = Table("question", "answer", "figure", title="results", title_justify="left")
        for row in headline:
            results.add_row(str(row.get("question", "")), str(row.get("verdict", "")), str(row.get("figure", "")))
        if headline:
            console.print(results)
        console.print(f"report: {item.artifact.path / 'report.html'}", soft_wrap=True)
    for item in done:
        if item.artifact.kind == "export":
            console.print(f"model:  {item.artifact.path / 'hf'}  (AutoModelForCausalLM.from_pretrained)", soft_wrap=True)


def print_recipes() -> None:
    """One line a shipped recipe."""
    table = Table("recipe", "steps", "what it is")
    for name in shipped():
        recipe = load_recipe(name)
        table.add_row(name, str(len(recipe.steps)), recipe.description)
    _console().print(table)


def print_ledger(folder: Path, verify: bool, graph: bool, as_mermaid: bool) -> int:
    """Artifacts of a run with their state; exit status 1 when one is damaged."""
    entries = read_run(folder, verify)
    if as_mermaid:
        print(mermaid(entries))
        return 0
    console = _console()
    table = Table(Column("artifact", no_wrap=True), "kind", "state", "files", "MiB", "time", "made (UTC)")
    for entry in entries:
        manifest = entry.artifact.manifest if entry.artifact else None
        if manifest is None:
            table.add_row(entry.path.name, "", entry.state, "", "", "", entry.problem)
            continue
        size = sum(record.bytes for record in manifest.files.values()) / 2**20
        state = f"{entry.state}, verified" if verify else entry.state
        table.add_row(entry.path.name, manifest.kind, state, str(len(manifest.files)), f"{size:.1f}", duration(manifest.seconds), manifest.created[:16].replace("T", " "))
    console.print(table)
    if graph:
        print(draw(entries))
    damaged = [entry for entry in entries if entry.state == "damaged"]
    for entry in damaged:
        console.print(f"damaged: {entry.path}: {entry.problem}\n   do: delete the folder and run the same command again", soft_wrap=True)
    return 1 if damaged else 0
