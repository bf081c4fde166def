"""Peak speed of GPUs by their names: what MFU is a share of. Dense matrix products, without sparsity, at the makers' boost clocks."""

from __future__ import annotations

import re
from typing import NamedTuple

from megatron_r1.utils.errors import EnvironmentProblem


class Peak(NamedTuple):
    """Peak in 1e12 operations per second: bf16 tensor cores; fp32 without TF32, which torch leaves off for matrix products."""

    bf16: float
    fp32: float


# The first pattern that matches counts. Makers' data sheets, dense figures.
PEAKS: tuple[tuple[str, Peak], ...] = (
    (r"\bGB200\b", Peak(2500.0, 80.0)),
    (r"\bB200\b", Peak(2250.0, 75.0)),
    (r"\bB100\b", Peak(1750.0, 60.0)),
    (r"\bH200 NVL\b", Peak(835.5, 60.0)),
    (r"\bGH200\b|\bH200\b", Peak(989.4, 66.9)),
    (r"\bH100 NVL\b", Peak(835.5, 60.0)),
    (r"\bH100 PCIe\b", Peak(756.5, 51.2)),
    (r"\bH100\b", Peak(989.4, 66.9)),
    (r"\bH800\b", Peak(989.4, 66.9)),
    (r"\bH20\b", Peak(148.0, 44.0)),
    (r"\bA100\b|\bA800\b", Peak(312.0, 19.5)),
    (r"\bL40S\b", Peak(362.0, 91.6)),
    (r"\bL4\b", Peak(121.0, 30.3)),
    (r"\bA10\b", Peak(125.0, 31.2)),
)


def peak_tflops(name: str, precision: str) -> float:
    """Peak of the device called `name` (as torch.cuda.get_device_name says) at bf16 or fp32. Raises EnvironmentProblem for an unknown one."""
    for pattern, peak in PEAKS:
        if re.search(pattern, name) and "MIG" not in name:  # a part of a GPU has a part of its peak
            return getattr(peak, precision)
    raise EnvironmentProblem(
        expected="a GPU whose peak is known, to say what share of it is used (mfu)", found=repr(name),
        fix=f"set watch.peak_tflops to its dense {precision} peak in 1e12 operations per second, from the maker's data sheet",
    )
