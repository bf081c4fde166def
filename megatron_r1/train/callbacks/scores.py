"""Scores of documents while training: takes them from every step, writes them down, and renews the directions."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megatron_r1.artifacts import training_scores as files
from megatron_r1.artifacts.checkpoint import checkpoint_folder, truncate_journal
from megatron_r1.ops.low_rank import Factors
from megatron_r1.parallel.optimizer import adam_step
from megatron_r1.train.callbacks.base import Callback
from megatron_r1.train.config import ScoresConfig
from megatron_r1.train.heldout import Rows
from megatron_r1.train.probe_directions import Directions, take_directions
from megatron_r1.train.scores import ScoredNextToken
from megatron_r1.utils import io
from megatron_r1.utils.logging import get_logger

if TYPE_CHECKING:
    from megatron_r1.train.loop import Trainer

log = get_logger("train.scores")


class Scores(Callback):
    """Every step's rows go to this model copy's file; every so often `trainer.record["scores"]` = {source: {capability: mean score per
    token since the last record of them}} and new directions are taken.

    A resumed run cuts its file back to the checkpoint's step and takes up the directions that were kept with the checkpoint, so that
    the files end in the same bytes. The first `adam` directions need a second moment: with fresh moments there is nothing to score
    along before the first renewal.
    """

    def __init__(self, config: ScoresConfig, objective: ScoredNextToken, probe: Mapping[str, Rows], sources: list[str], scratch: Path) -> None:
        self.config, self.objective, self.probe, self.scratch = config, objective, dict(probe), scratch / "directions"
        self.sources = sources
        self.probe_step = -1
        self._listening = ExitStack()

    @property
    def tokens(self) -> int:
        """Tokens of one renewal, padding included."""
        return sum(int(rows.batch["tokens"].size) for rows in self.probe.values())

    def on_start(self, trainer: Trainer) -> None:
        """Cut the files back, take up the directions, listen."""
        self.path = files.part_file(trainer.folder, trainer.ctx.data_rank)
        if self.objective.engine.aimed:  # a rollback: what the step that went wrong left to hear, and directions of a time that is no more
            self.objective.take(trainer.step, self.probe_step)
            self._aim(Directions(), -1)
        if trainer.ctx.is_main:
            self._prepare(trainer)
        trainer.ctx.barrier()
        if trainer.resumed:
            self._take_up(trainer)
        self._listening.enter_context(self.objective.engine.attached())

    def on_step(self, trainer: Trainer) -> None:
        """Write the step's rows; say and renew when due."""
        if trainer.step and self.objective.engine.aimed:
            rows = self.objective.take(trainer.step, self.probe_step)
            if trainer.ctx.leads_copy:
                files.append(self.path, rows)
        interval = trainer.config.in_steps(self.config.every, trainer.total) or trainer.total
        if trainer.step % interval and trainer.step != trainer.total:
            return
        if trainer.step and self.objective.engine.aimed:
            trainer.record["scores"] = self._means(trainer)
        if trainer.step < trainer.total and (self.config.preconditioner == "none" or adam_step(trainer.optimizer)):
            self._renew(trainer)

    def on_save(self, trainer: Trainer) -> None:
        """Keep the directions in use with the checkpoint, and forget those of checkpoints that are gone."""
        if trainer.ctx.leads_copy:
            files.sync(self.path)
        if trainer.ctx.data_rank == 0 and trainer.step < trainer.total and self.objective.engine.aimed:
            path = self._kept(trainer, trainer.step)
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = {name: (line.left, line.right, line.probes) if isinstance(line, Factors) else line for name, line in self.directions.lines.items()}
            torch.save({"step": self.probe_step, "lines": lines}, path)
            files.sync(path)
        if trainer.ctx.is_main and self.scratch.is_dir():
            for folder in self.scratch.iterdir():
                if int(folder.name) != trainer.step and not checkpoint_folder(trainer.folder, int(folder.name)).is_dir():
                    shutil.rmtree(folder)

    def on_close(self, trainer: Trainer) -> None:
        """Stop listening."""
        self._listening.close()

    def _prepare(self, trainer: Trainer) -> None:
        root, probes = trainer.folder, trainer.folder / files.SCORES_FOLDER / files.PROBES_FILE
        if not trainer.resumed:
            shutil.rmtree(root / files.SCORES_FOLDER, ignore_errors=True)
        layout = files.ScoresLayout(
            capabilities=list(self.probe), sources=self.sources, documents={name: len(rows.places) for name, rows in self.probe.items()}, rank=self.config.rank,
            preconditioner=self.config.preconditioner, every=trainer.config.in_steps(self.config.every, trainer.total) or trainer.total,
        )
        io.atomic_write_json(root / files.SCORES_FOLDER / files.LAYOUT_FILE, layout.plain())
        truncate_journal(probes, trainer.step)
        probes.touch()
        for path in files.parts(root):
            files.truncate(path, self.objective.kind, trainer.step)

    def _kept(self, trainer: Trainer, step: int) -> Path:
        return self.scratch / str(step) / f"tensor-{trainer.ctx.tensor_rank}-pipeline-{trainer.ctx.pipeline_rank}.pt"

    def _take_up(self, trainer: Trainer) -> None:
        """The directions in use when the checkpoint was saved."""
        path = self._kept(trainer, trainer.step)
        if path.is_file():
            kept: dict[str, Any] = torch.load(path, map_location=trainer.ctx.device, weights_only=True)
            self._aim(Directions({name: Factors(*line) if isinstance(line, tuple) else line for name, line in kept["lines"].items()}), kept["step"])
        elif trainer.step < trainer.total:
            log.info("scores: no directions were in use at step %d; the next ones are taken when due", trainer.step)

    def _renew(self, trainer: Trainer) -> None:
        # The old ones are let go first: they may be as large as the weights.
        self._aim(Directions(), trainer.step)
        config = trainer.config
        found = take_directions(trainer.ctx, trainer.chunks, trainer.optimizer, config.optimizer, self.probe, int(config.micro_batch), self.config)
        self._aim(found, trainer.step)
        if not found.lines:
            log.warning("scores: a probe gradient at step %d is zero or not a number (%s): documents go without scores until the next one", trainer.step, found.notes)
        elif self.config.rank is not None:
            shares = ", ".join(f"{name} {100 * note['error']:.1f} % (of one matrix up to {100 * note['largest']:.1f} %)" for name, note in found.notes.items())
            log.info("scores: step %d: rank %d leaves out of the directions' norm: %s", trainer.step, self.config.rank, shares)
        if trainer.ctx.is_main and found.lines:
            io.append_jsonl(trainer.folder / files.SCORES_FOLDER / files.PROBES_FILE, {"step": trainer.step, "capabilities": found.notes})

    def _aim(self, directions: Directions, step: int) -> None:
        self.directions, self.probe_step = directions, step
        self.objective.engine.aim(directions.lines, len(self.probe))

    def _means(self, trainer: Trainer) -> dict[str, dict[str, float]]:
        """Mean score per token of the rows along the present directions: what is on disk is the state, so a resumed run says the same."""
        sums = files.Sums(len(self.sources), len(self.probe))
        if trainer.ctx.leads_copy:
            rows = files.open_part(self.path, self.objective.kind)
            sums.add(np.array(rows[np.searchsorted(rows["step"], self.probe_step, side="right") :]))
        mine = torch.from_numpy(np.column_stack([sums.tokens, sums.s]))
        totals = trainer.ctx.all_reduce_sum(mine.to(trainer.ctx.device), over="world").tolist()
        return {source: dict(zip(self.probe, (value / n for value in values))) for source, (n, *values) in zip(self.sources, totals) if n}
