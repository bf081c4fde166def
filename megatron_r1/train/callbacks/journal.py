"""metrics.jsonl and ledger.jsonl: what happened, one JSON object per line, never twice."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from megatron_r1.artifacts.checkpoint import LEDGER_FILE, METRICS_FILE, truncate_journal
from megatron_r1.train.callbacks.base import Callback
from megatron_r1.utils import io

if TYPE_CHECKING:
    from megatron_r1.train.loop import Trainer


class Journal(Callback):
    """Writes a metrics record when the loop made one, and a ledger record for every step. Rank 0 only."""

    def on_start(self, trainer: Trainer) -> None:
        """Cut both journals back to the step resumed from (nothing of an unsaved step survives)."""
        if trainer.ctx.is_main:
            for name in (METRICS_FILE, LEDGER_FILE):
                path = trainer.folder / name
                if trainer.resumed:
                    truncate_journal(path, trainer.step)
                else:
                    path.unlink(missing_ok=True)
                path.touch()

    def on_step(self, trainer: Trainer) -> None:
        """Append."""
        if not trainer.ctx.is_main:
            return
        if trainer.step:
            io.append_jsonl(trainer.folder / LEDGER_FILE, trainer.ledger_record())
        if trainer.record:
            io.append_jsonl(trainer.folder / METRICS_FILE, json_record(trainer.record))

    def on_save(self, trainer: Trainer) -> None:
        """Flush both journals to the disk."""
        for path in (trainer.folder / name for name in (METRICS_FILE, LEDGER_FILE)):
            if trainer.ctx.is_main and path.exists():
                with open(path, "rb") as stream:
                    os.fsync(stream.fileno())


def json_record(record: dict[str, Any]) -> dict[str, Any]:
    """The record with non-finite numbers as null: JSON has none, and a reader should not stumble over a skipped step."""
    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items()}
        return None if isinstance(value, float) and value - value != 0.0 else value

    return clean(record)
