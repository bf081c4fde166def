"""Held-out loss per capability and per domain: the curves a mixture is judged by."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from megatron_r1.artifacts.probe import ProbeSet
from megatron_r1.train.callbacks.base import Callback, due
from megatron_r1.train.config import ValidationConfig
from megatron_r1.train.heldout import Rows, pack, validation_documents
from megatron_r1.train.measure import curve_sums, target_bytes

if TYPE_CHECKING:
    from megatron_r1.train.loop import Trainer


class Validation(Callback):
    """`validation` = {curve: nats per token} and `bits_per_byte` = {curve: bits per byte of text}, on fixed tokens that are
    never trained on. The `probe/` curves before the first step, every so often and after the last; the `test/` curves only
    before the first and after the last: nobody should steer by them, and they would double the cost."""

    def __init__(self, config: ValidationConfig, shards: Any, probe: ProbeSet | None, seq_length: int, seed: int) -> None:
        self.config = config
        documents = validation_documents(shards, probe, int(config.tokens), seq_length, seed)
        parts = {part: [d for d in documents if d.curve.startswith(part)] for part in ("probe/", "test/")}
        self.often, self.rarely = (pack(part, seq_length) for part in parts.values())
        self.bytes = dict.fromkeys((document.curve for document in documents), 0)
        for document in documents:
            self.bytes[document.curve] += target_bytes(shards.tokenizer, document.tokens, document.mask)

    @property
    def tokens(self) -> int:
        """Tokens of one frequent measurement, padding included."""
        return int(self.often.batch["tokens"].size)

    def on_step(self, trainer: Trainer) -> None:
        """Measure when due."""
        if due(trainer, self.config.every, at_start=True):
            self._measure(trainer, self.often)
            if trainer.step in (0, trainer.total):
                self._measure(trainer, self.rarely)

    def _measure(self, trainer: Trainer, rows: Rows) -> None:
        if not rows.curves:
            return
        sums, counts = curve_sums(trainer.ctx, trainer.chunks, rows, int(trainer.config.micro_batch))
        measured = {name: (total, count) for name, total, count in zip(rows.curves, sums, counts) if count}
        trainer.record.setdefault("validation", {}).update({name: total / count for name, (total, count) in measured.items()})
        trainer.record.setdefault("bits_per_byte", {}).update(
            {name: total / math.log(2) / self.bytes[name] for name, (total, _) in measured.items() if self.bytes[name]}
        )
