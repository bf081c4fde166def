"""Process groups, passed explicitly: `initialize` once, then hand the `ParallelContext` around."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megatron_r1.parallel import device as _device
from megatron_r1.parallel.config import LayoutConfig
from megatron_r1.parallel.mcore import parallel_state
from megatron_r1.utils.errors import ParallelError, R1Error

Scope = Literal["data", "replicas", "world", "model", "tensor", "pipeline", "context"]

_TIMEOUT = timedelta(minutes=10)
_current: ParallelContext | None = None


@dataclass(frozen=True)
class ParallelContext:
    """Where this process stands in the layout.

    `data_rank` of `data_size` model copies; inside a copy, `tensor_rank`, `pipeline_rank` and `context_rank`.
    """

    layout: LayoutConfig
    rank: int
    world_size: int
    data_rank: int
    data_size: int
    tensor_rank: int
    pipeline_rank: int
    context_rank: int
    device: torch.device

    @property
    def tensor_size(self) -> int:
        """Processes that share each weight matrix."""
        return self.layout.tensor

    @property
    def pipeline_size(self) -> int:
        """Pipeline stages."""
        return self.layout.pipeline

    @property
    def is_first_stage(self) -> bool:
        """Whether this process holds the embedding."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this process holds the head and sees the loss."""
        return self.pipeline_rank == self.layout.pipeline - 1

    @property
    def leads_copy(self) -> bool:
        """Whether this is the first process of its model copy, the one that writes what the copy made."""
        return self.tensor_rank == 0 and self.pipeline_rank == 0 and self.context_rank == 0

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes files and logs."""
        return self.rank == 0

    def group(self, over: Scope) -> dist.ProcessGroup:
        """The group of processes that differ from this one only in the given degree; `model`: in tensor and pipeline degree; `replicas`: in
        data and context degree, those that hold the same piece of the weights."""
        return {
            "world": lambda: dist.group.WORLD,
            "data": parallel_state.get_data_parallel_group,
            "replicas": lambda: parallel_state.get_data_parallel_group(with_context_parallel=True),
            "model": parallel_state.get_model_parallel_group,
            "tensor": parallel_state.get_tensor_model_parallel_group,
            "pipeline": parallel_state.get_pipeline_model_parallel_group,
            "context": parallel_state.get_context_parallel_group,
        }[over]()

    def all_reduce_sum(self, tensor: torch.Tensor, over: Scope = "data") -> torch.Tensor:
        """Sum of `tensor` over the group (`model`: a whole model copy), on every rank; in place. Not differentiable."""
        return self._all_reduce(tensor, dist.ReduceOp.SUM, over)

    def all_reduce_max(self, tensor: torch.Tensor, over: Scope = "data") -> torch.Tensor:
        """Maximum of `tensor` over the group (`model`: a whole model copy), on every rank; in place. Not differentiable."""
        return self._all_reduce(tensor, dist.ReduceOp.MAX, over)

    def broadcast_object(self, obj: Any, source: int = 0) -> Any:
        """`obj` of rank `source`, on every rank of the world. Small Python objects only."""
        if self.world_size == 1:
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src=source, device=self.device)
        return box[0]

    def gather_objects(self, obj: Any) -> list[Any]:
        """Every rank's `obj` in rank order, on every rank. Small Python objects only."""
        if self.world_size == 1:
            return [obj]
        box: list[Any] = [None] * self.world_size
        dist.all_gather_object(box, obj)
        return box

    def agree(self, value: Any, problem: Exception | None) -> list[Any]:
        """Every rank's value in rank order, or, where any rank has a problem, the first one of these, raised on every rank."""
        outcomes = self.gather_objects((value, problem))
        for _, found in outcomes:
            if found is not None:
                raise found
        return [each for each, _ in outcomes]

    def everywhere(self, action: Callable[[], Any]) -> list[Any]:
        """Run `action` on every rank; every rank gets all results, or raises the first R1Error or OSError of any (nobody waits for ever)."""
        value, problem = None, None
        try:
            value = action()
        except (R1Error, OSError) as error:
            problem = error
        return self.agree(value, problem)

    def on_main(self, action: Callable[[], Any]) -> Any:
        """Run `action` on rank 0; every rank gets its result, or raises what it raised."""
        return self.everywhere(lambda: action() if self.is_main else None)[0]

    def from_last_stage(self, values: torch.Tensor) -> torch.Tensor:
        """`values` of the last pipeline stage, on every stage of this model copy; in place. Same shape everywhere."""
        if self.layout.pipeline > 1:
            dist.broadcast(values, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=self.group("pipeline"))
        return values

    def unpipelined(self, whole_matrices: bool = False) -> ParallelContext:
        """This process's place in another model beside the trained one, a teacher: whole along the pipeline in every process, its matrices
        cut over the same processes or, with `whole_matrices`, not at all."""
        tensor, sequence_parallel = (1, False) if whole_matrices else (self.layout.tensor, self.layout.sequence_parallel)
        layout = self.layout.model_copy(update={"tensor": tensor, "pipeline": 1, "virtual_pipeline": None, "sequence_parallel": sequence_parallel})
        return replace(self, layout=layout, pipeline_rank=0, tensor_rank=0 if whole_matrices else self.tensor_rank)

    def barrier(self) -> None:
        """Wait for every process."""
        if self.world_size > 1:
            dist.barrier()

    def _all_reduce(self, tensor: torch.Tensor, op: Any, over: Scope) -> torch.Tensor:
        for part in (over, "context") if over == "model" and self.layout.context > 1 else (over,):
            group = self.group(part)
            if dist.get_world_size(group) > 1:
                dist.all_reduce(tensor, op=op, group=group)
        return tensor


