"""Data parallelism: megatron-core's gradient buffers around each model chunk."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from megatron_r1.parallel.config import LayoutConfig
from megatron_r1.parallel.context import ParallelContext
from megatron_r1.parallel.mcore import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    Float16Module,
    get_model_config,
)


@torch.enable_grad()  # its hooks hang on the graph, also when the caller has turned gradients off
def wrap(chunks: Sequence[nn.Module], layout: LayoutConfig, ctx: ParallelContext, bucket_parameters: int | None = None) -> list[nn.Module]:
    """Chunks of `build_model` -> chunks that can be trained.

    bf16 chunks are also given megatron-core's half-precision wrapper (inputs down, outputs up to fp32). Gradients gather
    and reduce in fp32. Wrap once, before the optimizer is built; `unwrap` goes back.
    `bucket_parameters`: with overlap, how many parameters travel together (None: megatron-core's choice).
    """
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=layout.distributed_optimizer,
        overlap_grad_reduce=layout.overlap,
        overlap_param_gather=layout.overlap and layout.distributed_optimizer,
        average_in_collective=False,
        bucket_size=bucket_parameters,
    )
    wrapped = []
    for index, chunk in enumerate(chunks):
        model_config = get_model_config(chunk)
        inner = Float16Module(model_config, chunk) if model_config.bf16 else chunk
        wrapped.append(
            DistributedDataParallel(
                config=model_config,
                ddp_config=config,
                module=inner.to(ctx.device),
                # The first chunk's gradients are ready last: only the others gain from several buckets.
                disable_bucketing=index > 0,
            )
        )
    if ctx.data_size > 1:
        for chunk in wrapped:
            chunk.broadcast_params()
    return wrapped


def unwrap(chunk: nn.Module) -> nn.Module:
    """The bare model of a chunk, wrapped or not."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk
