"""A training step on random tokens in memory: by our loop, and by megatron-core's own functions alone. Used by bench_loop and bench_training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megatron_r1.artifacts.base import open_workspace
from megatron_r1.data.mixture_order import MixtureOrder
from megatron_r1.parallel.context import ParallelContext, initialize
from megatron_r1.parallel.mcore import finalize_model_grads, get_forward_backward_func, get_model_config
from megatron_r1.train import run
from megatron_r1.train.callbacks.base import Callback
from megatron_r1.train.config import TrainConfig
from megatron_r1.train.feed import TrainingData
from megatron_r1.train.loop import Trainer
from megatron_r1.train.objectives import NUMBERS, TENSORS, Objective

Arrays = dict[str, np.ndarray]
Step = Callable[[Iterator[dict[str, Tensor]], nn.Module], tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]]]


class RandomTokens:
    """A dataset of one source: sequences of random tokens, sample i being sequence i mod `sequences`."""

    source_names = ("memory",)

    def __init__(self, sequences: int, length: int, vocabulary: int, seed: int = 0) -> None:
        self.order = MixtureOrder({"memory": sequences}, {"memory": 1.0}, seed)
        tokens = np.random.default_rng(seed).integers(vocabulary, size=(sequences, length + 1), dtype=np.int32)
        shape = (sequences, length)
        self._arrays: Arrays = {
            "tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": np.ones(shape, np.float32), "segment_ids": np.zeros(shape, np.int32),
            "position_ids": np.broadcast_to(np.arange(length, dtype=np.int32), shape), "source_ids": np.zeros(sequences, np.int32),
        }

    def batch(self, indices: Any) -> Arrays:
        """Samples as arrays [b, s]."""
        rows = np.asarray(list(indices)) % len(self._arrays["tokens"])
        return {key: np.ascontiguousarray(value[rows]) for key, value in self._arrays.items()}

    def tensors(self, first: int, rows: int, device: torch.device) -> dict[str, Tensor]:
        """Samples `first` ... as a loop that does nothing else would have them: already on the device, in the types it computes with."""
        batch = self.batch(range(first, first + rows))
        return {key: torch.from_numpy(batch[key]).to(device, torch.int64 if key in NUMBERS else None) for key in TENSORS}


def settings(model: Any, *, steps: int, length: int, micro: int, sequences: int, precision: str, device: str, **more: Any) -> TrainConfig:
    """A phase at a constant learning rate; everything else is the default, and so are the callbacks."""
    return TrainConfig.model_validate({
        "seed": 1, "inputs": {"shards": "memory"}, "sources": "uniform", "model": model, "budget": f"{steps} steps", "global_batch": f"{sequences * length} tokens",
        "seq_length": f"{length} tokens", "micro_batch": micro, "lr": {"peak": 1e-4, "schedule": "constant"}, "precision": precision,
        "layout": {"device": device}, "validation": {"tokens": "0 tokens"}, **more,
    })  # fmt: skip


def our_trainer(config: TrainConfig, data: RandomTokens, folder: Path, extra: Sequence[Callback]) -> Trainer:
    """The trainer with the callbacks that `config` asks for, and `extra` ones after them."""
    assert config.model is not None
    ctx = initialize(config.layout, config.seed or 0)
    chunks, optimizer = run.build(config, config.model, ctx)
    work = open_workspace(folder, "benchmark", "checkpoint", config)
    steps = config.steps()
    assert steps is not None
    shards: Any = None  # only what measures on held-out text looks at them
    callbacks = run.make_callbacks(config, config.model, shards, None, data.source_names, steps, work, ctx.device)
    objective = Objective(len(data.source_names), ctx.device)
    return Trainer(config, ctx, work.path, chunks, optimizer, objective, TrainingData(data, 0), steps, [*callbacks, *extra], "benchmark")


def bare_step(chunk: nn.Module, optimizer: Any, forward_step: Step, batches: Sequence[dict[str, Tensor]]) -> Tensor:
    """A step by megatron-core's DDP, schedule and optimizer, and nothing else; returns the sum of the losses, not yet waited for."""
    config = get_model_config(chunk)
    config.finalize_model_grads_func = finalize_model_grads
    chunk.zero_grad_buffer()
    optimizer.zero_grad()
    rows, length = batches[0]["tokens"].shape
    reports = get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=iter(batches), model=chunk, num_microbatches=len(batches), seq_length=length, micro_batch_size=rows, forward_only=False,
    )
    optimizer.step()
    return sum(report["loss"] for report in reports)


def batches_of(data: RandomTokens, ctx: ParallelContext, config: TrainConfig, step: int) -> list[dict[str, Tensor]]:
    """The micro-batches of one step of this process, as our loop deals them out."""
    micro, per_step = int(config.micro_batch), config.sequences_per_step
    rounds = per_step // (micro * ctx.data_size)
    return [data.tensors(step * per_step + (m * ctx.data_size + ctx.data_rank) * micro, micro, ctx.device) for m in range(rounds)]
