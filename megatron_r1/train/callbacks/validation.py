"""Held-out loss per capability and per domain: the curves a mixture is judged by."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from megatron_r1.artifacts.probe import ProbeSet
from megatron_r1.train.callbacks.base import Callback, due
from megatron_r1.train.config import ValidationConfig
from megatron_r1.train.heldout import pack, validation_documents
from megatron_r1.train.measure import curve_sums, target_bytes

if TYPE_CHECKING:
    from megatron_r1.train.loop import Trainer


class Validation(Callback):
    """Before the first step, every so often and after the last: `validation` = {curve: nats per token} and
    `bits_per_byte` = {curve: bits per byte of text}, on fixed tokens that are never trained on."""

    def __init__(self, config: ValidationConfig, shards: Any, probe: ProbeSet | None, seq_length: int, seed: int) -> None:
        self.config = config
        documents = validation_documents(shards, probe, int(config.tokens), seq_length, seed)
        self.rows = pack(documents, seq_length)
        self.bytes = dict.fromkeys(self.rows.curves, 0)
        for document in documents:
            self.bytes[document.curve] += target_bytes(shards.tokenizer, document.tokens, document.mask)

    @property
    def tokens(self) -> int:
        """Targets looked at each time."""
        return int(self.rows.batch["loss_mask"].sum())

    def on_step(self, trainer: Trainer) -> None:
        """Measure when due."""
        if not self.rows.curves or not due(trainer, self.config.every, at_start=True):
            return
        sums, counts = curve_sums(trainer.ctx, trainer.chunks, self.rows, int(trainer.config.micro_batch))
        measured = {name: (total, count) for name, total, count in zip(self.rows.curves, sums, counts) if count}
        trainer.record["validation"] = {name: total / count for name, (total, count) in measured.items()}
        trainer.record["bits_per_byte"] = {
            name: total / math.log(2) / self.bytes[name] for name, (total, _) in measured.items() if self.bytes[name]
        }
