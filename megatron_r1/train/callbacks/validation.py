"""Held-out loss per capability, domain and source: the curves a mixture is judged by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_r1.artifacts.probe import ProbeSet
from megatron_r1.train.callbacks.base import Callback, due
from megatron_r1.train.config import ValidationConfig
from megatron_r1.train.heldout import Rows, pack, source_documents, validation_documents
from megatron_r1.train.measure import curve_sums, target_bytes
from megatron_r1.utils.logging import get_logger

if TYPE_CHECKING:
    from megatron_r1.train.loop import Trainer

log = get_logger("train.validation")


class Validation(Callback):
    """`validation` = {curve: nats per token} and `bits_per_byte` = {curve: bits per byte of text}, on fixed tokens that are
    never trained on. The `probe/` curves, and a `source/` curve for every source with a share, before the first step, every so
    often and after the last; the `test/` curves only before the first and after the last: nobody should steer by them, and they
    would double the cost."""

    def __init__(self, config: ValidationConfig, shards: Any, probe: ProbeSet | None, sources: Sequence[str], seq_length: int, seed: int) -> None:
        self.config = config
        of_sources = source_documents(shards, sources, int(config.source_tokens), seq_length, seed)
        bare = sorted(set(sources) - {document.curve.removeprefix("source/") for document in of_sources}) if config.source_tokens else []
        if bare:
            log.warning("validation: no held-out documents of %s, so there is no curve of them (splits.probe of the corpus step)", ", ".join(bare[:8]) + (f" and {len(bare) - 8} more" if len(bare) > 8 else ""))
        documents = [*validation_documents(shards, probe, int(config.tokens), seq_length, seed), *of_sources]
        self.often, self.rarely = (pack([d for d in documents if d.curve.startswith("test/") is rarely], seq_length) for rarely in (False, True))
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
