"""CUDA kernels are used only after they agreed with the definition on this very machine: checked at first use, once per process.

No test machine of ours is required to have a GPU, so no CUDA kernel is trusted because it passed somewhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from megatron_r1.ops import extension


def absent_until_checked(check: Callable[[], str | None]) -> Callable[[str], str | None]:
    """An `Implementation.absent`: the library's own reasons on a CPU; on a GPU also the verdict of `check`.

    `check()` runs the CUDA kernel on small random inputs against the op's reference in fp64 and returns None or what was
    wrong. An exception in it (a kernel that does not launch) is a reason too, never a crash.
    """

    @lru_cache(maxsize=1)
    def verdict() -> str | None:
        try:
            return check()
        except Exception as error:
            return f"its self-check did not run: {type(error).__name__}: {error}"

    def absent(device: str) -> str | None:
        if reason := extension.absent(device):
            return reason
        return verdict() if device == "cuda" else None

    return absent
