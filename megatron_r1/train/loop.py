"""The training loop: one for pre-training, distillation and fine-tuning, on one process or many.

A step is a pure function of (weights, optimizer state, step number): the samples, the learning rate and every draw derive
from the step number, so a run that is killed and resumed ends in the same bytes. The loss of a step is the sum over all
target tokens of the global batch divided by their number, and so is its gradient: a micro-batch or a rank with fewer
targets (packed conversations, document boundaries) weighs less, not the same, and every layout computes the same thing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_r1.parallel import checkpoint
from megatron_r1.parallel.context import ParallelContext
from megatron_r1.parallel.device import HostCopies
from megatron_r1.parallel.optimizer import set_lr
from megatron_r1.parallel.optimizer import step as apply_update
from megatron_r1.parallel.schedule import forward_backward
from megatron_r1.train.callbacks.base import Callback
from megatron_r1.train.callbacks.checkpoint import Checkpoints
from megatron_r1.train.config import TrainConfig
from megatron_r1.train.feed import Feed, TrainingData
from megatron_r1.train.guard import Guard
from megatron_r1.train.lr import learning_rate, warmup_steps
from megatron_r1.train.objectives import Objective
from megatron_r1.train.resume import EXIT_TERMINATED, StopSignal, stop_on_sigterm
from megatron_r1.utils.errors import CheckpointError
from megatron_r1.utils.logging import Bar, get_logger, progress

log = get_logger("train")


@dataclass
class StepOutcome:
    """One step, in numbers that are equal on every rank. `targets`: tokens counted in the loss; `seconds`: this step's."""

    loss: float
    grad_norm: float
    lr: float
    targets: int
    applied: bool
    seconds: float


@dataclass
class Window:
    """Sums since the last metrics record. Saved with the checkpoint, so that a resumed run logs the same means."""

    loss: float = 0.0
    targets: float = 0.0
    steps: int = 0
    seconds: float = 0.0
    sources: dict[str, list[float]] = field(default_factory=dict)


