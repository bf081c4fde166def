"""What a person sees while training: a bar with tokens/s and time left, and once an estimate of the whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_r1.train.callbacks.base import Callback
from megatron_r1.utils.logging import duration, get_logger, human

if TYPE_CHECKING:
    from megatron_r1.train.loop import Trainer

log = get_logger("train")
# The first steps pay for caches and thread pools: an estimate from them would scare people.
ESTIMATE_AFTER = 5


class Console(Callback):
    """Moves the progress bar the loop opened."""

    def on_start(self, trainer: Trainer) -> None:
        """Start counting."""
        self._steps, self._seconds = 0, 0.0

    def on_step(self, trainer: Trainer) -> None:
        """Advance; after a few steps say how long the phase will take."""
        if trainer.step == 0:
            return
        trainer.bar.note(loss=trainer.last.loss, lr=trainer.last.lr, **{name: trainer.record[name] for name in ("mfu", "reward") if name in trainer.record})
        trainer.bar.advance(int(trainer.config.global_batch))
        self._steps += 1
        if self._steps > 1:
            self._seconds += trainer.last.seconds
        left = trainer.total - trainer.step
        if self._steps == ESTIMATE_AFTER and left > 0:
            per_step = self._seconds / (ESTIMATE_AFTER - 1)
            log.info(
                "%s tokens/s after %d steps: about %s for the remaining %d steps (validation and checkpoints not counted)",
                human(trainer.config.global_batch / per_step), trainer.step, duration(per_step * left), left,
            )