def initialize(layout: LayoutConfig | None = None, seed: int = 0) -> ParallelContext:
    """Set up the process groups of `layout` and seed the generators.

    Under torchrun (RANK and WORLD_SIZE set) joins the job; otherwise the world is this process alone, without a port.
    Calling again with the same layout only seeds anew; with another layout the groups are rebuilt.
    Raises ParallelError when the world does not fit the layout, EnvironmentProblem when an absent GPU is asked for.
    """
    global _current
    layout = layout or LayoutConfig()
    layout.check()
    target = _device.device(layout.device)
    _device.activate(target)
    _join(target)
    if _current is None or _current.layout != layout or _current.device != target:
        _current = _build(layout, target)
    _device.seed_everything(seed)
    return _current


def current() -> ParallelContext:
    """The context of the last `initialize`. Raises ParallelError before the first."""
    if _current is None:
        raise ParallelError(
            expected="initialised process groups", found="none yet", fix="call megatron_r1.parallel.context.initialize first"
        )
    return _current


def shutdown() -> None:
    """Leave the process groups. Runs by itself at exit."""
    global _current
    _current = None
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _join(target: torch.device) -> None:
    if dist.is_initialized():
        return
    backend = _device.backend(target)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        store, rank, world = next(rendezvous("env://", timeout=_TIMEOUT))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun's store outlives workers that it starts anew: without a prefix of their own these read the addresses of the dead. On several
            # machines the torchruns may count differently (one whose workers only hang counts nothing): there examples/launch turns the shared store off.
            store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=_TIMEOUT)
    else:
        # A store in memory: no port, no file, so any number of single processes can run side by side.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=_TIMEOUT)
    atexit.register(shutdown)


def _build(layout: LayoutConfig, target: torch.device) -> ParallelContext:
    world = dist.get_world_size()
    data_size = layout.data_size(world)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        context_parallel_size=layout.context,
        create_gloo_process_groups=False,
    )
    return ParallelContext(
        layout=layout,
        rank=dist.get_rank(),
        world_size=world,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=data_size,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        context_rank=parallel_state.get_context_parallel_rank(),
        device=target,
    )
