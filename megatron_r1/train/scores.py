"""The next-token objective that is listened to: scores of every document of a step, beside its loss.

Legend: b rows of s tokens, u units (documents, or pieces of them), K capabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from megatron_r1.artifacts.training_scores import row_type
from megatron_r1.model.forward import token_losses
from megatron_r1.model.scores_in_training import ScoresInTraining
from megatron_r1.train.objectives import Arrays, Objective, Tensors


@dataclass(frozen=True)
class Units:
    """The units of a micro-batch, row after row: runs of one segment number. `borders` [u + 1]: first token of each in [b*s], then b*s."""

    borders: np.ndarray
    row: np.ndarray  # [u]
    place: np.ndarray  # [u], from 0 in every row
    tokens: np.ndarray  # [u], targets


def units_of(arrays: Arrays) -> Units:
    """Documents of a row are apart in attention where their segment numbers differ; a row of one number is one unit."""
    segments = np.asarray(arrays["segment_ids"])
    b, s = segments.shape
    begins = np.ones((b, s), bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    first = np.flatnonzero(begins)
    row = first // s
    tokens = np.add.reduceat(np.asarray(arrays["loss_mask"], np.float64).ravel(), first).round().astype(np.int64)
    return Units(np.append(first, b * s), row, np.arange(len(first)) - np.searchsorted(row, row), tokens)


class ScoredNextToken(Objective):
    """`Objective` whose micro-batches are heard by an engine as soon as it has directions."""

    def __init__(self, sources: int, device: torch.device, engine: ScoresInTraining, capabilities: int) -> None:
        super().__init__(sources, device)
        self.engine, self.kind = engine, row_type(capabilities)
        self._waiting: dict[int, tuple[Units, np.ndarray]] = {}

    def output(self, chunk: nn.Module, batch: Tensors, arrays: Arrays) -> Tensor:
        """See Objective."""
        if not self.engine.aimed:
            return super().output(chunk, batch, arrays)
        number = int(arrays["first_sample"])
        if number not in self._waiting:
            self._waiting[number] = (units_of(arrays), np.asarray(arrays["source_ids"]))
        borders = torch.from_numpy(self._waiting[number][0].borders)
        return token_losses(chunk, batch, self.engine.begin(number, batch["segment_ids"], borders))

    def take(self, step: int, probe_step: int) -> np.ndarray:
        """Rows of `artifacts.training_scores` of the step just done, those of units with targets. Collective over a model copy."""
        waiting, self._waiting = self._waiting, {}
        return np.concatenate([np.empty(0, self.kind), *(self._rows(step, probe_step, first, *waiting[first], found) for first, found in self.engine.take())])

    def _rows(self, step: int, probe_step: int, first: int, units: Units, sources: Sequence[int] | np.ndarray, scores: Tensor) -> np.ndarray:
        rows = np.empty(len(units.row), self.kind)
        rows["sample"], rows["step"], rows["probe_step"] = first + units.row, step, probe_step
        rows["source"], rows["place"], rows["tokens"] = np.asarray(sources)[units.row], units.place, units.tokens
        rows["scores"] = scores.cpu().numpy()
        return rows[units.tokens > 0]
