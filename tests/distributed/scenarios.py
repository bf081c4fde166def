"""A small training run under any layout: the same function makes the single-process reference and the parallel results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_r1.model.build import build_model
from megatron_r1.model.config import ModelConfig
from megatron_r1.model.forward import distill_losses, distill_topk_losses, mask_here, position_logits, token_losses
from megatron_r1.model.loss import masked_sum
from megatron_r1.parallel import checkpoint, context, ddp, optimizer, schedule
from megatron_r1.parallel.config import LayoutConfig
from megatron_r1.train.teacher import TrainedTeacher, top_k

MODEL = ModelConfig(vocab_size=256, hidden_size=128, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32, ffn_size=192)
ROWS, LENGTH, MICROBATCHES, STEPS = 2, 32, 4, 4
LEARNING_RATES = (1e-3, 2e-3, 3e-3, 2e-3, 1e-3, 5e-4)


def microbatches(step: int) -> list[dict[str, torch.Tensor]]:
    """The global batch of one step: packed documents and very uneven masks, so that wrong averaging shows."""
    generator = torch.Generator().manual_seed(1000 + step)
    batches = []
    for index in range(MICROBATCHES):
        tokens = torch.randint(0, MODEL.vocab_size, (ROWS, LENGTH + 1), generator=generator)
        starts = (torch.rand(ROWS, LENGTH, generator=generator) < 0.1).long()
        mask = (torch.rand(ROWS, LENGTH, generator=generator) < (0.1 + 0.28 * index)).float()
        batches.append({"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": mask, "segment_ids": starts.cumsum(1)})
    return batches


class Run:
    """Model, optimizer and data of one layout."""

    def __init__(self, layout: LayoutConfig, objective: str = "next", precision: str = "fp32", seed: int = 5, tied: bool = True, recompute: bool = False):
        self.ctx = context.initialize(layout, seed=11)
        self.model = MODEL.replace(tied_embeddings=tied)
        chunks = build_model(self.model, self.ctx, seed=seed, precision=precision, recompute=recompute)
        # Small buckets, so that overlapping has something to overlap.
        self.chunks = ddp.wrap(chunks, layout, self.ctx, bucket_parameters=30_000 if layout.overlap else None)
        self.optimizer = optimizer.build_optimizer(
            self.chunks, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, clip=0.5, layout=layout, precision=precision
        )
        self.objective, self.step_number = objective, 0
        if objective != "next":
            # Its key/value heads can not be cut: under tensor parallelism it is whole in every process ("distill whole").
            shape = self.model.replace(num_kv_heads=1) if objective == "distill whole" else self.model
            self.teacher = build_model(shape, self.ctx.unpipelined(whole_matrices=objective == "distill whole"), seed=77)

    def forward_step(self, batches: Any, chunk: torch.nn.Module) -> Any:
        """One micro-batch, by the run's objective."""
        batch = next(batches)
        mask = mask_here(batch["loss_mask"])
        if self.objective == "next":
            return token_losses(chunk, batch), lambda losses: (*masked_sum(losses, mask), {})
        if not ddp.unwrap(chunk).post_process:
            return token_losses(chunk, batch), None
        if self.objective == "topk":
            teacher = TrainedTeacher.__new__(TrainedTeacher)
            teacher.chunks = self.teacher
            logprobs, indices = top_k(teacher, batch, True, ddp.unwrap(chunk).vocabulary, 8, 1.0)
            losses = distill_topk_losses(chunk, indices, logprobs, batch)
        else:
            losses = distill_losses(chunk, position_logits(self.teacher, batch), batch, 2.0, 0.25)
        return losses, lambda losses: (*masked_sum(losses, mask), {"hard": losses.sum()})

    def step(self) -> tuple[float, float]:
        """One optimizer step: (loss, gradient norm before clipping)."""
        ctx = self.ctx
        mine = microbatches(self.step_number)[ctx.data_rank :: ctx.data_size]
        optimizer.set_lr(self.optimizer, LEARNING_RATES[self.step_number % len(LEARNING_RATES)])
        reports = schedule.forward_backward(ctx, self.chunks, self.forward_step, iter(mine), len(mine), LENGTH, ROWS)
        sums = schedule.reduce_reports(ctx, reports, names=["hard"] if self.objective != "next" else [])
        result = optimizer.step(self.optimizer)
        self.step_number += 1
        return sums["loss"], result.grad_norm

    def steps(self, count: int = STEPS) -> list[tuple[float, float]]:
        """Several steps."""
        return [self.step() for _ in range(count)]

    def validation(self) -> float:
        """Loss of the batch of step 0 without gradients."""
        mine = microbatches(0)[self.ctx.data_rank :: self.ctx.data_size]
        reports = schedule.forward_backward(self.ctx, self.chunks, self.forward_step, iter(mine), len(mine), LENGTH, ROWS, forward_only=True)
        return schedule.reduce_reports(self.ctx, reports)["loss"]

    def save(self, path: Path) -> None:
        """A checkpoint that knows its step."""
        checkpoint.save(path, self.chunks, self.optimizer, {"step": self.step_number}, self.ctx)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint."""
        self.step_number = checkpoint.load(path, self.chunks, self.optimizer, self.ctx)["step"]
