"""Where an interrupted phase goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_r1.artifacts.checkpoint import CHECKPOINTS_FOLDER, checkpoint_folders
from megatron_r1.parallel.context import ParallelContext
from megatron_r1.utils.errors import R1Error
from megatron_r1.utils.logging import get_logger

log = get_logger("train.resume")


def newest_complete(folder: Path, ctx: ParallelContext, verify: Callable[[Path], Any]) -> Path | None:
    """Newest checkpoint under `folder` that `verify` accepts, the same on every rank; None when there is none.

    Damaged or half-written ones that are newer are named in a warning and removed: training writes them again.
    """
    chosen: Path | None = None
    if ctx.is_main:
        for step, path in reversed(checkpoint_folders(folder)):
            try:
                verify(path)
            except R1Error as error:
                log.warning("checkpoint %s of step %d is damaged or incomplete and is skipped: %s", path.name, step, error.found)
                shutil.rmtree(path)
                continue
            chosen = path
            break
        root = folder / CHECKPOINTS_FOLDER
        known = {path for _, path in checkpoint_folders(folder)}
        for leftover in root.iterdir() if root.is_dir() else ():
            # A save that was killed leaves a folder under a temporary name.
            if leftover not in known:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    return ctx.broadcast_object(chosen)
