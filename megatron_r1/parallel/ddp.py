"""Data parallelism: megatron-core's gradient buffers around each model chunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn

from megatron_r1.parallel.config import LayoutConfig
from megatron_r1.parallel.context import ParallelContext
from megatron_r1.parallel.mcore import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    Float16Module,
    get_model_config,
    parallel_state,
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


def gather_weights(chunks: Sequence[nn.Module]) -> None:
    """Bring every process's copy of the weights up to date, before they are read outside of a forward pass. Collective.

    With overlap a distributed optimizer's update reaches the other processes only in the next forward pass.
    """
    for chunk in chunks:
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def owned(chunks: Sequence[nn.Module], ctx: ParallelContext) -> set[int]:
    """id() of the parameters that count as this process', so that every number of a model copy's weights counts exactly once.

    Gains that every tensor-parallel process holds count on the first, and so does everything that context-parallel processes hold; the
    last stage's copy of a tied embedding does not.
    """
    if ctx.context_rank:
        return set()
    copies = {id(tied) for tied in _tied(chunks, ctx) if not ctx.is_first_stage}
    return {
        id(p)
        for chunk in chunks
        for p in chunk.parameters()
        if id(p) not in copies and (ctx.tensor_rank == 0 or getattr(p, "tensor_model_parallel", False))
    }


def complete_gradients(chunks: Sequence[nn.Module], ctx: ParallelContext) -> None:
    """Add up the parts of `.grad` that one model copy's processes have of the same numbers; in place, collective.

    For chunks that are not wrapped (megatron-core's `finalize_model_grads` does it for those that are): gains under sequence
    parallelism, where each process saw its own tokens, everything where sequences are cut, and a tied embedding on the first and last
    stage of a pipeline.
    """
    _complete(chunks, {id(p): p.grad for chunk in chunks for p in chunk.parameters() if p.grad is not None}, ctx)


def _complete(chunks: Sequence[nn.Module], gradients: Mapping[int, torch.Tensor], ctx: ParallelContext) -> None:
    """`gradients`: by id() of their parameters."""
    for chunk in chunks:
        for p in chunk.parameters():
            if id(p) in gradients and getattr(p, "sequence_parallel", False):
                ctx.all_reduce_sum(gradients[id(p)], over="tensor")
    if ctx.layout.context > 1:
        for gradient in gradients.values():
            ctx.all_reduce_sum(gradient, over="context")
    for p in _tied(chunks, ctx):
        if ctx.is_first_stage or ctx.is_last_stage:
            dist.all_reduce(gradients[id(p)], group=parallel_state.get_embedding_group())


def collected_gradients(chunks: Sequence[nn.Module], ctx: ParallelContext) -> dict[int, torch.Tensor]:
    """After `schedule.forward_backward(gather=False)` of wrapped chunks: id() of a parameter -> this process' part of its gradient,
    summed over the data-parallel ranks and complete, fp32. Collective. The buffers stay as they are; the next pass clears them."""
    found = {id(p): ctx.all_reduce_sum(p.main_grad.clone(), over="data") for chunk in chunks for p in chunk.parameters()}
    _complete(chunks, found, ctx)
    return found


def gradient_added(chunks: Sequence[nn.Module], parameter: nn.Parameter) -> None:
    """A micro-batch's gradient of `parameter` has been added to its `main_grad` by hand: with overlap, the last one's lets it go."""
    for chunk in chunks:
        group = chunk.param_to_bucket_group.get(parameter)
        if group is not None and chunk.ddp_config.overlap_grad_reduce:
            group.register_grad_ready(parameter)


def _tied(chunks: Sequence[nn.Module], ctx: ParallelContext) -> list[nn.Parameter]:
    """This process' weight that is the same as one on another stage, if it has one."""
    ends = [chunk for chunk in map(unwrap, chunks) if chunk.share_embeddings_and_output_weights and (chunk.pre_process or chunk.post_process)]
    return [end.shared_embedding_or_output_weight() for end in ends] if ctx.pipeline_size > 1 else []
