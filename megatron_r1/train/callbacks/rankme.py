"""RankMe while training: does the representation collapse?"""

from __future__ import annotations

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


class RankMe(Callback):
    """Every so often and after the last step: `rankme`, over one random non-first token of each of N held-out documents."""

    def __init__(self, config: RankMeConfig, shards: Any, width: int, seq_length: int, seed: int) -> None:
        self.config, self.width = config, width
        documents, self.positions = rankme_documents(shards, int(config.samples), seq_length, seed)
        self.rows = pack(documents, seq_length)
        if len(documents) < int(config.samples):
            log.warning("rankme: %d samples asked for, the shards hold %d held-out documents: measured on these", int(config.samples), len(documents))

    @property
    def tokens(self) -> int:
        """Tokens of one measurement, padding included."""
        return int(self.rows.batch["tokens"].size)

    def on_step(self, trainer: Trainer) -> None:
        """Measure when due."""
        if len(self.positions) < 2 or not due(trainer, self.config.every, at_start=self.config.every is not None):
            return
        states = states_at(trainer.ctx, trainer.chunks, self.rows, self.positions, self.width, int(trainer.config.micro_batch))
        trainer.record["rankme"] = rankme(states)
