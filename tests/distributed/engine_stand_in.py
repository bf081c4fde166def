"""A stand-in for Transformer Engine, which needs a GPU: the modules megatron-core's own wrappers are built on, with the real ones'
constructor arguments, parameter attributes, names and extra state, computing in the format of their weights. It rounds nothing to FP8, so it
shows that layers are wired as ours are, not what FP8 does to numbers. `calls` tells how each layer was called.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Call(NamedTuple):
    """Of a linear layer: mode, the recipe in force or None, whether weights may be kept in FP8, features in and out."""

    mode: str
    recipe: Any
    is_first_microbatch: bool | None
    shape: tuple[int, int]


calls: list[Call] = []
_recipes: list[Any] = []


class Format:
    """Number formats."""

    E4M3, HYBRID = "e4m3", "hybrid"


class DelayedScaling:
    """Scales from earlier steps."""


class Float8CurrentScaling:
    """Scales from the tensor at hand."""

    def __init__(self, fp8_format: str, fp8_dpa: bool = False) -> None:
        self.fp8_format = fp8_format
        assert not fp8_dpa


@contextmanager
def fp8_autocast(enabled: bool = True, fp8_recipe: Any = None, fp8_group: Any = None) -> Iterator[None]:
    """Linear layers called inside compute in FP8."""
    assert fp8_group is None or isinstance(fp8_group, torch.distributed.ProcessGroup)
    _recipes.append(fp8_recipe if enabled else None)
    try:
        yield
    finally:
        _recipes.pop()


class FP8GlobalStateManager:
    """What is in force."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        """Whether a linear layer called now would compute in FP8."""
        return bool(_recipes) and _recipes[-1] is not None


class Linear(nn.Module):
    """`transformer_engine.pytorch.Linear`."""

    def __init__(
        self, in_features: int, out_features: int, *, sequence_parallel: bool, fuse_wgrad_accumulation: bool, tp_group: Any, tp_size: int, get_rng_state_tracker: Any,
        init_method: Any, bias: bool, return_bias: bool, parallel_mode: str, params_dtype: torch.dtype, device: Any, rng_tracker_name: Any,
    ) -> None:
        super().__init__()
        unused = (bias, return_bias, fuse_wgrad_accumulation, rng_tracker_name)
        assert not any(unused)
        assert str(device) == "cpu"
        self.mode, self.cut = parallel_mode, sequence_parallel and tp_size > 1
        shape = [out_features, in_features]
        dim = {"column": 0, "row": 1}[parallel_mode]
        shape[dim] //= tp_size
        self.weight = nn.Parameter(torch.empty(shape, dtype=params_dtype, device=device))
        self.weight.tensor_model_parallel, self.weight.partition_dim, self.weight.partition_stride = True, dim, 1

    def get_extra_state(self) -> torch.Tensor:
        """The real one's is a tensor too, without elements where scales come from the tensor at hand."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """See get_extra_state."""

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        """[s, b, in] -> [s, b, out], with the exchanges of the real one."""
        from megatron.core import tensor_parallel as tp

        calls.append(Call(self.mode, _recipes[-1] if _recipes else None, is_first_microbatch, (self.weight.shape[1], self.weight.shape[0])))
        if self.mode == "column":
            return F.linear(tp.gather_from_sequence_parallel_region(x) if self.cut else tp.copy_to_tensor_model_parallel_region(x), self.weight)
        y = F.linear(x, self.weight)
        return tp.reduce_scatter_to_sequence_parallel_region(y) if self.cut else tp.reduce_from_tensor_model_parallel_region(y)


class _Unused(types.ModuleType):
    """Classes that megatron-core derives others from when it is imported, and that nothing here uses."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (nn.Module,), {})


def checkpoint(forward: Any, *arguments: Any, distribute_saved_activations: bool, get_rng_state_tracker: Any, tp_group: Any, **named: Any) -> Any:
    """`transformer_engine.pytorch.distributed.checkpoint`."""
    from torch.utils.checkpoint import checkpoint as recompute

    assert not distribute_saved_activations
    return recompute(forward, *arguments, use_reentrant=False, **named)


def install(version: str) -> None:
    """Let `import transformer_engine` find this. Before megatron-core is imported."""
    recipe = types.SimpleNamespace(Format=Format, DelayedScaling=DelayedScaling, Float8CurrentScaling=Float8CurrentScaling)
    parts = {
        "transformer_engine": types.ModuleType("transformer_engine"),
        "transformer_engine.pytorch": _Unused("transformer_engine.pytorch"),
        "transformer_engine.pytorch.fp8": types.ModuleType("transformer_engine.pytorch.fp8"),
        "transformer_engine.pytorch.distributed": _Unused("transformer_engine.pytorch.distributed"),
        "transformer_engine.pytorch.tensor": _Unused("transformer_engine.pytorch.tensor"),
        "transformer_engine.pytorch.ops": _Unused("transformer_engine.pytorch.ops"),
    }
    engine, pytorch = parts["transformer_engine"], parts["transformer_engine.pytorch"]
    engine.__version__, engine.pytorch, engine.common = version, pytorch, types.SimpleNamespace(recipe=recipe)
    engine.__path__, pytorch.__path__ = [], []  # packages
    pytorch.Linear, pytorch.fp8_autocast = Linear, fp8_autocast
    pytorch.fp8, pytorch.distributed, pytorch.tensor, pytorch.ops = (parts[f"transformer_engine.pytorch.{name}"] for name in ("fp8", "distributed", "tensor", "ops"))
    pytorch.fp8.FP8GlobalStateManager, pytorch.fp8.fp8_autocast = FP8GlobalStateManager, fp8_autocast
    pytorch.distributed.checkpoint = checkpoint
    sys.modules.update(parts)
