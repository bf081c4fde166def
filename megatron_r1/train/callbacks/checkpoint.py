"""Saves checkpoints: regular ones for resuming, even ones for influence, the last one always."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_r1.artifacts.checkpoint import checkpoint_folder, checkpoint_folders
from megatron_r1.parallel import checkpoint
from megatron_r1.parallel.checkpoint import PendingSave
from megatron_r1.parallel.device import HostCopies
from megatron_r1.train.callbacks.base import Callback
from megatron_r1.train.config import CheckpointsConfig
from megatron_r1.utils.errors import R1Error
from megatron_r1.utils.logging import get_logger

if TYPE_CHECKING:
    from megatron_r1.train.loop import Trainer

log = get_logger("train.checkpoint")


def even_steps(total: int, count: int) -> list[int]:
    """`count` steps spread evenly over a phase, the last being its end; fewer when the phase has fewer steps."""
    return sorted({max(1, round(total * k / count)) for k in range(1, count + 1)}) if count else []


class Checkpoints(Callback):
    """Last in the list: everything this step writes is on disk before its checkpoint is committed.

    A checkpoint is written beside the following steps and committed at the first step boundary after that; the next save, the
    last step and SIGTERM wait for it. `saved` is called on rank 0 after each commit.
    """

    def __init__(self, config: CheckpointsConfig, total: int, saved: Callable[[], None] = lambda: None) -> None:
        self.config, self.kept, self.saved = config, {total, *even_steps(total, config.evenly)}, saved
        self.newest = 0
        self.copies = HostCopies() if config.background else None
        self.pending: PendingSave | None = None

    def on_start(self, trainer: Trainer) -> None:
        """Ask for the memory of the first save beside the first steps."""
        if self.copies is not None:
            checkpoint.reserve(self.copies, trainer.chunks, trainer.optimizer)

    def on_step(self, trainer: Trainer) -> None:
        """Commit what is written, save when due."""
        if self.pending is not None and self.pending.ready():
            self.settle(trainer)
        every = trainer.config.in_steps(self.config.every, trainer.total)
        if trainer.step and (trainer.step in self.kept or (every and trainer.step % every == 0)):
            self.save(trainer)
        if trainer.step == trainer.total:
            self.settle(trainer)

    def save(self, trainer: Trainer) -> None:
        """Begin to write the checkpoint of the current step, unless that has just been done. Collective over all ranks."""
        if self.newest == trainer.step:
            return
        self.settle(trainer)
        for callback in trainer.callbacks:
            callback.on_save(trainer)
        self.pending = trainer.save(checkpoint_folder(trainer.folder, trainer.step), self.copies)
        self.newest = trainer.step
        if self.copies is None:
            self.settle(trainer)

    def settle(self, trainer: Trainer) -> None:
        """Wait for the checkpoint being written, if any, and commit it; only then drop regular ones beyond `keep`. Collective.

        Raises on every rank what failed on any.
        """
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        pending.finish()
        if trainer.ctx.is_main:
            self._drop_old(trainer)
            self.saved()

    def on_close(self, trainer: Trainer) -> None:
        """When the loop failed while a checkpoint was being written: keep it if that is possible, and say so if not."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        try:
            if pending.close():
                return
            found = "it needs the other processes to be completed"
        except (R1Error, OSError) as error:
            found = error.found if isinstance(error, R1Error) else str(error)
        log.warning("%s was being written when training failed, and is lost: %s", pending.path.name, found)

    def _drop_old(self, trainer: Trainer) -> None:
        regular = [path for step, path in checkpoint_folders(trainer.folder) if step not in self.kept]
        # The step just saved counts as one of the newest even when it is an even one.
        spare = self.config.keep - (1 if self.newest in self.kept else 0)
        for path in regular[: max(0, len(regular) - spare)]:
            shutil.rmtree(path)
