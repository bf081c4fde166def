"""Central finite differences: s_i = <grad L_i, d> = (L_i(theta + h d) - L_i(theta - h d)) / 2h, two forwards, no hooks.

Works for anything that has a forward: nothing is assumed about layers, ties or parallel layouts. d = P G, so s_i > 0
means that the optimizer's step on document i lowers the probe loss: the sign is that of *benefit* (the minus of the
paper's Eq. 2 is dropped, as its Eqs. 6 and 7 need).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from megatron_r1.influence.probe_gradient import require_full_precision
from megatron_r1.influence.rows import Row, RowBatch, TokenLosses, row_sums
from megatron_r1.influence.space import WHOLE, Space
from megatron_r1.utils.errors import R1Error

BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


class FiniteDifference:
    """Scores rows along directions by moving the weights in place; every move is undone bit for bit."""

    def __init__(self, losses: TokenLosses, parameters: Mapping[str, Tensor], relative_step: float, space: Space = WHOLE) -> None:
        """`parameters` are the model's own tensors (fp32 or fp64, else CheckpointError); a copy of them is kept."""
        require_full_precision(parameters)
        self.losses, self.parameters, self.relative_step, self.space = losses, dict(parameters), relative_step, space
        self._saved = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self.weight_norm = space.norm(self._saved)

    def step(self, direction: Mapping[str, Tensor]) -> float:
        """h such that |h d| = relative_step * |theta|."""
        return self.relative_step * self.weight_norm / self.space.norm(direction)

    @contextmanager
    def moved(self, direction: Mapping[str, Tensor], h: float) -> Iterator[None]:
        """theta + h d inside the block; exactly theta after it, whatever happens inside."""
        try:
            self._move(direction, h)
            yield
        finally:
            self.restore()

    @torch.no_grad()
    def _move(self, direction: Mapping[str, Tensor], h: float) -> None:
        """To theta + h d, from wherever the weights are."""
        for name, parameter in self.parameters.items():
            line = direction[name].to(device=parameter.device, dtype=parameter.dtype)
            torch.add(self._saved[name], line, alpha=h, out=parameter)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the kept copy back."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self._saved[name])

    def verify_restored(self) -> None:
        """Raise unless every weight has the bits it had at the start."""
        for name, parameter in self.parameters.items():
            bits = BITS[parameter.dtype]
            if not torch.equal(parameter.detach().view(bits), self._saved[name].view(bits)):
                raise R1Error(
                    expected=f"{name} restored bit for bit after scoring",
                    found="different bits",
                    fix="report this as a defect of the influence stage",
                )

    @torch.no_grad()
    def row_losses(self, batches: Sequence[RowBatch], advance: Callable[[int], None] = lambda _: None) -> np.ndarray:
        """Summed token loss of every row at the present weights, float64 [rows]."""
        sums = np.zeros(sum(len(batch.positions) for batch in batches))
        for batch in batches:
            losses = self.losses(batch.tensors)
            sums[batch.positions] = row_sums(losses, batch.tensors["loss_mask"]).cpu().numpy()
            advance(batch.padded_tokens)
        return sums

    def scores(
        self,
        direction: Mapping[str, Tensor],
        batches: Sequence[RowBatch],
        h: float | None = None,
        advance: Callable[[int], None] = lambda _: None,
    ) -> np.ndarray:
        """<grad of a row's summed loss, d> for every row, float64 [rows]; positive = benefit."""
        h = self.step(direction) if h is None else h
        with self.moved(direction, h):
            above = self.row_losses(batches, advance)
            self._move(direction, -h)
            below = self.row_losses(batches, advance)
        return (above - below) / (2.0 * h)

    def extrapolated(
        self,
        direction: Mapping[str, Tensor],
        batches: Sequence[RowBatch],
        advance: Callable[[int], None] = lambda _: None,
    ) -> np.ndarray:
        """As `scores`, from two steps, (4 s(h) - s(2h)) / 3: without the error of order h^2 (Richardson)."""
        near, far = self._near_and_far(direction, batches, advance)
        return (4.0 * near - far) / 3.0

    def truncation(
        self,
        direction: Mapping[str, Tensor],
        batches: Sequence[RowBatch],
        advance: Callable[[int], None] = lambda _: None,
    ) -> float:
        """Estimated relative error from curvature.

        s(2h) - s(h) = 3 c h^2 to leading order, so a third of it, relative to s(h).
        """
        near, far = self._near_and_far(direction, batches, advance)
        return float(np.linalg.norm(far - near) / (3.0 * max(np.linalg.norm(near), np.finfo(float).tiny)))

    def _near_and_far(
        self, direction: Mapping[str, Tensor], batches: Sequence[RowBatch], advance: Callable[[int], None]
    ) -> tuple[np.ndarray, np.ndarray]:
        h = self.step(direction)
        return self.scores(direction, batches, h, advance), self.scores(direction, batches, 2 * h, advance)


def sum_by_unit(scores: np.ndarray, rows: Sequence[Row], units: int) -> np.ndarray:
    """Sum row scores [rows] into document scores [units]."""
    return np.bincount([row.unit for row in rows], weights=scores, minlength=units)
