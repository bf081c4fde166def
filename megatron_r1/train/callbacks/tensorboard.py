"""The metrics as TensorBoard event files."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from megatron_r1.artifacts.checkpoint import METRICS_FILE, TENSORBOARD_FOLDER
from megatron_r1.train.callbacks.base import Callback
from megatron_r1.train.callbacks.journal import json_record
from megatron_r1.utils import io
from megatron_r1.utils.errors import EnvironmentProblem

if TYPE_CHECKING:
    from megatron_r1.train.loop import Trainer


class TensorBoard(Callback):
    """Writes what metrics.jsonl gets. After an interruption the files are rebuilt from metrics.jsonl, so no point is doubled.

    Must come after Journal, whose on_start cuts metrics.jsonl back.
    """

    def on_start(self, trainer: Trainer) -> None:
        """Open the event file. Raises EnvironmentProblem when the tensorboard package is missing."""
        self.writer = None
        if not trainer.ctx.is_main:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise EnvironmentProblem(
                expected="the tensorboard package, because log.tensorboard is true", found=str(error),
                fix="pip install tensorboard, or set log.tensorboard: false (metrics.jsonl is written anyway)",
            ) from error
        self.folder = trainer.folder / TENSORBOARD_FOLDER
        shutil.rmtree(self.folder, ignore_errors=True)
        self.writer = SummaryWriter(str(self.folder))
        for record in io.read_jsonl(trainer.folder / METRICS_FILE):
            self._write(record)

    def on_step(self, trainer: Trainer) -> None:
        """Add the record's numbers."""
        if self.writer is not None and trainer.record:
            self._write(json_record(trainer.record))

    def on_close(self, trainer: Trainer) -> None:
        """Flush, and drop the machine's name from the file name: artifacts are passed on."""
        if getattr(self, "writer", None) is not None:
            self.writer.close()
            for number, path in enumerate(sorted(self.folder.glob("events.out.tfevents.*"))):
                stamp = path.name.split(".")[3]
                path.rename(self.folder / f"events.out.tfevents.{stamp}.megatron_r1.{number}")

    def _write(self, record: dict[str, Any]) -> None:
        for key, value in scalars(record).items():
            self.writer.add_scalar(key, value, record["step"])


def scalars(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested record -> {"validation/probe/code": 2.1, ...}; step and missing values are left out."""
    found = {}
    for key, value in record.items():
        if isinstance(value, dict):
            found |= scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and key != "step":
            found[f"{prefix}{key}"] = float(value)
    return found
