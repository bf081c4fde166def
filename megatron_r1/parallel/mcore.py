"""megatron-core, imported in one place.

The only module that knows its version: it checks the range, keeps the import quiet, installs the CPU shim, and adapts
what differs between releases. Everything else imports megatron-core's names from here.
"""

from __future__ import annotations

import importlib.metadata
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.metadata import StorageMeta

from megatron_r1.parallel import device as _device
from megatron_r1.utils.errors import EnvironmentProblem, ParallelError

OLDEST, BEFORE = Version("0.16.1"), Version("0.20")
OLDEST_ENGINE = Version("2.2")
"""Of Transformer Engine: scales from the tensor at hand, which leave nothing to be saved in a checkpoint."""


def _checked_version() -> Version:
    wanted = f"megatron-core >= {OLDEST}, < {BEFORE}"
    fix = "pip install 'megatron-core==0.16.1' (Python 3.11) or 'megatron-core>=0.19,<0.20' (Python 3.12)"
    try:
        version = Version(importlib.metadata.version("megatron-core"))
    except importlib.metadata.PackageNotFoundError:
        raise EnvironmentProblem(expected=wanted, found="megatron-core is not installed", fix=fix) from None
    if not OLDEST <= version < BEFORE:
        raise EnvironmentProblem(expected=wanted, found=f"megatron-core {version}", fix=fix)
    try:
        # Undeclared by megatron-core: without it the writers of a checkpoint die and the parent waits for ever.
        importlib.metadata.version("psutil")
    except importlib.metadata.PackageNotFoundError:
        raise EnvironmentProblem(expected="psutil", found="it is not installed", fix="pip install psutil") from None
    return version


@contextmanager
def quietly() -> Iterator[None]:
    """Hide warnings a user can do nothing about: absent optional packages at import, names torch is about to retire."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


VERSION = _checked_version()

with quietly():
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.gpt import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        gather_from_sequence_parallel_region,
        gather_from_tensor_model_parallel_region,
        reduce_from_tensor_model_parallel_region,
    )
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
    from megatron.core.utils import get_model_config

_device.install_cpu_shim()

# What megatron-core warns about at every construction and that a user can do nothing about.
for _message in (
    ".*GPTModel.*DEPRECATED.*",
    ".*full_param_layout.*",
    "full scope is deprecated.*",
    "When using async grad allreduce.*",
    ".torch.distributed.*is deprecated.*",
):
    warnings.filterwarnings("ignore", message=_message)
for _part in ("optimizer", "distributed", "dist_checkpointing", "models", "transformer", "utils"):
    logging.getLogger(f"megatron.core.{_part}").setLevel(logging.ERROR)


def transformer_engine_linears() -> tuple[type, type]:
    """Transformer Engine's (column-parallel, row-parallel) linear layers, as megatron-core wraps them. Raises EnvironmentProblem
    when they can not be had."""
    wanted = f"Transformer Engine >= {OLDEST_ENGINE}, for precision: fp8"
    fix = "pip install --no-build-isolation 'transformer-engine[pytorch]' (NVIDIA's PyTorch images have it), or set precision: bf16"
    try:
        with quietly():
            import transformer_engine
            from megatron.core.extensions import transformer_engine as engine
            from megatron.core.utils import get_te_version
    except ImportError as error:
        raise EnvironmentProblem(expected=wanted, found=f"{error}", fix=fix) from error
    if not engine.HAVE_TE:
        found = f"{getattr(transformer_engine, '__version__', 'a version')} that megatron-core {VERSION} does not understand"
        raise EnvironmentProblem(expected=wanted, found=found, fix=fix)
    if get_te_version() < OLDEST_ENGINE:
        raise EnvironmentProblem(expected=wanted, found=f"{get_te_version()}", fix=fix)
    _device.install_cpu_shim()
    return engine.TEColumnParallelLinear, engine.TERowParallelLinear


def p2p_settings(virtual_pipeline: int | None) -> dict[str, bool]:
    """How pipeline stages exchange tensors.

    With interleaved chunks the default batched exchange pairs the wrong sends and receives under gloo: the losses are
    wrong and nothing complains. Separate, overlapped exchanges are exact.
    """
    if virtual_pipeline:
        return {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    return {"overlap_p2p_comm": False, "batch_p2p_comm": True}


def check_p2p(config: TransformerConfig) -> None:
    """Refuse the silently wrong combination, wherever a configuration came from. Raises ParallelError."""
    interleaved = config.virtual_pipeline_model_parallel_size is not None
    if interleaved and config.batch_p2p_comm and torch.distributed.get_backend() == "gloo":
        raise ParallelError(
            expected="batch_p2p_comm: false with an interleaved pipeline under gloo",
            found="batch_p2p_comm: true, which pairs the wrong messages and gives wrong losses without an error",
            fix="build the model with megatron_r1.model.build, which chooses the right exchange",
        )


def process_groups(tensor: int) -> ProcessGroupCollection:
    """The groups of the present layout, or with `tensor` 1, whatever the layout, of a model whose matrices every process has whole.

    Collective over all processes when the layout's tensor degree is another.
    """
    groups = ProcessGroupCollection.use_mpu_process_groups()
    if tensor != parallel_state.get_tensor_model_parallel_world_size():
        assert tensor == 1
        groups.tp, _ = torch.distributed.new_subgroups(group_size=1)
    return groups


def inner_optimizers(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers inside a chain that own parameters (usually one)."""
    chain = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [inner for inner in chain if not getattr(inner, "is_stub_optimizer", False)]


