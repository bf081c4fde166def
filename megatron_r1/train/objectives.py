"""What a step minimises: next-token loss, distillation, masked fine-tuning. Each is a forward step for parallel/schedule.py.

The reported loss and its gradient are sums over target tokens divided, once, by the number of target tokens of the whole
global batch (the schedule divides): averaging per micro-batch first would give a token in a sparsely masked micro-batch
more weight than one in a full one.

Legend: b rows, s tokens, V vocabulary, p tensor-parallel degree, n sources.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from megatron_r1.model.forward import sharded_logits, token_losses
from megatron_r1.model.loss import distill_kl, distill_topk_kl, masked_sum, mix
from megatron_r1.parallel.ddp import unwrap
from megatron_r1.parallel.schedule import LossFunction
from megatron_r1.train.config import DistillConfig
from megatron_r1.train.teacher import Teacher, documents_apart
from megatron_r1.train.topk_cache import TopKCache

TENSORS = ("tokens", "labels", "loss_mask", "segment_ids", "position_ids", "source_ids")


def to_tensors(batch: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """The arrays of a batch a forward pass needs, on the device."""
    return {key: torch.from_numpy(batch[key]).to(device, non_blocking=True) for key in TENSORS}


class Objective:
    """Next-token loss: -log p(label), over the positions whose loss mask is 1. Fine-tuning is the same with the mask of the
    conversation. `extras`: names of further per-token quantities whose means are logged."""

    extras: tuple[str, ...] = ()

    def __init__(self, sources: int, device: torch.device) -> None:
        self.sources, self.device = sources, device

    def output(self, chunk: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """What the chunk passes to `losses` (on stages that are not the last: its activations)."""
        return token_losses(chunk, batch)

    def losses(self, output: Tensor, chunk: nn.Module, batch: dict[str, Tensor], arrays: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of every position [b, s], and the extras, each [b, s] without gradient. Last stage only."""
        return output, {}

    def forward_step(self, batches: Iterator[Mapping[str, Any]], chunk: nn.Module) -> tuple[Tensor, LossFunction]:
        """Take a micro-batch, run the chunk, and say how its loss is computed."""
        arrays = next(batches)
        batch = to_tensors(arrays, self.device)

        def loss(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            losses, extras = self.losses(output, chunk, batch, arrays)
            total, count = masked_sum(losses, batch["loss_mask"])
            reports = {name: masked_sum(values, batch["loss_mask"])[0] for name, values in extras.items()}
            return total, count, reports | self._by_source(losses.detach(), batch)

        return self.output(chunk, batch), loss

    def _by_source(self, losses: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sum of the losses and number of targets of every source: two fp64 [n]."""
        mask, ids = batch["loss_mask"].double(), batch["source_ids"].long()
        zeros = torch.zeros(self.sources, dtype=torch.float64, device=self.device)
        rows = (losses.double() * mask).sum(dim=1)
        return {"source_loss": zeros.index_add(0, ids, rows), "source_tokens": zeros.index_add(0, ids, mask.sum(dim=1))}


class Distill(Objective):
    """kd_weight * T^2 * KL(teacher || student at T) + (1 - kd_weight) * next-token loss; kd_weight 1, T 1 as published.

    The teacher is live (`teacher`) or was run before (`cache`). Both terms are logged whatever the weight.
    """

    extras = ("kd_loss", "next_token_loss")

    def __init__(
        self, sources: int, device: torch.device, config: DistillConfig, *, teacher: Teacher | None = None, cache: TopKCache | None = None,
        reset_documents: bool = True,
    ) -> None:
        super().__init__(sources, device)
        self.config, self.teacher, self.cache, self.reset_documents = config, teacher, cache, reset_documents

    def output(self, chunk: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Logits of this rank's piece of the vocabulary [b, s, V/p]."""
        return sharded_logits(chunk, batch)

    def losses(self, output: Tensor, chunk: nn.Module, batch: dict[str, Tensor], arrays: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """See Objective."""
        shard, temperature, weight = unwrap(chunk).vocabulary, self.config.temperature, self.config.kd_weight
        with torch.set_grad_enabled(weight < 1.0):
            hard = shard.cross_entropy(output if weight < 1.0 else output.detach(), batch["labels"])
        if self.cache is not None:
            logprobs, indices = self.cache.read(int(arrays["first_sample"]), len(batch["tokens"]))
            soft = distill_topk_kl(output, indices.to(self.device), logprobs.to(self.device), temperature, shard)
        else:
            assert self.teacher is not None
            apart = documents_apart(self.reset_documents, batch["segment_ids"])
            soft = distill_kl(output, self.teacher.logits(batch["tokens"], apart, batch["position_ids"], shard), temperature, shard)
        return mix(hard, soft, 1.0 - weight), {"kd_loss": soft.detach(), "next_token_loss": hard.detach()}
