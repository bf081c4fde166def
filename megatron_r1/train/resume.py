"""Where an interrupted phase goes on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megatron_r1.artifacts.checkpoint import CHECKPOINTS_FOLDER, checkpoint_folders
from megatron_r1.parallel import checkpoint
from megatron_r1.parallel.context import ParallelContext
from megatron_r1.utils.errors import ArtifactError, CheckpointError
from megatron_r1.utils.lock import only_process
from megatron_r1.utils.logging import get_logger

log = get_logger("train.resume")


def newest_complete(folder: Path, ctx: ParallelContext) -> Path | None:
    """Newest checkpoint under `folder` that passes `checkpoint.verify`, the same on every rank; None when there are none at all. Collective.

    Damaged ones that are newer are named in a warning and, once an undamaged one is found, removed: training writes them again.
    Raises CheckpointError on every rank, and removes nothing, when there are checkpoints and all are damaged.
    """
    found = ctx.broadcast_object(checkpoint_folders(folder) if ctx.is_main else None)
    damaged: list[tuple[Path, str]] = []
    chosen: Path | None = None
    for step, path in reversed(found):
        try:
            checkpoint.verify(path, ctx)
        except (CheckpointError, ArtifactError) as error:  # an OSError is the disk's or the network's: that a file can not be read now does not make it damaged
            if ctx.is_main:
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

    def tidy() -> None:
        for path, _ in damaged:
            shutil.rmtree(path)
        known = {path for _, path in found}
        for leftover in root.iterdir() if root.is_dir() else ():
            # A save that was killed leaves a folder under a temporary name.
            if leftover not in known:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    ctx.on_main(tidy)
    return chosen


@contextmanager
def alone(folder: Path, ctx: ParallelContext) -> Iterator[None]:
    """Hold the lock of `folder` for all ranks; EnvironmentProblem on every rank when another run works there. Collective."""

    def lock() -> None:
        held.enter_context(only_process(folder, "lock"))

    with ExitStack() as held:
        ctx.on_main(lock)
        yield
