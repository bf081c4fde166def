"""One training step's forward and backward passes under any layout."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from megatron_r1.parallel.context import ParallelContext
from megatron_r1.parallel.mcore import (
    DistributedDataParallel,
    check_p2p,
    finalize_model_grads,
    get_forward_backward_func,
    get_model_config,
)

# loss(output) -> (sum of the losses of all counted tokens, number of counted tokens (int), what to report: name -> scalar).
# Where sequences are cut, all three are of the tokens of this process (`model.forward.mask_here`): everything is summed over processes.
LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]
# forward_step(batches, chunk) -> (the chunk's output, loss function); the loss function is called on the last stage only
ForwardStep = Callable[[Iterator[Any], nn.Module], tuple[Tensor, LossFunction]]


def forward_backward(
    ctx: ParallelContext,
    chunks: Sequence[nn.Module],
    forward_step: ForwardStep,
    data_iterator: Iterator[Any],
    num_microbatches: int,
    seq_length: int,
    micro_batch: int,
    forward_only: bool = False,
    gather: bool = True,
    before_gather: Callable[[], None] | None = None,
) -> list[dict[str, Tensor]]:
    """Run `num_microbatches` micro-batches of [micro_batch, seq_length] tokens through the pipeline. Collective.

    Afterwards the gradient buffers of `chunks` (wrapped by `ddp.wrap`) hold the gradient of

        sum of losses over all counted tokens / number of counted tokens,

    both over all micro-batches and all data-parallel and context-parallel ranks, whatever the layout and however unevenly tokens are masked. Chunks
    that are not wrapped are differentiated too, of the plain sum of losses: nothing is divided and no gradient leaves its process. So
    it is without `gather`, whose gradients in the buffers `ddp.collected_gradients` adds up.
    `forward_step` takes each micro-batch from the iterator once per chunk; every pipeline stage must be fed the same
    micro-batches. `before_gather` is called when this process has issued all its own work, before it waits for the others' gradients. Returns, on the last stage, one dict per micro-batch: what the loss function reported plus `loss_sum` and
    `num_tokens`, all detached; on other stages an empty list. `reduce_reports` adds them up.
    """
    first = get_model_config(chunks[0])
    check_p2p(first)
    # Every chunk of an interleaved pipeline reads all micro-batches: each gets its own copy of the stream.
    streams: Any = list(itertools.tee(data_iterator, len(chunks))) if len(chunks) > 1 else data_iterator
    wrapped = isinstance(chunks[0], DistributedDataParallel)
    if not forward_only:
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.grad = None
            if wrapped:
                chunk.zero_grad_buffer()
        if wrapped:
            _connect(chunks)

    def reporting_step(batches: Iterator[Any], chunk: nn.Module) -> tuple[Tensor, Any]:
        output, loss = forward_step(batches, chunk)

        def report(out: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            total, count, extras = loss(out)
            count = count.to(torch.int)
            record = {"loss_sum": total.detach().float(), "num_tokens": count.detach()} | {k: v.detach() for k, v in extras.items()}
            return total, count, record

        return output, report

    def gathering(*arguments: Any, **options: Any) -> None:
        if before_gather is not None:
            before_gather()
        finalize_model_grads(*arguments, **options)

    before = {name: getattr(first, name) for name in ("finalize_model_grads_func", "no_sync_func", "grad_sync_func")}
    first.finalize_model_grads_func = None if forward_only or not (wrapped and gather) else gathering
    try:
        with ExitStack() as stack:
            if forward_only:
                stack.enter_context(torch.no_grad())
            elif wrapped and not gather:
                # The schedule would let the last micro-batch's gradients go.
                first.no_sync_func, first.grad_sync_func = nullcontext, None
                for chunk in chunks:
                    stack.enter_context(chunk.no_sync())
            return get_forward_backward_func()(
                forward_step_func=reporting_step,
                data_iterator=streams,
                model=list(chunks) if len(chunks) > 1 else chunks[0],
                num_microbatches=num_microbatches,
                seq_length=seq_length,
                micro_batch_size=micro_batch,
                forward_only=forward_only,
            )
    finally:
        for name, value in before.items():
            setattr(first, name, value)


def reduce_reports(ctx: ParallelContext, reports: Sequence[dict[str, Tensor]], names: Sequence[str] = ()) -> dict[str, float]:
    """Sums of the reported scalars over micro-batches, data-parallel and context-parallel ranks, on every rank of every stage. Collective.

    Always holds `loss_sum`, `num_tokens` and their quotient `loss`; `names` lists further reported scalars to add up
    (all ranks must pass the same names, also those whose `reports` are empty).
    """
    keys = ["loss_sum", "num_tokens", *names]
    sums = torch.zeros(len(keys), dtype=torch.float64 if ctx.device.type == "cpu" else torch.float32, device=ctx.device)
    for report in reports:
        sums += torch.stack([report[key].to(sums) for key in keys])
    ctx.from_last_stage(sums)
    ctx.all_reduce_sum(sums, over="replicas")
    result = dict(zip(keys, sums.tolist()))
    return result | {"loss": result["loss_sum"] / max(result["num_tokens"], 1.0)}


def _connect(chunks: Sequence[nn.Module]) -> None:
    """Tell the schedule when gradients may be left unreduced and, with overlap, when to start reducing and gathering."""
    config, ddp_config = get_model_config(chunks[0]), chunks[0].ddp_config
    if not ddp_config.overlap_grad_reduce or config.no_sync_func is not None:
        return
    several = len(chunks) > 1
    config.no_sync_func = [chunk.no_sync for chunk in chunks] if several else chunks[0].no_sync
    if several:
        config.grad_sync_func = [chunk.start_grad_sync for chunk in chunks]
    if ddp_config.overlap_param_gather and several:
        config.param_sync_func = [chunk.start_param_sync for chunk in chunks]
