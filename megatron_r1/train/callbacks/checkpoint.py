"""Saves checkpoints: regular ones for resuming, even ones for influence, the last one always."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_r1.artifacts.checkpoint import checkpoint_folder, checkpoint_folders
from megatron_r1.train.callbacks.base import Callback
from megatron_r1.train.config import CheckpointsConfig

if TYPE_CHECKING:
    from megatron_r1.train.loop import Trainer


def even_steps(total: int, count: int) -> list[int]:
    """`count` steps spread evenly over a phase, the last being its end; fewer when the phase has fewer steps."""
    return sorted({max(1, round(total * k / count)) for k in range(1, count + 1)}) if count else []


class Checkpoints(Callback):
    """Last in the list: everything this step writes is on disk before its checkpoint is committed.

    `saved` is called on rank 0 after each save.
    """

    def __init__(self, config: CheckpointsConfig, total: int, saved: Callable[[], None] = lambda: None) -> None:
        self.config, self.kept, self.saved = config, {total, *even_steps(total, config.evenly)}, saved
        self.newest = 0

    def on_step(self, trainer: Trainer) -> None:
        """Save when due, and drop regular checkpoints beyond `keep`."""
        every = trainer.config.in_steps(self.config.every, trainer.total)
        if trainer.step and (trainer.step in self.kept or (every and trainer.step % every == 0)):
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Write the checkpoint of the current step, unless that has just been done. Collective over all ranks."""
        if self.newest == trainer.step:
            return
        for callback in trainer.callbacks:
            callback.on_save(trainer)
        trainer.save(checkpoint_folder(trainer.folder, trainer.step))
        self.newest = trainer.step
        if trainer.ctx.is_main:
            regular = [path for step, path in checkpoint_folders(trainer.folder) if step not in self.kept]
            # The step just saved counts as one of the newest even when it is an even one.
            spare = self.config.keep - (1 if trainer.step in self.kept else 0)
            for path in regular[: max(0, len(regular) - spare)]:
                shutil.rmtree(path)
            self.saved()