class Trainer:
    """Runs the steps of one phase and calls the callbacks.

    Attributes callbacks use: config, ctx, folder (the workspace), chunks, optimizer, data, total (steps of the phase), step
    (steps done), resumed (a checkpoint of this phase was loaded), last (StepOutcome), window, record, bar, seconds.
    """

    def __init__(
        self, config: TrainConfig, ctx: ParallelContext, folder: Path, chunks: Sequence[nn.Module], optimizer: Any, objective: Objective,
        data: TrainingData, total: int, callbacks: Sequence[Callback], name: str = "train",
    ) -> None:
        self.name = name
        self.config, self.ctx, self.folder, self.total = config, ctx, folder, total
        self.chunks, self.optimizer, self.objective, self.data = chunks, optimizer, objective, data
        self.callbacks = list(callbacks)
        self.feed = Feed(data.dataset, config, ctx.data_rank, ctx.data_size, total, ctx.device)
        self.warmup = warmup_steps(config, total)
        self.guard = Guard(config.guard.max_bad_steps)
        self.step, self.seconds, self.resumed = 0, 0.0, False
        self.window, self.record = Window(), dict[str, Any]()
        self.last = StepOutcome(float("nan"), float("nan"), 0.0, 0, False, 0.0)
        self.bar: Bar

    # ---------------------------------------------------------------- state

    @property
    def tokens(self) -> int:
        """Tokens of this phase consumed so far (padding included)."""
        return self.step * int(self.config.global_batch)

    def save(self, path: Path, copies: HostCopies | None) -> checkpoint.PendingSave:
        """Begin to write a checkpoint from which this phase goes on bit for bit; in the background with `copies`. Collective."""
        common = {
            "step": self.step, "tokens": self.tokens, "total": self.total, "seconds": self.seconds, "guard": self.guard.state(), "window": asdict(self.window),
            "objective": self.objective.state(), "order": self.data.fingerprint,
        }
        return checkpoint.begin_save(path, self.chunks, self.optimizer, common, self.ctx, copies)

    def load(self, path: Path) -> None:
        """Take up a checkpoint of this phase. Collective. Raises CheckpointError, also when the samples would come in another order."""
        common = checkpoint.load(path, self.chunks, self.optimizer, self.ctx)
        if common.get("order") != self.data.fingerprint:
            raise CheckpointError(
                expected=f"the order of samples {self.data.fingerprint}, which shards, mixture and seed give", found=f"{common.get('order')} in {path}",
                fix="go on with the shards and the version that the checkpoint was written with, or delete the step's folder and run it anew",
            )
        self.step, self.seconds, self.resumed = int(common["step"]), float(common["seconds"]), True
        self.guard.load(**common["guard"])
        self.window = Window(**common["window"])
        if common.get("objective"):
            self.objective.load(common["objective"])

    def ledger_record(self) -> dict[str, Any]:
        """What the step just done was trained on: sample numbers (inclusive) and blocks per source."""
        per_step = self.config.sequences_per_step
        first, end = (self.step - 1) * per_step, self.step * per_step
        record: dict[str, Any] = {"step": self.step, "first": first, "last": end - 1, "applied": self.last.applied}
        before, after = self.data.order.counts(first), self.data.order.counts(end)
        record["sources"] = {name: after[name] - before[name] for name in after if after[name] > before[name]}
        return record

    # ---------------------------------------------------------------- running

    def train(self) -> None:
        """Run to the last step. SystemExit(EXIT_TERMINATED) after SIGTERM, with a checkpoint of the last finished step."""
        with stop_on_sigterm() as stop, progress(self.name, (self.total - self.step) * int(self.config.global_batch), enabled=self.ctx.is_main) as bar:
            self.bar = bar
            try:
                for callback in self.callbacks:
                    callback.on_start(self)
                if self.step == 0:
                    self._call_back()
                while self.step < self.total:
                    stopping = self._one_step(stop)
                    self._call_back()
                    if stopping and self.step < self.total:
                        self._stop()
            finally:
                self.feed.close()
                for callback in self.callbacks:
                    callback.on_close(self)

    def _call_back(self) -> None:
        self.record = {}
        for callback in self.callbacks:
            callback.on_step(self)

    def _stop(self) -> None:
        for callback in self.callbacks:
            if isinstance(callback, Checkpoints):
                callback.save(self)
                callback.settle(self)
        log.warning("stopped after step %d as asked; the same command goes on from there", self.step)
        raise SystemExit(EXIT_TERMINATED)

    def _one_step(self, stop: StopSignal) -> bool:
        """Forward, backward, update. Returns whether any rank was asked to stop."""
        began = time.perf_counter()
        lr = learning_rate(self.step, self.total, self.warmup, self.config.lr)
        batches = self.feed.step(self.step)
        reports = forward_backward(
            self.ctx, self.chunks, self.objective.forward_step, iter(batches), self.feed.num_microbatches, int(self.config.seq_length), int(self.config.micro_batch),
        )
        sums = self._reduce(reports, stop.requested)
        loss = sums["loss_sum"] / max(sums["num_tokens"], 1.0)
        grad_norm, applied = self._update(loss, lr)
        if applied:
            self.objective.update(sums["reports"])
        self.step += 1
        seconds = time.perf_counter() - began
        self.seconds += seconds
        self.last = StepOutcome(loss, grad_norm, lr, int(sums["num_tokens"]), applied, seconds)
        self._accumulate(sums)
        return bool(sums["stop"])

    def _update(self, loss: float, lr: float) -> tuple[float, bool]:
        """Clip and step, unless loss or gradient norm is not finite (both are global, so every rank decides alike)."""
        set_lr(self.optimizer, lr)
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        applied = self.guard.accept(self.step + 1, loss, norm)
        if applied:
            apply_update(self.optimizer)
        else:
            self.optimizer.zero_grad()
        return norm, applied

    def _reduce(self, reports: Sequence[dict[str, torch.Tensor]], stop: bool) -> dict[str, Any]:
        """Sums over micro-batches and ranks, on every rank. One small all-reduce per step."""
        scalars, by_source = ("loss_sum", "num_tokens"), self.objective.reports
        count = len(self.data.sources)
        sums = torch.zeros(len(scalars) + len(by_source) * count + 1, dtype=torch.float64, device=self.ctx.device)
        if self.ctx.tensor_rank == 0:
            for report in reports:
                first = torch.stack([report[name].to(sums) for name in scalars])
                sums[:-1] += torch.cat([first, *(report[name].to(sums) for name in by_source)])
        sums[-1] = float(stop)
        self.ctx.all_reduce_sum(sums, over="world")
        values = sums.tolist()
        starts = range(len(scalars), len(values) - 1, count)
        found = {name: values[start : start + count] for name, start in zip(by_source, starts)}
        losses, tokens = found["source_loss"], found["source_tokens"]
        return {
            **dict(zip(scalars, values)), "reports": found, "stop": values[-1] > 0,
            "sources": {name: [loss, n] for name, loss, n in zip(self.data.sources, losses, tokens) if n},
        }

    def _accumulate(self, sums: dict[str, Any]) -> None:
        window = self.window
        window.steps += 1
        window.seconds += self.last.seconds
        if not self.last.applied:
            return
        window.loss += sums["loss_sum"]
        window.targets += sums["num_tokens"]
        for name, (loss, count) in sums["sources"].items():
            total = window.sources.setdefault(name, [0.0, 0.0])
            total[0], total[1] = total[0] + loss, total[1] + count
