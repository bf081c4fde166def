"""Run a recipe: in order, skipping what is complete, finishing what is not.

Under torchrun every rank walks the same steps. Distributed stages are entered by all ranks; for the others rank 0 works
while the rest wait for the artifact to appear, so this layer needs no process group.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_r1.artifacts.base import (
    MANIFEST,
    Artifact,
    Verify,
    artifact_path,
    open_artifact,
    open_workspace,
    step_fingerprint,
)
from megatron_r1.pipeline.recipe import Recipe
from megatron_r1.utils import io
from megatron_r1.utils.lock import only_process
from megatron_r1.utils.logging import duration, get_logger, is_main_rank

log = get_logger("pipeline")
WAIT_SECONDS = 0.5


@dataclass(frozen=True)
class Done:
    """One step of a finished run."""

    step: str
    artifact: Artifact
    skipped: bool


def run_recipe(
    recipe: Recipe, runs_dir: Path, command: str, only: str | None = None, until: str | None = None, verify: Verify = "full",
) -> list[Done]:
    """Run every step (or those that `only`/`until` need) and return them in order.

    `only`: run this step and nothing else; its inputs must be complete. `until`: run this step and all it needs.
    Raises the stage's own errors; artifacts that were complete stay as they are.
    """
    folder = Path(runs_dir) / recipe.name
    with io.disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    wanted = select(recipe, only, until)
    with single_process(folder):
        if is_main_rank():
            io.atomic_write_text(folder / "recipe.yaml", yaml.safe_dump(recipe.plain(), sort_keys=False, allow_unicode=True))
        complete: dict[str, Artifact] = {}
        done: list[Done] = []
        for number, step in enumerate(wanted, start=1):
            may_run = only is None or step in recipe.members(only)
            result = _run_step(recipe, step, folder, complete, command, verify, may_run, f"[{number}/{len(wanted)}]")
            complete[step] = result.artifact
            done.append(result)
        if is_main_rank():
            _record(folder, complete)
    return done


def select(recipe: Recipe, only: str | None, until: str | None) -> list[str]:
    """The steps to walk through, inputs first; the name of a family stands for all of its steps. Raises ConfigError for an
    unknown one."""
    target = only or until
    if target is None:
        return list(recipe.steps)
    needed = set(recipe.members(target))
    for step in reversed(recipe.steps):
        if step in needed:
            needed.update(recipe.parents(step))
    return [step for step in recipe.steps if step in needed]


def _run_step(
    recipe: Recipe, step: str, folder: Path, complete: dict[str, Artifact], command: str, verify: Verify, may_run: bool, label: str,
) -> Done:
    stage, config = recipe.stage(step), recipe.steps[step]
    inputs = {role: [complete[name] for name in value] if isinstance(value, list) else complete[value] for role, value in recipe.inputs(step).items()}
    path = artifact_path(folder, step, step_fingerprint(stage.kind, config, inputs))
    if (path / MANIFEST).is_file():
        artifact = open_artifact(path, stage.kind, verify)
        log.info("%s %s: complete and verified, skipped (%s)", label, step, path.name)
        return Done(step, artifact, True)
    if not may_run:
        open_artifact(path, stage.kind, verify)  # raises: the input of --only is not complete
    if not is_main_rank() and not stage.entered_by_all(config):
        return Done(step, _wait_for(path, stage.kind), False)
    log.info("%s %s: %s", label, step, stage.describe(config))
    began = time.monotonic()
    work = open_workspace(folder, step, stage.kind, config, inputs, command)
    try:
        artifact = stage.run(config, inputs, work)
    except BaseException:
        if work.path.is_dir() and is_main_rank():
            work.note_time()
        raise
    if not is_main_rank():
        return Done(step, _wait_for(path, stage.kind), False)
    log.info("%s %s: done in %s -> %s", label, step, duration(time.monotonic() - began), artifact.path)
    return Done(step, artifact, False)


def _wait_for(path: Path, kind: str) -> Artifact:
    """Wait until rank 0 has completed an artifact (its folder is renamed into place when whole)."""
    while not (path / MANIFEST).is_file():
        time.sleep(WAIT_SECONDS)
    return open_artifact(path, kind)


def _record(folder: Path, complete: dict[str, Artifact]) -> None:
    """run.json: which artifact stands for which step now; older ones with other settings stay in the folder."""
    path = folder / "run.json"
    steps = io.read_json(path)["steps"] if path.exists() else {}
    steps.update({step: artifact.path.name for step, artifact in complete.items()})
    io.atomic_write_json(path, {"steps": steps})


@contextmanager
def single_process(folder: Path) -> Iterator[None]:
    """Hold the run folder's lock on rank 0; EnvironmentProblem when another process works there."""
    if not is_main_rank():
        yield
        return
    with only_process(folder):
        yield
