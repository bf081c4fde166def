"""Which tokens of a packed row belong to one document, prepared once per batch for all layers.

Legend: b rows, s tokens per row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

# Above this many elements a dense mask costs more than looping over documents.
_DENSE_LIMIT = 1 << 24


@dataclass(eq=False)
class SegmentPlan:
    """Document boundaries of a batch: attention is causal and stays inside a document.

    `ids` [b, s]: equal neighbours belong together. A value that comes back after another one is a new document.
    """

    ids: Tensor
    _masks: dict[torch.dtype, Tensor] = field(default_factory=dict)

    @cached_property
    def single(self) -> bool:
        """Whether every row is one document, so that plain causal attention is right."""
        return bool((self.ids == self.ids[:, :1]).all())

    @cached_property
    def starts(self) -> Tensor:
        """Documents numbered within their row, from 0: int64 [b, s]; never decreasing along a row."""
        change = torch.zeros_like(self.ids, dtype=torch.bool)
        change[:, 1:] = self.ids[:, 1:] != self.ids[:, :-1]
        return change.cumsum(dim=1)

    @property
    def dense(self) -> bool:
        """Whether a dense mask is the cheaper way."""
        rows, length = self.ids.shape
        return rows * length * length <= _DENSE_LIMIT

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Additive mask [b, 1, s, s]: 0 where query i may see key j, -inf elsewhere. Made once per dtype."""
        if dtype not in self._masks:
            length = self.ids.shape[1]
            causal = torch.ones(length, length, dtype=torch.bool, device=self.ids.device).tril()
            visible = (self.starts[:, :, None] == self.starts[:, None, :]) & causal
            self._masks[dtype] = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))[:, None]
        return self._masks[dtype]

    @cached_property
    def spans(self) -> list[list[tuple[int, int]]]:
        """Per row the (first, past-the-last) token of each document."""
        result = []
        for row in self.starts.cpu():
            ends = (torch.nonzero(row[1:] != row[:-1]).flatten() + 1).tolist() + [len(row)]
            result.append(list(zip([0, *ends[:-1]], ends)))
        return result


def plan_of(segment_ids: Tensor | None) -> SegmentPlan | None:
    """The plan of `segment_ids` [b, s], made at the first call and kept with the tensor; None means plain causal."""
    if segment_ids is None:
        return None
    version, plan = getattr(segment_ids, "_r1_segments", (None, None))
    if plan is None or version != _version(segment_ids):
        plan = SegmentPlan(segment_ids)
        segment_ids._r1_segments = (_version(segment_ids), plan)  # type: ignore[attr-defined]
    return None if plan.single else plan


def _version(tensor: Tensor) -> int:
    """Changes when the tensor is written to (tensors made in inference mode do not count: they are not written to)."""
    return -1 if tensor.is_inference() else tensor._version
