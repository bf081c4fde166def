"""The device, and what lets megatron-core run without a GPU.

megatron-core assumes CUDA: it asks `torch.cuda` for the current device, makes small tensors with `device="cuda"`, and
compares `tensor.type()` with names of CUDA types. Without a GPU `install_cpu_shim` gives the loaded `megatron.core`
modules a `torch` of their own in which those calls mean the CPU. The real `torch` module stays as it is: asking it for a
CUDA tensor still fails, here and in every other library. Two tensor methods (`cuda`, `type`) can only be replaced on the
class; the replacements answer differently to callers inside megatron.core alone.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import sys
import threading
import time
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_r1.utils.errors import ConfigError, EnvironmentProblem

DEVICE_VARIABLE = "MEGATRON_R1_DEVICE"
_SHIMMED = "megatron.core"


def requested(name: str = "auto") -> str:
    """`auto`, `cpu` or `gpu`: `name` unless it is `auto`, else the environment variable MEGATRON_R1_DEVICE."""
    name = os.environ.get(DEVICE_VARIABLE, "auto") if name == "auto" else name
    name = "gpu" if name == "cuda" else name
    if name not in ("auto", "cpu", "gpu"):
        raise ConfigError(
            expected=f"{DEVICE_VARIABLE} to be auto, cpu or gpu", found=name, fix=f"unset {DEVICE_VARIABLE} or correct it"
        )
    return name


def uses_gpu(name: str = "auto") -> bool:
    """Whether computation happens on a GPU. Raises EnvironmentProblem when a GPU was asked for by name and is absent."""
    name = requested(name)
    available = torch.cuda.is_available()
    if name == "gpu" and not available:
        built = "built with CUDA" if torch.version.cuda else "a CPU-only build"
        raise EnvironmentProblem(
            expected="a CUDA device, because a GPU was asked for by name",
            found=f"none (torch {torch.__version__} is {built})",
            fix=f"set layout.device to auto or cpu (and {DEVICE_VARIABLE} likewise), or run on a GPU machine with a CUDA build of torch",
        )
    return available and name != "cpu"


def device(name: str = "auto") -> torch.device:
    """This process's device: cuda:LOCAL_RANK on a GPU machine, else cpu.

    `name`: `auto` | `cpu` | `gpu`; auto reads MEGATRON_R1_DEVICE. Raises EnvironmentProblem as `uses_gpu` does.
    """
    if not uses_gpu(name):
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        raise EnvironmentProblem(
            expected=f"a GPU for local rank {index}",
            found=f"{torch.cuda.device_count()} GPU(s) on this machine",
            fix="start at most one process per GPU (torchrun --nproc-per-node)",
        )
    return torch.device("cuda", index)


def activate(target: torch.device) -> None:
    """Make `target` the current device of this process, for torch and for megatron-core. Raises EnvironmentProblem when a
    process that has begun on the CPU is to change to a GPU."""
    if target.type != "cuda":
        install_cpu_shim(always=True)
        return
    if _proxy is not None:
        raise EnvironmentProblem(
            expected="one kind of device for the whole process",
            found="a GPU asked for after megatron-core was set up for the CPU",
            fix=f"choose the device at the start ({DEVICE_VARIABLE}), or run the two parts as two processes",
        )
    torch.cuda.set_device(target)


def require_fp8(target: torch.device) -> None:
    """Raise EnvironmentProblem unless matrix products in FP8 can be computed there."""
    wanted, fix = "a GPU of compute capability 8.9 or later (Ada, Hopper, Blackwell) for precision: fp8", "set precision: bf16 (on a CPU fp32 as well), or run on such a GPU"
    if target.type != "cuda":
        raise EnvironmentProblem(expected=wanted, found="a CPU", fix=fix)
    capability = torch.cuda.get_device_capability(target)
    if capability < (8, 9):
        raise EnvironmentProblem(expected=wanted, found=f"{torch.cuda.get_device_name(target)} with {capability[0]}.{capability[1]}", fix=fix)


def backend(target: torch.device) -> str:
    """The torch.distributed backend that fits a device: nccl or gloo."""
    return "nccl" if target.type == "cuda" else "gloo"


def nccl_version() -> tuple[int, ...] | None:
    """Version of NCCL that torch uses; None without GPUs."""
    return tuple(torch.cuda.nccl.version()) if torch.cuda.is_available() else None


def synchronize() -> None:
    """Wait for the device (nothing to do on the CPU): call before reading a clock."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Mark:
    """A point in the work of a device, taken without waiting for it."""

    def __init__(self, target: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if target.type == "cuda" else None
        self._time = time.perf_counter()
        if self._event is not None:
            self._event.record()

    def seconds_until(self, later: Mark) -> float:
        """Seconds between two marks. On a GPU waits until the later one is reached."""
        if self._event is None or later._event is None:
            return later._time - self._time
        later._event.synchronize()
        return self._event.elapsed_time(later._event) / 1e3


def deterministic(on: bool) -> None:
    """Only operations that give the same bits every time, or the usual ones. Before the first matrix product of the process: cuBLAS reads its
    setting once."""
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(on)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = on, False


@dataclass(frozen=True)
class Staged:
    """Tensors on their way to a device."""

    tensors: dict[str, torch.Tensor]
    ready: Any = None

    def take(self) -> dict[str, torch.Tensor]:
        """The tensors, for the current stream, which waits for them (the host does not)."""
        if self.ready is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self.ready)
            for tensor in self.tensors.values():
                tensor.record_stream(stream)
        return self.tensors


