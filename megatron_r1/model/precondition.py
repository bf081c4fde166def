"""Linear preconditioners of the probe gradient: applied once to G, they cost nothing per document."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_r1.utils.errors import CheckpointError

Direction = dict[str, Tensor]
"""A gradient, or what was made of one: parameter name -> its part in this process."""


class Preconditioner(ABC):
    """A fixed linear map P on gradients, symmetric and positive: <G, P G> > 0."""

    @abstractmethod
    def several(self, gradients: Sequence[Mapping[str, Tensor]]) -> list[Direction]:
        """P of each gradient. At once, because some read documents for it."""

    def __call__(self, gradient: Mapping[str, Tensor]) -> Direction:
        """P G."""
        return self.several([gradient])[0]


class Identity(Preconditioner):
    """P = 1: what a step of plain gradient descent does (TracIn's direction)."""

    def several(self, gradients: Sequence[Mapping[str, Tensor]]) -> list[Direction]:
        """The gradients themselves, copied."""
        return [{name: part.clone() for name, part in gradient.items()} for gradient in gradients]


class Adam(Preconditioner):
    """P = diag 1/(sqrt(v / (1 - beta2^step)) + eps) with the trainer's own second moment: what its AdamW step does.

    Weight decay does not depend on the document and momentum adds a constant, so neither changes a ranking
    (LESS, arXiv 2402.04333, section 3; the (1-beta2) g^2 of the document itself is left out, being not linear in g).
    """

    def __init__(self, second_moment: Mapping[str, Tensor], step: int, beta2: float, eps: float) -> None:
        """Raises CheckpointError when the moment is not one of a run that took steps."""
        if step < 1 or not 0 <= beta2 < 1 or not eps > 0:
            raise CheckpointError(
                expected="an optimizer state with step >= 1, 0 <= beta2 < 1 and eps > 0",
                found=f"step {step}, beta2 {beta2}, eps {eps}",
                fix="score a checkpoint that was trained with Adam, or set preconditioner: none",
            )
        for name, moment in second_moment.items():
            if not bool(torch.isfinite(moment).all()) or bool((moment < 0).any()):
                raise CheckpointError(
                    expected=f"finite second moments >= 0 for {name}",
                    found="negative or not-a-number entries",
                    fix="the optimizer state is damaged: verify the checkpoint, or set preconditioner: none",
                )
        correction = 1.0 - beta2**step
        self.scale = {
            name: 1.0 / ((moment.float() / correction).sqrt() + eps) for name, moment in second_moment.items()
        }

    def several(self, gradients: Sequence[Mapping[str, Tensor]]) -> list[Direction]:
        """P of each. Raises CheckpointError when a parameter has no second moment."""
        return [self._apply(gradient) for gradient in gradients]

    def _apply(self, gradient: Mapping[str, Tensor]) -> Direction:
        absent = [name for name in gradient if name not in self.scale or self.scale[name].shape != gradient[name].shape]
        if absent:
            raise CheckpointError(
                expected="a second moment of the right shape for every parameter",
                found=f"none for {len(absent)}, such as {absent[0]}",
                fix="score a checkpoint saved with its optimizer, or set preconditioner: none",
            )
        return {name: part * self.scale[name].to(part.device) for name, part in gradient.items()}
