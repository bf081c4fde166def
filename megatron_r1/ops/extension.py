"""The compiled library `megatron_r1/lib/kernels.so` (made from csrc/): loaded at first use, and why it is not there when it is not.

Environment: MEGATRON_R1_KERNELS another file in place of the installed one (development).
"""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache
from pathlib import Path

import torch

KERNELS_VARIABLE = "MEGATRON_R1_KERNELS"
# In a folder that is no package: it has no Python symbols, and tools that import every module of a package must not find it.
INSTALLED = Path(__file__).parent.parent / "lib" / "kernels.so"


def path() -> Path:
    """Where the library is, or would be."""
    return Path(os.environ.get(KERNELS_VARIABLE) or INSTALLED)


@lru_cache(maxsize=1)
def missing() -> str | None:
    """None when the library is loaded, else one sentence why not and what to do. Loads it at the first call."""
    if not path().exists() and path() != INSTALLED:
        return f"{KERNELS_VARIABLE} names {path()}, which is not there"
    if not path().exists():
        return f"{path().name} was not built; run `python tools/build_csrc.py` or reinstall with --no-build-isolation where torch and g++ are"
    try:
        torch.ops.load_library(str(path()))
    except OSError as error:
        return f"{path().name} does not load: {error}; rebuild it with `python tools/build_csrc.py`"
    return None


@lru_cache(maxsize=1)
def build_info() -> dict[str, str]:
    """What the library was built with: `cuda` (architectures or `none`), `torch`, `sources` (hash), `rooms`. Empty when it is missing."""
    if missing():
        return {}
    function = ctypes.CDLL(str(path())).mr1_build_info
    function.restype = ctypes.c_char_p
    return dict(part.split("=", 1) for part in function().decode().split(";"))


def absent(device: str) -> str | None:
    """`Implementation.absent` of an op that has C++ and CUDA kernels and needs no self-check; see `ops.selfcheck` for those that do."""
    if reason := missing():
        return reason
    if device == "cpu":
        return None
    if device == "cuda":
        return None if build_info()["cuda"] != "none" else "the library has C++ kernels only; build it with nvcc: `MEGATRON_R1_BUILD_CUDA=1 python tools/build_csrc.py`"
    return f"there are no kernels for device {device!r}"
