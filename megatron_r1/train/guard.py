"""When a loss or a gradient is not a number, or leaps: skip the update, hold the learning rate down, go back and leave the data out.

The guard decides from numbers that are equal on every rank and from its own state, which is saved with every checkpoint: so all ranks decide
alike, and a resumed run decides as the first would have. What it decided, and about which samples, is in journal.jsonl.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_r1.train.config import GuardConfig
from megatron_r1.utils import io
from megatron_r1.utils.errors import DataError
from megatron_r1.utils.logging import get_logger

log = get_logger("train.guard")
Action = Literal["accept", "skip", "hold", "rollback"]
# The least that counts as one standard deviation: of a loss in nats, of the logarithm of a gradient norm. A run whose losses
# are nearly constant would otherwise take any ripple for a spike.
LEAST_LOSS, LEAST_NORM = 0.05, 0.2


@dataclass(frozen=True)
class Decision:
    """What is done about a step (1-based) and why; `reason` is empty for an accepted one."""

    action: Action
    reason: str = ""


@dataclass
class Guard:
    """The ladder: `skip` bad steps of an incident are skipped, at the next `hold` ones the learning rate is held down as well, then the run
    goes back. `recovery` good steps in a row end an incident.

    `passed`: (first, last) steps left out by rollbacks. They come from journal.jsonl, not from a checkpoint, which is older than the decision.
    """

    config: GuardConfig
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    first: int = 0
    bad: int = 0
    good: int = 0
    hold_until: int = 0
    passed: list[tuple[int, int]] = field(default_factory=list)

    def decide(self, step: int, loss: float, grad_norm: float) -> Decision:
        """What to do about `step`. Its numbers must be global: equal on every rank."""
        reason = self._wrong(loss, grad_norm)
        if not reason:
            self._usual(loss, grad_norm)
            if self.bad:
                self.good += 1
                if self.good >= self.config.recovery:
                    self.end_incident()
            return Decision("accept")
        self.first, self.bad, self.good = self.first or step, self.bad + 1, 0
        if self.bad > self.config.skip + self.config.hold:
            return Decision("rollback", reason)
        self.skipped.append(step)
        if self.bad <= self.config.skip:
            return Decision("skip", reason)
        self.hold_until = step + int(self.config.hold_steps)
        return Decision("hold", reason)

    def lr_factor(self, step: int) -> float:
        """What the scheduled learning rate of `step` (1-based) is multiplied by."""
        return self.config.hold_factor if step <= self.hold_until else 1.0

    def leaves_out(self, step: int) -> bool:
        """Whether a rollback left `step` out."""
        return any(first <= step <= last for first, last in self.passed)

    def forget(self) -> None:
        """Take what comes for the new usual: after a change of the data, or when there is nothing to go back to."""
        self.losses, self.norms = [], []
        self.end_incident()

    def end_incident(self) -> None:
        """The next bad step is a first one."""
        self.first = self.bad = self.good = 0

    def _usual(self, loss: float, grad_norm: float) -> None:
        window = self.config.window
        self.losses = [*self.losses, loss][-window:]
        if grad_norm > 0:  # no gradient at all, as when answers all earn the same, says nothing about the size of one
            self.norms = [*self.norms, grad_norm][-window:]

    def _wrong(self, loss: float, grad_norm: float) -> str:
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                return f"{name} {value}"
        sigmas, enough = self.config.spike, max(2, self.config.window // 4)
        if sigmas is None:
            return ""
        if len(self.losses) >= enough and loss > (limit := _limit(self.losses, sigmas, LEAST_LOSS)):
            return f"loss {loss:.4g} above {limit:.4g}"
        if len(self.norms) >= enough and grad_norm > 0 and math.log(grad_norm) > (limit := _limit([math.log(norm) for norm in self.norms], sigmas, LEAST_NORM)):
            return f"gradient norm {grad_norm:.4g} above {math.exp(limit):.4g}"
        return ""

    def state(self) -> dict[str, Any]:
        """JSON-able state."""
        return {name: getattr(self, name) for name in ("losses", "norms", "skipped", "first", "bad", "good", "hold_until")}

    def load(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint; those of older releases held `skipped` and `in_a_row`."""
        fresh = Guard(self.config).state()
        for name, value in {**fresh, **{key: value for key, value in state.items() if key in fresh}}.items():
            setattr(self, name, value)


def _limit(values: Sequence[float], sigmas: float, least: float) -> float:
    """Median plus `sigmas` standard deviations. The median and the median deviation are not moved by an outlier; the usual deviation is, and
    is used when it is larger: sources that take turns make two humps, of which the smaller one is no spike."""
    middle = statistics.median(values)
    robust = 1.4826 * statistics.median(abs(value - middle) for value in values)
    return middle + sigmas * max(robust, statistics.pstdev(values), least)


# ---------------------------------------------------------------- journal.jsonl


def rollbacks(path: Path) -> list[dict[str, Any]]:
    """The rollbacks a journal tells of, in order."""
    return [record for record in io.read_jsonl(path) if record["decision"] == "rollback"]


def cut_back(path: Path, step: int) -> None:
    """Drop what the present attempt (since the last rollback) decided after `step`: it is decided again. Earlier attempts stay as they were."""
    records = io.read_jsonl(path)
    attempt = sum(record["decision"] == "rollback" for record in records)
    if path.exists():
        io.write_jsonl(path, (record for record in records if record["attempt"] < attempt or record["step"] <= step))


def write_down(path: Path, record: dict[str, Any]) -> None:
    """Append a decision and see it on the disk before it is acted upon."""
    io.append_jsonl(path, record)
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


def give_up(step: int, reason: str, why: str) -> DataError:
    """The error at the end of the ladder."""
    return DataError(
        expected="losses and gradients that are finite and near the usual ones", found=f"step {step}: {reason}; {why}",
        fix="lower lr.peak or lengthen lr.warmup, or use precision fp32 to see whether it is the number format; journal.jsonl names the samples and documents; "
        "set checkpoints.every so that there is something to go back to; guard.spike: null turns the search for spikes off",
    )


def spans(records: Iterable[dict[str, Any]]) -> list[tuple[int, int]]:
    """(first, last) steps that rollbacks left out."""
    return [(int(record["passed"][0]), int(record["passed"][1])) for record in records]