class _Writer(FileSystemWriter):
    """torch's writer without the two things that differ between equal checkpoints: the folder's name and a random number."""

    def storage_meta(self) -> StorageMeta:
        """An empty record."""
        return StorageMeta()


class PlannedSave(TorchDistSaveShardedStrategy):
    """The torch_dist format written by this very process, in three parts that may lie apart in time.

    `dist_checkpointing.save` with this strategy only plans who writes what (collective) and, with `copies`, copies what this
    rank writes to host memory; `write` writes this rank's tensors and may run in a thread; `finish`, on rank 0, writes the index.
    megatron-core's own writer starts a manager and forks workers for each save, about three seconds whatever the size, hangs
    for ever when a worker dies, and forks a process that has CUDA and NCCL threads; its interface also differs between 0.16 and
    0.19. The bytes are the same format: `tensor_files.read` and `dist_checkpointing.load` read both.
    """

    def __init__(self, copies: _device.HostCopies | None = None) -> None:
        super().__init__("torch_dist", 1)
        self._copies = copies

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Any) -> None:
        """Plan the writing of `sharded_state_dict`; collective over all ranks."""
        from megatron.core.dist_checkpointing.strategies import torch as strategy

        if "common_state" in sharded_state_dict:
            # From 0.19 on what is no tensor is a pickled object among them. Ours has none: the older, empty file, which both lines read.
            sharded_state_dict = {name: entry for name, entry in sharded_state_dict.items() if name != "common_state"}
            if torch.distributed.get_rank() == 0:
                torch.save({}, Path(checkpoint_dir) / "common.pt")
        state, _, _ = strategy._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        if self._copies is not None:
            entries = [entry for group in state.values() for entry in group]
            for entry, copy in zip(entries, self._copies.take([entry.data for entry in entries]), strict=True):
                entry.data = copy
        self._planner = strategy.MCoreSavePlanner(dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False)
        # Copies are on the host already. Beside a GPU torch would bring them over all the same: every 10 MB it would wait for what training has asked of
        # the GPU, and that in a thread whose GPU is the machine's first, whatever this process trains on.
        ahead = {} if self._copies is None else {"per_thread_copy_ahead": 0}
        self._writer = _Writer(checkpoint_dir, thread_count=1, sync_files=True, **ahead)
        rank = torch.distributed.get_rank()
        self._writer.reset()
        self._planner.set_up_planner(strategy.mcore_to_pyt_state_dict(state, False), storage_meta=self._writer.storage_meta(), is_coordinator=rank == 0)
        self._writer.set_up_storage_writer(rank == 0)
        plans: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(plans, self._writer.prepare_local_plan(self._planner.create_local_plan()))
        plans, self._index = self._planner.create_global_plan(plans)
        self._plan = self._planner.finish_plan(self._writer.prepare_global_plan(plans)[rank])

    def write(self) -> Any:
        """Write and flush the tensors of this rank; returns what `finish` needs to know about them. Raises OSError."""
        return self._writer.write_data(self._plan, self._planner).wait()

    def finish(self, written: list[Any]) -> None:
        """Write the index over what `write` returned on every rank, in rank order. Rank 0 only."""
        self._writer.finish(self._index, written)


__all__ = [
    "MLP",
    "VERSION",
    "AttnMaskType",
    "ChainedOptimizer",
    "ColumnParallelLinear",
    "DistributedDataParallel",
    "DistributedDataParallelConfig",
    "DistributedOptimizer",
    "Float16Module",
    "GPTModel",
    "IdentityOp",
    "MLPSubmodules",
    "MegatronOptimizer",
    "ModuleSpec",
    "OptimizerConfig",
    "PlannedSave",
    "RowParallelLinear",
    "SelfAttention",
    "SelfAttentionSubmodules",
    "ShardedTensor",
    "ShardedTensorFactory",
    "TransformerBlockSubmodules",
    "TransformerConfig",
    "TransformerLayer",
    "TransformerLayerSubmodules",
    "VocabParallelEmbedding",
    "check_p2p",
    "dist_checkpointing",
    "finalize_model_grads",
    "gather_from_sequence_parallel_region",
    "gather_from_tensor_model_parallel_region",
    "get_bias_dropout_add",
    "get_forward_backward_func",
    "get_megatron_optimizer",
    "get_model_config",
    "get_num_layers_to_build",
    "inner_optimizers",
    "is_main_replica",
    "nested_values",
    "p2p_settings",
    "parallel_state",
    "process_groups",
    "quietly",
    "reduce_from_tensor_model_parallel_region",
    "tensor_parallel",
    "transformer_engine_linears",
]
