"""The protocol between the loop and what watches it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_r1.config.units import Steps, Tokens

if TYPE_CHECKING:
    from megatron_r1.train.loop import Trainer


class Callback:
    """Called by every rank at the same points, in the order of the list; collective communication is allowed.

    During `on_step` a callback may add to `trainer.record`, the metrics record of this step; those later in the list see
    it. `trainer.step` counts finished steps.
    """

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of this process (trainer.step is 0, or the step resumed from)."""

    def on_step(self, trainer: Trainer) -> None:
        """After every step, and once before the first step of a phase (trainer.step == 0)."""

    def on_save(self, trainer: Trainer) -> None:
        """Before a checkpoint of the present step is written: flush what it must not be ahead of, keep what resuming from it needs."""

    def on_close(self, trainer: Trainer) -> None:
        """When the loop ends, for whatever reason; must not communicate."""


def due(trainer: Trainer, every: Steps | Tokens | None, *, at_start: bool) -> bool:
    """Whether something done every so often is done now: on its multiples, at the last step, and before the first if asked."""
    if trainer.step == 0:
        return at_start
    interval = trainer.config.in_steps(every, trainer.total)
    return trainer.step == trainer.total or (interval is not None and trainer.step % interval == 0)
