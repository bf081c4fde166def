"""What to do when a loss or a gradient is not finite: skip the update on every rank alike, write it down, give up in time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from megatron_r1.utils.errors import DataError
from megatron_r1.utils.logging import get_logger

log = get_logger("train.guard")


@dataclass
class Guard:
    """Counts skipped updates. Its inputs must already be global (reduced over ranks), so every rank decides the same.

    State (`skipped`, `in_a_row`) is saved with the checkpoint: a resumed run gives up where the first would have.
    """

    max_bad_steps: int
    skipped: list[int] = field(default_factory=list)
    in_a_row: int = 0

    def accept(self, step: int, loss: float, grad_norm: float) -> bool:
        """True when the update of `step` (1-based) may be made. Raises DataError after max_bad_steps refusals in a row."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.in_a_row = 0
            return True
        self.skipped.append(step)
        self.in_a_row += 1
        log.warning("step %d: loss %s, gradient norm %s: update skipped (%d in a row, %d in all)", step, loss, grad_norm, self.in_a_row, len(self.skipped))
        if self.in_a_row >= self.max_bad_steps:
            raise DataError(
                expected=f"finite losses and gradients (up to {self.max_bad_steps - 1} exceptions in a row)",
                found=f"{self.in_a_row} in a row, the last at step {step} (loss {loss}, gradient norm {grad_norm})",
                fix="lower lr.peak or lengthen lr.warmup, or use precision fp32 to see whether it is the number format; the samples of these steps "
                "are in ledger.jsonl; the last checkpoint is kept, so a run with other settings can start from it",
            )
        return False

    def state(self) -> dict[str, object]:
        """JSON-able state."""
        return {"skipped": list(self.skipped), "in_a_row": self.in_a_row}

    def load(self, skipped: Iterable[int], in_a_row: int) -> None:
        """Take up the state of a checkpoint."""
        self.skipped, self.in_a_row = [int(step) for step in skipped], int(in_a_row)
