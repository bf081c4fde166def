"""AdamW as megatron-core runs it: fp32 or mixed precision, whole or sharded over the data-parallel group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from megatron_r1.parallel.config import LayoutConfig, Precision
from megatron_r1.parallel.context import ParallelContext
from megatron_r1.parallel.ddp import gather_weights, owned
from megatron_r1.parallel.mcore import (
    DistributedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_model_config,
    inner_optimizers,
)

# A clipping threshold no norm reaches: megatron-core computes the gradient norm only when it clips.
_NO_CLIP = 1e30


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step tells: `applied` is false when the gradients were not finite under loss scaling."""

    applied: bool
    grad_norm: float


def build_optimizer(
    chunks: Sequence[nn.Module],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    clip: float = 1.0,
    layout: LayoutConfig,
    precision: Precision = "fp32",
) -> MegatronOptimizer:
    """AdamW (decoupled decay, arXiv 1711.05101) over wrapped chunks (`ddp.wrap`).

    The kernel is Transformer Engine's FusedAdam, else Apex's, else torch's fused AdamW: megatron-core chose one when it was imported.
    Weight decay acts on matrices, embeddings included, and not on norm gains. `clip` is the largest global gradient norm;
    0 turns clipping off, the norm is still computed. bf16 and fp8 keep fp32 main weights.
    """
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=lr,
            min_lr=0.0,
            weight_decay=weight_decay,
            adam_beta1=betas[0],
            adam_beta2=betas[1],
            adam_eps=eps,
            clip_grad=clip if clip > 0 else _NO_CLIP,
            bf16=precision != "fp32",
            params_dtype=torch.float32 if precision == "fp32" else torch.bfloat16,
            use_distributed_optimizer=layout.distributed_optimizer,
            overlap_param_gather=layout.overlap and layout.distributed_optimizer,
        ),
        list(chunks),
        use_gloo_process_groups=False,
    )
    for group in optimizer.param_groups:
        # megatron-core leaves this product to its own scheduler; ours sets only the learning rate.
        group["weight_decay"] = weight_decay * group["wd_mult"]
    for inner in inner_optimizers(optimizer):
        _prepare(inner.optimizer)
    for chunk in chunks:
        config = get_model_config(chunk)
        config.grad_scale_func = None if precision == "fp32" else optimizer.scale_loss
    return optimizer


def set_lr(optimizer: MegatronOptimizer, lr: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)


def step(optimizer: MegatronOptimizer) -> StepResult:
    """Clip, update the weights, forget the gradients. Collective. Gradients come from `schedule.forward_backward`."""
    applied, norm, _ = optimizer.step()
    optimizer.zero_grad()
    return StepResult(applied=bool(applied), grad_norm=float(norm) if norm is not None else float("nan"))


def adam_step(optimizer: MegatronOptimizer) -> int:
    """Updates made so far (the t of Adam's bias correction)."""
    for inner in inner_optimizers(optimizer):
        for state in inner.optimizer.state.values():
            if "step" in state:
                return int(state["step"])
        for group in inner.optimizer.param_groups:
            if group["params"] and "step" in group:  # a group without parameters is not stepped
                return int(group["step"])
    return 0


def set_adam_step(optimizer: MegatronOptimizer, value: int) -> None:
    """Set t for every parameter separately: one shared step tensor would advance once per parameter."""
    for inner in inner_optimizers(optimizer):
        for state in inner.optimizer.state.values():
            if "step" in state:
                state["step"] = torch.full_like(state["step"], float(value))
        for group in inner.optimizer.param_groups:
            if "step" in group or not _is_torch(inner.optimizer):
                group["step"] = value


@torch.no_grad()
def parameter_norm(chunks: Sequence[nn.Module], ctx: ParallelContext) -> float:
    """Euclidean norm of all weights of the model, each counted once, on every rank. Collective."""
    gather_weights(chunks)
    total = torch.zeros((), dtype=torch.float64, device=ctx.device)
    counted = owned(chunks, ctx)
    for parameter in (p for chunk in chunks for p in chunk.parameters() if id(p) in counted):
        total += torch.linalg.vector_norm(parameter, dtype=torch.float32).double() ** 2
    return float(ctx.all_reduce_sum(total, over="model").sqrt())


def local_states(optimizer: MegatronOptimizer) -> Iterator[tuple[nn.Parameter, slice | None, dict[str, torch.Tensor]]]:
    """Every model parameter with what this rank keeps about it.

    Yields (parameter, range, tensors): `tensors` holds `exp_avg`, `exp_avg_sq` and, where the optimizer keeps fp32 main
    weights, `main`. `range` is the part of the flattened parameter the tensors cover, None when they cover all of it.
    With a distributed optimizer only the parameters this rank owns a part of are yielded.
    """
    for inner in inner_optimizers(optimizer):
        if isinstance(inner, DistributedOptimizer):
            for parameter in inner.model_param_group_index_map:
                tensors = inner._get_main_param_and_optimizer_states(parameter)
                span = inner._get_model_param_range_map(parameter)["param"]
                kept = {"main": tensors["param"], "exp_avg": tensors["exp_avg"], "exp_avg_sq": tensors["exp_avg_sq"]}
                if parameter.dtype == torch.float32:
                    del kept["main"]  # a view of the model's own weights
                yield parameter, slice(span.start, span.end), kept
            continue
        mains = getattr(inner, "fp32_from_float16_groups", [])
        models = getattr(inner, "float16_groups", [])
        of_main = {id(main): model for ours, theirs in zip(mains, models) for main, model in zip(ours, theirs)}
        for group in inner.optimizer.param_groups:
            for main in group["params"]:
                state = inner.optimizer.state[main]
                kept = {"exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
                model = of_main.get(id(main))
                if model is not None:
                    kept["main"] = main
                yield model if model is not None else main, None, kept


def second_moments(optimizer: MegatronOptimizer, chunks: Sequence[nn.Module], ctx: ParallelContext) -> dict[int, torch.Tensor]:
    """id() of every parameter -> its running mean of squared gradients as Adam keeps it (not divided by 1 - beta2^t), fp32, of the
    parameter's shape. Collective: ranks that own parts of a moment put them together. Only for reading."""
    kept = {id(parameter): (span, tensors["exp_avg_sq"]) for parameter, span, tensors in local_states(optimizer)}
    if not any(isinstance(inner, DistributedOptimizer) for inner in inner_optimizers(optimizer)):
        return {name: moment for name, (_, moment) in kept.items()}
    found = {}
    for parameter in (p for chunk in chunks for p in chunk.parameters()):
        whole = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
        if id(parameter) in kept:
            span, moment = kept[id(parameter)]
            whole.view(-1)[span] = moment.view(-1)
        found[id(parameter)] = ctx.all_reduce_sum(whole, over="replicas")
    return found


def _is_torch(optimizer: torch.optim.Optimizer) -> bool:
    return isinstance(optimizer, torch.optim.Adam)  # AdamW is a subclass


def _prepare(optimizer: torch.optim.Optimizer) -> None:
    """State that exists from the start, and the fused kernel of torch's AdamW (the FusedAdam of other packages is one).

    Existing state makes saving before the first step and loading into a fresh optimizer the same code as any other time.
    """
    ours = _is_torch(optimizer)
    for group in optimizer.param_groups:
        group.update({"fused": True, "foreach": False} if ours else {"step": 0})
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                step = {"step": torch.zeros((), dtype=torch.float32, device=parameter.device)} if ours else {}
                optimizer.state[parameter] = step | {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
