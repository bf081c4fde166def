"""What a step minimises: next-token loss, distillation, masked fine-tuning (train/group_dro.py and train/grpo.py have two more). Each is a forward step for parallel/schedule.py.

The reported loss and its gradient are sums over target tokens divided, once, by the number of target tokens of the whole
global batch (the schedule divides): averaging per micro-batch first would give a token in a sparsely masked micro-batch
more weight than one in a full one.

Legend: b rows, s tokens, V vocabulary, p tensor-parallel degree, n sources.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_r1.model.forward import distill_losses, distill_topk_losses, mask_here, token_losses
from megatron_r1.model.loss import masked_sum
from megatron_r1.parallel.ddp import unwrap
from megatron_r1.parallel.schedule import LossFunction
from megatron_r1.train.config import DistillConfig
from megatron_r1.train.teacher import Teacher, documents_apart
from megatron_r1.train.topk_cache import TopKCache

TENSORS = ("tokens", "labels", "loss_mask", "segment_ids", "position_ids", "source_ids")
NUMBERS = ("tokens", "labels", "position_ids")
Arrays = Mapping[str, Any]
Tensors = dict[str, Tensor]


def to_tensors(batch: Arrays, device: torch.device) -> Tensors:
    """The arrays of a batch a forward pass needs, on the device; token numbers, labels and positions in 64 bits.

    Sequences are whole under every layout; `loss_mask` is 1 at targets of this process only, so that sums over processes count each once."""
    found = batch["staged"].take() if "staged" in batch else {key: torch.from_numpy(batch[key]) for key in TENSORS}
    batch = {key: tensor.to(device, torch.int64 if key in NUMBERS else None, non_blocking=True) for key, tensor in found.items()}
    return batch | {"loss_mask": mask_here(batch["loss_mask"])}


class Objective:
    """Next-token loss: -log p(label), over the positions whose loss mask is 1. Fine-tuning is the same with the mask of the
    conversation.

    `reports`: what `by_source` sums up for every source of a micro-batch. An objective that learns from these sums (group
    DRO) does so in `update`, and keeps what it learnt in `state`, which is saved with every checkpoint."""

    reports: tuple[str, ...] = ("source_loss", "source_tokens")

    def __init__(self, sources: int, device: torch.device) -> None:
        self.sources, self.device = sources, device

    def update(self, sums: Mapping[str, Sequence[float]]) -> None:
        """Learn from the sums of the step just applied: report -> one number per source, over all ranks and micro-batches."""

    def state(self) -> dict[str, Any]:
        """What `update` has learnt, JSON-able and exact."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up `state` of a checkpoint."""

    def record(self) -> dict[str, Any]:
        """What it adds to a metrics record."""
        return {}

    def prepare(self, chunks: Sequence[nn.Module], batches: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
        """The micro-batches that step `step` (0-based) trains on, made of those the feed has for it and of the present weights. Collective."""
        return batches

    def output(self, chunk: nn.Module, batch: Tensors, arrays: Arrays) -> Tensor:
        """What the chunk hands to `losses` (on stages that are not the last: to the next stage)."""
        return token_losses(chunk, batch)

    def losses(self, output: Tensor, chunk: nn.Module, batch: Tensors) -> Tensor:
        """Loss of every position [b, s]. Last stage only."""
        return output

    def forward_step(self, batches: Iterator[Arrays], chunk: nn.Module) -> tuple[Tensor, LossFunction]:
        """Take a micro-batch, run the chunk, and say how its loss is computed."""
        arrays = next(batches)
        batch = to_tensors(arrays, self.device)

        def loss(output: Tensor) -> tuple[Tensor, Tensor, Tensors]:
            losses = self.losses(output, chunk, batch)
            return *self.total_loss(losses, batch), self.by_source(losses.detach(), batch)

        return self.output(chunk, batch, arrays), loss

    def total_loss(self, losses: Tensor, batch: Tensors) -> tuple[Tensor, Tensor]:
        """The sum that is differentiated, and the number of targets it is divided by (over the global batch)."""
        return masked_sum(losses, batch["loss_mask"])

    def by_source(self, losses: Tensor, batch: Tensors) -> Tensors:
        """Sum of the losses and number of targets of every source: two fp64 [n]."""
        mask, ids = batch["loss_mask"].double(), batch["source_ids"].long()
        zeros = torch.zeros(self.sources, dtype=torch.float64, device=self.device)
        rows = (losses.double() * mask).sum(dim=1)
        return {"source_loss": zeros.index_add(0, ids, rows), "source_tokens": zeros.index_add(0, ids, mask.sum(dim=1))}


class Distill(Objective):
    """kd_weight * T^2 * KL(teacher || student at T) + (1 - kd_weight) * next-token loss; kd_weight 1, T 1 as published.

    The reported loss is this mixture; the next-token loss is what validation shows. Two ways to the same numbers: a live teacher,
    and a cache of its top k. Neither model's logits ever exist as a whole.
    """

    def __init__(
        self, sources: int, device: torch.device, config: DistillConfig, *, teacher: Teacher | None = None, cache: TopKCache | None = None,
        reset_documents: bool = True,
    ) -> None:
        super().__init__(sources, device)
        self.temperature, self.hard_weight = config.temperature, 1.0 - config.kd_weight
        self.teacher, self.cache, self.reset_documents = teacher, cache, reset_documents

    def output(self, chunk: nn.Module, batch: Tensors, arrays: Arrays) -> Tensor:
        """See Objective."""
        if not unwrap(chunk).post_process:
            return token_losses(chunk, batch)
        if self.cache is not None:
            logprobs, indices = self.cache.read(int(arrays["first_sample"]), len(batch["tokens"]))
            return distill_topk_losses(chunk, indices.to(self.device), logprobs.to(self.device), batch, self.temperature, self.hard_weight)
        assert self.teacher is not None  # every stage that sees a loss has one
        apart = documents_apart(self.reset_documents, batch["segment_ids"])
        taught = self.teacher.logits(batch["tokens"], apart, unwrap(chunk).vocabulary)
        return distill_losses(chunk, taught, batch, self.temperature, self.hard_weight)
