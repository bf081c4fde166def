"""The training loop: one for pre-training, distillation, fine-tuning and training on rewards, on one process or many.

A step is a pure function of (weights, optimizer state, step number): the samples, the learning rate and every draw derive
from the step number, so a run that is killed and resumed ends in the same bytes. The one exception is written down first: when losses or gradients go wrong (train/guard.py),
the run goes back to a checkpoint and leaves some steps out, which keep their numbers and samples. The loss of a step is the sum over all
target tokens of the global batch divided by their number, and so is its gradient: a micro-batch or a rank with fewer
targets (packed conversations, document boundaries) weighs less, not the same, and every layout computes the same thing.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_r1.artifacts.checkpoint import JOURNAL_FILE, checkpoint_folders
from megatron_r1.data.schedule import ScheduledOrder
from megatron_r1.parallel import checkpoint
from megatron_r1.parallel.context import ParallelContext
from megatron_r1.parallel.device import HostCopies, Mark
from megatron_r1.parallel.optimizer import set_lr
from megatron_r1.parallel.optimizer import step as apply_update
from megatron_r1.parallel.schedule import forward_backward
from megatron_r1.train.callbacks.base import Callback
from megatron_r1.train.callbacks.checkpoint import Checkpoints
from megatron_r1.train.config import TrainConfig
from megatron_r1.train.feed import Feed, TrainingData
from megatron_r1.train.guard import Decision, Guard, cut_back, give_up, rollbacks, spans, write_down
from megatron_r1.train.ledger import documents_of_step
from megatron_r1.train.lr import learning_rate, warmup_steps
from megatron_r1.train.objectives import Objective
from megatron_r1.train.resume import newest_complete
from megatron_r1.train.stop import StopSignal, stop_on_request
from megatron_r1.utils.errors import REQUEUE_EXIT_CODE, CheckpointError
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
    (steps done), resumed (a checkpoint of this phase was loaded), last (StepOutcome), window, record, bar, seconds, phase (what this rank
    is doing, in a word or two), own (marks around this rank's own part of each step since somebody last looked).
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
        self.guard = Guard(config.guard)
        pieces = data.order.pieces if isinstance(data.order, ScheduledOrder) else []
        # Other shares, another loss: no spike.
        self._new_shares = {-(-first // config.sequences_per_step) for first, _ in pieces}
        self.step, self.seconds, self.resumed = 0, 0.0, False
        self.window, self.record = Window(), dict[str, Any]()
        self.last = StepOutcome(float("nan"), float("nan"), 0.0, 0, False, 0.0)
        self.phase = "start"
        self.own: list[tuple[Mark, Mark]] = []
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
        """Take up a checkpoint of this phase that `newest_complete` has verified. Collective. Raises CheckpointError, also when the samples would come in
        another order."""
        common = checkpoint.load(path, self.chunks, self.optimizer, self.ctx, verified=True)
        if common.get("order") != self.data.fingerprint:
            raise CheckpointError(
                expected=f"the order of samples {self.data.fingerprint}, which shards, mixture and seed give", found=f"{common.get('order')} in {path}",
                fix="go on with the shards and the version that the checkpoint was written with, or delete the step's folder and run it anew",
            )
        self.step, self.seconds, self.resumed = int(common["step"]), float(common["seconds"]), True
        self.guard.load(common["guard"])
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
        """Run to the last step. SystemExit(REQUEUE_EXIT_CODE) after SIGTERM, SIGUSR1 or time_limit, with a checkpoint of the last finished step."""
        limit = self.config.time_limit
        left = (self.total - self.step) * int(self.config.global_batch)
        with stop_on_request(limit) as stop, progress(self.name, left, enabled=self.ctx.is_main) as bar:
            self.bar = bar
            if self.step < self.total and self._any(stop.requested):
                self._exit()
            try:
                self._start()
                if self.step == 0:
                    self._call_back()
                while self.step < self.total:
                    before = self.step
                    stopping = self._one_step(stop)
                    if self.step > before:  # a rollback ends at a step that has had its callbacks
                        self._call_back()
                    if stopping and self.step < self.total:
                        self._stop()
            finally:
                self.feed.close()
                for callback in self.callbacks:
                    callback.on_close(self)

    def _start(self) -> None:
        """Begin at the present step: also after a rollback, which is a resumption without a new process."""
        journal = self.folder / JOURNAL_FILE
        told = rollbacks(journal) if self.ctx.is_main else None
        if self.ctx.is_main:
            cut_back(journal, self.step)
            journal.touch()
        self.guard.passed = spans(self.ctx.broadcast_object(told))
        for callback in self.callbacks:
            callback.on_start(self)

    def _call_back(self) -> None:
        self.record = {}
        for callback in self.callbacks:
            self.phase = type(callback).__name__
            callback.on_step(self)

    def _stop(self) -> None:
        for saver in self._savers():
            saver.save(self)
            saver.settle(self)
        self._exit()

    def _savers(self) -> list[Checkpoints]:
        return [callback for callback in self.callbacks if isinstance(callback, Checkpoints)]

    def _exit(self) -> None:
        log.warning("stopped after step %d as asked; the same command goes on from there", self.step)
        raise SystemExit(REQUEUE_EXIT_CODE)

    def _any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank. Collective."""
        return bool(self.ctx.all_reduce_max(torch.tensor(float(flag), device=self.ctx.device), over="world"))

    def _one_step(self, stop: StopSignal) -> bool:
        """Forward, backward, update. Returns whether any rank was asked to stop."""
        began = time.perf_counter()
        lr = learning_rate(self.step, self.total, self.warmup, self.config.lr) * self.guard.lr_factor(self.step + 1)
        if self.step in self._new_shares:  # also where the step itself is left out
            self.guard.forget()
        if self.guard.leaves_out(self.step + 1):
            self.step += 1
            self.guard.skipped.append(self.step)
            self.last = StepOutcome(float("nan"), float("nan"), lr, 0, False, 0.0)
            return self._any(stop.requested)
        self.phase = "data"
        batches = self.feed.step(self.step)
        self.phase = "preparation"
        batches = self.objective.prepare(self.chunks, batches, self.step)
        self.phase = "forward and backward"
        mark = Mark(self.ctx.device)
        reports = forward_backward(
            self.ctx, self.chunks, self.objective.forward_step, iter(batches), self.feed.num_microbatches, int(self.config.seq_length), int(self.config.micro_batch),
            before_gather=lambda: self.own.append((mark, Mark(self.ctx.device))),
        )
        self.phase = "sum of losses"
        sums = self._reduce(reports, stop.requested)
        loss = sums["loss_sum"] / max(sums["num_tokens"], 1.0)
        self.phase = "update"
        grad_norm, decision = self._update(loss, lr)
        if decision.action == "rollback":
            self._roll_back(decision)
            return bool(sums["stop"])
        applied = decision.action == "accept"
        if applied:
            self.objective.update(sums["reports"])
        self.step += 1
        seconds = time.perf_counter() - began
        self.seconds += seconds
        self.last = StepOutcome(loss, grad_norm, lr, int(sums["num_tokens"]), applied, seconds)
        self._accumulate(sums)
        return bool(sums["stop"])

    def _update(self, loss: float, lr: float) -> tuple[float, Decision]:
        """Clip and step, unless the guard objects on any rank. Collective."""
        set_lr(self.optimizer, lr)
        self.optimizer.prepare_grads()
        loss, norm = self._agree(loss, float(self.optimizer.get_grad_norm()))
        decision = self.guard.decide(self.step + 1, loss, norm)
        if decision.action == "rollback":
            decision = self._can_go_back(decision, loss, norm)
        if decision.reason:
            self._write_down(decision, loss, norm)
        if decision.action == "accept":
            apply_update(self.optimizer)
        else:
            self.optimizer.zero_grad()
        return norm, decision

    def _agree(self, *values: float) -> list[float]:
        """The same numbers on every rank: not a number if they are not on any, else infinite if they are on any, else the largest."""
        ranks = [2.0 if math.isnan(value) else 1.0 if math.isinf(value) else 0.0 for value in values]
        found = torch.tensor([*ranks, *(value if math.isfinite(value) else 0.0 for value in values)], dtype=torch.float64, device=self.ctx.device)
        both = self.ctx.all_reduce_max(found, over="world").tolist()
        return [{0.0: value, 1.0: float("inf"), 2.0: float("nan")}[kind] for kind, value in zip(both, both[len(values) :])]

    # ---------------------------------------------------------------- going back

    def _can_go_back(self, decision: Decision, loss: float, norm: float) -> Decision:
        """The decision, or what is done where there is no way back. Raises DataError at the end of the ladder."""
        step, limit = self.step + 1, self.config.guard.rollbacks
        if len(self.guard.passed) >= limit:
            raise give_up(step, decision.reason, f"the run went back {limit} times already (guard.rollbacks)")
        for saver in self._savers():  # what is being written may be what to go back to, or has to go
            saver.settle(self)
        have = any(saved < self.guard.first for saved, _ in checkpoint_folders(self.folder)) if self.ctx.is_main else None
        if self.ctx.broadcast_object(have):
            return decision
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise give_up(step, decision.reason, f"{self.guard.bad} bad steps since step {self.guard.first}, and no checkpoint before them to go back to")
        self.guard.forget()
        return Decision("accept", f"{decision.reason}, but there is no checkpoint before step {step} to go back to: taken for the new usual")

    def _roll_back(self, decision: Decision) -> None:
        """Continue from the newest checkpoint before the incident, without the steps concerned. Collective.

        The decision is on disk before anything else happens but the removal of checkpoints newer than that one, which the same steps would
        lead to again: a process killed in between decides the same once more.
        """
        self.phase = "rollback"
        for callback in self.callbacks:
            callback.on_close(self)
        gone = self.tokens
        path = newest_complete(self.folder, self.ctx)
        if path is None:  # _can_go_back saw one
            raise CheckpointError(
                expected=f"a checkpoint to go back to in {self.folder}", found="none any more", fix="nothing else may touch the folder of a running step; run the same command again",
            )
        self.own.clear()
        self.load(path)
        log.warning("step %d again, without the steps %s", self.step, ", ".join(f"{first} to {last}" for first, last in [*self.guard.passed]))
        for saver in self._savers():
            saver.newest = self.step
        self._start()
        self.bar.advance(self.tokens - gone)

    def _write_down(self, decision: Decision, loss: float, norm: float) -> None:
        """Say what was decided, and put it into journal.jsonl with the samples and documents concerned. Collective for a rollback."""
        step, guard, per_step = self.step + 1, self.guard, self.config.sequences_per_step
        record: dict[str, Any] = {
            "step": step, "attempt": len(guard.passed), "decision": decision.action, "reason": decision.reason, "loss": _or_none(loss), "grad_norm": _or_none(norm),
        }
        first, last = step, step
        if decision.action == "rollback":
            saved = [number for number, _ in checkpoint_folders(self.folder) if number < guard.first]
            to = self.ctx.broadcast_object(saved[-1] if saved else 0)
            first = max(to + 1, guard.first - int(self.config.guard.skip_before))
            record |= {"to": to, "passed": [first, last]}
            guard.passed = [*guard.passed, (first, last)]
            if self.ctx.is_main:
                for number, path in checkpoint_folders(self.folder):
                    if number > to:
                        shutil.rmtree(path)
            self.ctx.barrier()
        if decision.action == "hold":
            record["hold_until"] = guard.hold_until
        record |= {"first": (first - 1) * per_step, "last": last * per_step - 1}
        log.warning("step %d: %s: %s (samples %d to %d)", step, decision.reason, decision.action, record["first"], record["last"])
        if not self.ctx.is_main:
            return
        if self.data.continued and decision.action != "rollback":
            record["documents"] = [list(reading) for reading in documents_of_step(self.data, per_step, step - 1)]
        write_down(self.folder / JOURNAL_FILE, record)

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


def _or_none(value: float) -> float | None:
    """JSON has no numbers that are not finite."""
    return value if math.isfinite(value) else None
