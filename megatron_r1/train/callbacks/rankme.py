"""RankMe while training: does the representation collapse?"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from megatron_r1.train.callbacks.base import Callback, due
from megatron_r1.train.config import RankMeConfig
from megatron_r1.train.heldout import pack, rankme_documents
from megatron_r1.train.measure import states_at
from megatron_r1.train.rankme import rankme
from megatron_r1.utils.logging import get_logger

if TYPE_CHECKING:
    from megatron_r1.train.loop import Trainer

log = get_logger("train.rankme")
ALLOWED = 0.005
"""Share of the training time above which every measurement says what it costs."""


class RankMe(Callback):
    """Every so often and after the last step: `rankme`, over one random non-first token of each of N held-out documents."""

    def __init__(self, config: RankMeConfig, shards: Any, width: int, seq_length: int, seed: int) -> None:
        self.config, self.width, self.seconds = config, width, 0.0
        documents, self.positions = rankme_documents(shards, int(config.samples), seq_length, seed)
        self.rows = pack(documents, seq_length)
        if len(documents) < 2 <= int(config.samples):
            log.warning("rankme: not measured: the shards hold %d held-out documents; raise splits.probe of the corpus step", len(documents))
        elif len(documents) < int(config.samples):
            log.warning("rankme: %d samples asked for, the shards hold %d held-out documents: measured on these", int(config.samples), len(documents))

    @property
    def tokens(self) -> int:
        """Tokens of one measurement, padding included."""
        return int(self.rows.batch["tokens"].size)

    def on_step(self, trainer: Trainer) -> None:
        """Measure when due."""
        if len(self.positions) < 2 or not due(trainer, self.config.every, at_start=self.config.every is not None):
            return
        began = time.perf_counter()
        states = states_at(trainer.ctx, trainer.chunks, self.rows, self.positions, self.width, int(trainer.config.micro_batch))
        value = trainer.record["rankme"] = rankme(states)
        self.seconds += time.perf_counter() - began
        if trainer.step == trainer.total or self.seconds > ALLOWED * trainer.seconds > 0:
            log.info("rankme: %.1f s so far, %.2f %% of the training time", self.seconds, 100 * self.seconds / max(trainer.seconds, 1e-9))
        if self.config.warn_below is not None and value < self.config.warn_below:
            log.warning(
                "rankme: %.2f at step %d is below %g: the representation may be collapsing. In MobileLLM-R1's own sweep a higher learning rate gave a higher rank "
                "and a better model after mid-training, while the loss showed nothing; compare with runs of the same protocol", value, trainer.step, self.config.warn_below,
            )
