"""The metrics record: loss, learning rate, gradient norm, speed, losses per source."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_r1.parallel.optimizer import parameter_norm
from megatron_r1.train.callbacks.base import Callback

if TYPE_CHECKING:
    from megatron_r1.train.loop import Trainer


class Metrics(Callback):
    """Completes the record of every `log.every`-th step, of the last, and of those another callback measured something at.

    Losses are means over the target tokens since the previous record (updates that were skipped do not count); lr and
    grad_norm are this step's; tokens_per_second counts training steps only, not validation and checkpoints; seconds is
    training time since the phase began; source_share is the share of the counted tokens that came from each source. On GPUs mfu is the share
    of the devices' peak that the model's matrix products used (causal attention counted as what it is, recomputation not at all). Must come after the callbacks that measure and before those that write.
    """

    def __init__(self, flops_per_token: float = 0.0, peak_tflops: float | None = None) -> None:
        self.flops_per_token, self.peak_tflops = flops_per_token, peak_tflops

    def on_step(self, trainer: Trainer) -> None:
        """Fill trainer.record."""
        measured = dict(trainer.record)
        if trainer.step == 0:
            trainer.record = {"step": 0, "tokens": 0, **measured} if measured else {}
            return
        if not measured and trainer.step % int(trainer.config.log.every) and trainer.step != trainer.total:
            return
        window, last = trainer.window, trainer.last
        targets = window.targets or float("nan")
        record: dict[str, Any] = {
            "step": trainer.step, "tokens": trainer.tokens, "loss": window.loss / targets, "lr": last.lr, "grad_norm": last.grad_norm,
            "tokens_per_second": window.steps * int(trainer.config.global_batch) / max(window.seconds, 1e-9), "seconds": trainer.seconds,
            "skipped": len(trainer.guard.skipped),
        }
        record["parameter_norm"] = parameter_norm(trainer.chunks, trainer.ctx)
        if self.peak_tflops is not None:
            record["mfu"] = record["tokens_per_second"] * self.flops_per_token / (trainer.ctx.world_size * self.peak_tflops * 1e12)
        record["source_share"] = {name: count / targets for name, (_, count) in window.sources.items()}
        record["source_loss"] = {name: loss / count for name, (loss, count) in window.sources.items() if count}
        trainer.record = {**record, **trainer.objective.record(), **measured}
        trainer.window = type(window)()
