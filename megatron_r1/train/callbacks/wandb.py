"""The metrics in Weights & Biases, for those who ask for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_r1.train.callbacks.base import Callback
from megatron_r1.train.callbacks.journal import json_record
from megatron_r1.train.callbacks.tensorboard import scalars
from megatron_r1.utils.errors import EnvironmentProblem

if TYPE_CHECKING:
    from pathlib import Path

    from megatron_r1.train.loop import Trainer


class Wandb(Callback):
    """Sends what metrics.jsonl gets, under the same names as TensorBoard. A resumed step goes on in the same run: its id is the step's fingerprint.

    `folder`: where the package keeps its own files (not in the artifact).
    """

    def __init__(self, project: str, identity: str, folder: Path) -> None:
        self.project, self.identity, self.folder = project, identity, folder
        self._run: Any = None

    def on_start(self, trainer: Trainer) -> None:
        """Open the run. Raises EnvironmentProblem when the package is missing."""
        if not trainer.ctx.is_main:
            return
        try:
            import wandb
        except ImportError as error:
            raise EnvironmentProblem(
                expected=f"the wandb package, because watch.wandb names the project {self.project!r}", found=str(error),
                fix="pip install wandb, or remove watch.wandb (metrics.jsonl is written anyway)",
            ) from error
        self.folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=self.project, name=trainer.name, id=self.identity, resume="allow", dir=str(self.folder), config=trainer.config.plain(),
        )

    def on_step(self, trainer: Trainer) -> None:
        """Send the record's numbers. A step the server has already is dropped there, so none is doubled."""
        if self._run is not None and trainer.record:
            self._run.log(scalars(json_record(trainer.record)), step=trainer.record["step"])

    def on_close(self, trainer: Trainer) -> None:
        """Finish the run."""
        if self._run is not None:
            self._run.finish()
            self._run = None
