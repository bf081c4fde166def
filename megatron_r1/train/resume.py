"""Where an interrupted phase goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from megatron_r1.artifacts.checkpoint import CHECKPOINTS_FOLDER, checkpoint_folders
from megatron_r1.parallel.context import ParallelContext
from megatron_r1.utils.errors import CheckpointError, EnvironmentProblem, R1Error
from megatron_r1.utils.lock import only_process
from megatron_r1.utils.logging import get_logger

log = get_logger("train.resume")


def newest_complete(folder: Path, ctx: ParallelContext, verify: Callable[[Path], Any]) -> Path | None:
    """Newest checkpoint under `folder` that `verify` accepts, the same on every rank; None when there are none at all.

    Damaged ones that are newer are named in a warning and, once an undamaged one is found, removed: training writes them again.
    Raises CheckpointError on every rank, and removes nothing, when there are checkpoints and all are damaged.
    """
    outcome: Path | R1Error | OSError | None = None
    if ctx.is_main:
        try:
            outcome = _newest_complete(folder, verify)
        except (R1Error, OSError) as error:
            outcome = error
    outcome = ctx.broadcast_object(outcome)
    if isinstance(outcome, R1Error | OSError):
        raise outcome
    return outcome


def _newest_complete(folder: Path, verify: Callable[[Path], Any]) -> Path | None:
    damaged: list[tuple[Path, str]] = []
    chosen: Path | None = None
    found = checkpoint_folders(folder)
    for step, path in reversed(found):
        try:
            verify(path)
        except R1Error as error:  # an OSError is the disk's or the network's: that a file can not be read now does not make it damaged
            log.warning("checkpoint %s of step %d is damaged or incomplete and is skipped: %s", path.name, step, error.found)
            damaged.append((path, error.found))
            continue
        chosen = path
        break
    root = folder / CHECKPOINTS_FOLDER
    if damaged and chosen is None:
        raise CheckpointError(
            expected=f"at least one undamaged checkpoint of the {len(found)} in {root}", found="; ".join(f"{path.name}: {reason}" for path, reason in damaged),
            fix=f"bring one back from a copy, or delete {root} and run the same command again to train from the first step; nothing was changed",
        )
    for path, _ in damaged:
        shutil.rmtree(path)
    known = {path for _, path in found}
    for leftover in root.iterdir() if root.is_dir() else ():
        # A save that was killed leaves a folder under a temporary name.
        if leftover not in known:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    return chosen


@contextmanager
def alone(folder: Path, ctx: ParallelContext) -> Iterator[None]:
    """Hold the lock of `folder` for all ranks; EnvironmentProblem on every rank when another run works there. Collective."""
    with ExitStack() as held:
        problem: EnvironmentProblem | None = None
        if ctx.is_main:
            try:
                held.enter_context(only_process(folder, "lock"))
            except EnvironmentProblem as error:
                problem = error
        problem = ctx.broadcast_object(problem)
        if problem is not None:
            raise problem
        yield