def uploader(target: torch.device) -> Callable[[Mapping[str, Any]], Staged] | None:
    """Copies numpy arrays to a GPU from pinned memory, on a stream of its own beside the computation; for any one thread at a
    time or several. None for the CPU, where nothing is copied."""
    if target.type != "cuda":
        return None
    side = torch.cuda.Stream(target)

    def upload(arrays: Mapping[str, Any]) -> Staged:
        with torch.cuda.device(target), torch.cuda.stream(side):
            tensors = {key: torch.from_numpy(array).contiguous().pin_memory().to(target, non_blocking=True) for key, array in arrays.items()}
            ready = torch.cuda.Event()
            ready.record(side)
        return Staged(tensors, ready)

    return upload


class HostCopies:
    """Copies of tensors in host memory that is kept and used again by the next copies of tensors of the same sizes.

    Page-locked on a GPU's host, in huge pages where the system has them on a CPU. Touching new memory for the first time takes longer than
    copying: `reserve` does it ahead of time.
    """

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None
        self._reserving: threading.Thread | None = None

    def reserve(self, tensors: Sequence[torch.Tensor]) -> None:
        """Ask for the memory that copies of `tensors` will take, in a thread. Not while copies are in use."""
        if self._reserving is None:
            self._reserving = threading.Thread(target=self._reserve, args=(_starts(tensors)[-1], _gpu_of(tensors)), name="memory for copies", daemon=True)
            self._reserving.start()

    def wait(self) -> None:
        """Until the memory asked for is there."""
        if self._reserving is not None:
            self._reserving.join()
            self._reserving = None

    def take(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Contiguous copies on the CPU, in order. Copies taken before must not be used any more."""
        self.wait()
        starts = _starts(tensors)
        memory, copies = self._grown(starts[-1], _gpu_of(tensors)), []
        for start, tensor in zip(starts, tensors):
            room = memory[start : start + tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
            copies.append(room.copy_(tensor.detach(), non_blocking=True))
        synchronize()
        return copies

    def _reserve(self, size: int, gpu: torch.device | None) -> None:
        with contextlib.suppress(MemoryError, RuntimeError, OSError):  # `take` asks again, and says what is wrong
            self._grown(size, gpu)

    def _grown(self, size: int, gpu: torch.device | None) -> torch.Tensor:
        if self._memory is None or self._memory.numel() < size:
            self._memory = None  # freed before more is asked for
            self._memory = _host_memory(max(1, size), gpu)
        return self._memory


def _starts(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Where each copy begins, and at last where all end: multiples of 64 bytes."""
    return [0, *itertools.accumulate(-(-tensor.numel() * tensor.element_size() // 64) * 64 for tensor in tensors)]


def _gpu_of(tensors: Sequence[torch.Tensor]) -> torch.device | None:
    return next((tensor.device for tensor in tensors if tensor.is_cuda), None)


def _host_memory(size: int, gpu: torch.device | None) -> torch.Tensor:
    """Bytes that the system has really given."""
    if gpu is not None:
        with torch.cuda.device(gpu):  # a thread would otherwise open the first GPU
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    pages = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them: small pages do as well, more slowly
            pages.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    numbers = memory.numpy()
    for start in range(0, size, 1 << 28):  # Python's lock is free within each part
        numbers[start : start + (1 << 28) : mmap.PAGESIZE] = 0
    return memory


def gpu_number(target: torch.device) -> int | None:
    """Which GPU of this machine, None for the CPU."""
    return None if target.type != "cuda" else target.index or 0


def adopt(arrays: Mapping[str, Any]) -> Staged:
    """Copies, on the current stream, of arrays on a GPU that another library owns (DLPack)."""
    return Staged({key: torch.from_dlpack(array).clone() for key, array in arrays.items()})


def name_of(target: torch.device) -> str | None:
    """The GPU's name, None for the CPU."""
    return None if target.type != "cuda" else torch.cuda.get_device_name(target)


def seed_everything(seed: int) -> None:
    """Seed torch and megatron-core's model-parallel generators. The parallel groups must exist."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.manual_seed(seed)
    # megatron-core derives one seed per tensor and pipeline rank by adding up to a few thousand: keep away from 2**63.
    model_parallel_cuda_manual_seed(seed % (1 << 31), force_reset_rng=True)


def rng_state(target: torch.device) -> dict[str, torch.Tensor]:
    """The generators of this process: `cpu` and, on a GPU, `device`. Byte tensors."""
    state = {"cpu": torch.get_rng_state()}
    if target.type == "cuda":
        state["device"] = torch.cuda.get_rng_state(target)
    return state


def set_rng_state(state: dict[str, torch.Tensor], target: torch.device) -> None:
    """Inverse of `rng_state`; a state from another kind of device is used as far as it fits."""
    torch.set_rng_state(state["cpu"])
    if "device" in state and target.type == "cuda":
        torch.cuda.set_rng_state(state["device"], target)


# ------------------------------------------------------------------------------------------------ CPU shim


class _Null:
    """Stands for a stream or event on a device that has none: any method does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, _: str) -> Any:
        return lambda *args, **kwargs: None


class _CpuCuda(types.ModuleType):
    """`torch.cuda` as megatron.core sees it on a CPU."""

    Stream = Event = _Null
    nvtx = _Null()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    current_device = staticmethod(lambda: torch.device("cpu"))
    is_available = staticmethod(lambda: False)
    device_count = staticmethod(lambda: 0)
    synchronize = empty_cache = set_device = staticmethod(lambda *args, **kwargs: None)
    current_stream = default_stream = staticmethod(lambda *args: _Null())
    stream = device = staticmethod(lambda *args: contextlib.nullcontext())
    is_current_stream_capturing = staticmethod(lambda: False)
    manual_seed = staticmethod(torch.manual_seed)
    get_rng_state = staticmethod(lambda *args, **kwargs: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, *args, **kwargs: torch.set_rng_state(state))


class _CpuTorch(types.ModuleType):
    """`torch` as megatron.core sees it on a CPU: factories read device="cuda" as the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _CpuCuda("torch.cuda")
        for name in ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "empty_like", "zeros_like", "ones_like"):
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        if not name.startswith("_"):
            setattr(self, name, value)
        return value


def _on_cpu(factory: Any) -> Any:
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs and str(kwargs["device"]).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return make


_proxy: _CpuTorch | None = None


def install_cpu_shim(always: bool = False) -> None:
    """Point every loaded megatron.core module at the CPU. Idempotent; beside a GPU only if `always`."""
    global _proxy
    if torch.cuda.is_available() and not always:
        return
    if _proxy is None:
        _proxy = _CpuTorch()
        _patch_tensor_methods()
    for name, module in list(sys.modules.items()):
        if name.startswith(_SHIMMED) and getattr(module, "__dict__", {}).get("torch") is torch:
            module.torch = _proxy
    random = sys.modules.get("megatron.core.tensor_parallel.random")
    if random is not None:
        random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
        random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _patch_tensor_methods() -> None:
    to_gpu, type_name = torch.Tensor.cuda, torch.Tensor.type

    def called_by_megatron() -> bool:
        return str(sys._getframe(2).f_globals.get("__name__", "")).startswith(_SHIMMED)

    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if called_by_megatron() else to_gpu(self, *args, **kwargs)

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = type_name(self, *args, **kwargs)
        # The optimizers sort parameters by names such as "torch.cuda.FloatTensor".
        if isinstance(answer, str) and called_by_megatron():
            return answer.replace("torch.", "torch.cuda.", 1) if not answer.startswith("torch.cuda.") else answer
        return answer

    torch.Tensor.cuda, torch.Tensor.type = cuda, type_  # type: ignore[method-assign]
