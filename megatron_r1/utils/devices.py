"""What accelerators are rated at: peaks for MFU, memory for plans. Torch-free."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_r1.utils.errors import ConfigError, EnvironmentProblem


@dataclass(frozen=True)
class Device:
    """Ratings by the maker's data sheet: dense products, no sparsity, at boost clocks, in 10^12 FLOP/s.

    `pattern`: a regular expression that the driver's name of it matches; `bf16`: products with fp32 sums; `fp32`: without TF32, which
    torch leaves off for matrix products; `memory`: bytes as the driver reports them.
    """

    pattern: str
    bf16: float
    fp32: float
    memory: int


_MIB = 1 << 20

DEVICES = {
    "gb200": Device(r"\bGB200\b", 2500.0, 80.0, 189_471 * _MIB),
    "b200": Device(r"\bB200\b", 2250.0, 75.0, 183_359 * _MIB),
    "b100": Device(r"\bB100\b", 1750.0, 60.0, 183_359 * _MIB),
    "gh200": Device(r"\bGH200\b", 989.4, 66.9, 97_871 * _MIB),
    "h200-nvl": Device(r"\bH200 NVL\b", 835.5, 60.0, 143_771 * _MIB),
    "h200": Device(r"\bH200\b", 989.4, 66.9, 143_771 * _MIB),
    "h100-nvl": Device(r"\bH100 NVL\b", 835.5, 60.0, 95_830 * _MIB),
    "h100-pcie": Device(r"\bH100 PCIe\b", 756.5, 51.2, 81_559 * _MIB),
    "h100": Device(r"\bH100\b", 989.4, 66.9, 81_559 * _MIB),
    "h800": Device(r"\bH800\b", 989.4, 66.9, 81_559 * _MIB),
    "h20": Device(r"\bH20\b", 148.0, 44.0, 97_871 * _MIB),
    "a100-40gb": Device(r"\bA100-(SXM4|PCIE)-40GB\b", 312.0, 19.5, 40_960 * _MIB),
    "a100": Device(r"\bA100\b|\bA800\b", 312.0, 19.5, 81_920 * _MIB),
    "l40s": Device(r"\bL40S\b", 362.0, 91.6, 46_068 * _MIB),
    "l4": Device(r"\bL4\b", 121.0, 30.3, 23_034 * _MIB),
    "a10": Device(r"\bA10\b", 125.0, 31.2, 23_028 * _MIB),
}
"""Name -> ratings. The first pattern that matches counts; h100 and a100 are the SXM modules with 80 GB."""


def device(name: str) -> Device:
    """The ratings of a device. Raises ConfigError for one that is not in the table: a guessed peak would make every MFU a guess."""
    found = DEVICES.get(name.lower())
    if found is None:
        raise ConfigError(
            expected=f"a device with known ratings: {', '.join(DEVICES)}", found=repr(name),
            fix="name one of these, or state peak_tflops and memory of yours in a cluster file (docs/clusters.md)",
        )  # fmt: skip
    return found


def peak_tflops(name: str, precision: str) -> float:
    """Peak of the device that the driver calls `name` at bf16 or fp32; with fp8 the one at bf16, which most of the step is, so that mfu
    stays comparable (and can be above 1). Raises EnvironmentProblem for an unknown one."""
    for found in DEVICES.values():
        if re.search(found.pattern, name) and "MIG" not in name:  # a part of a GPU has a part of its peak
            return found.fp32 if precision == "fp32" else found.bf16
    raise EnvironmentProblem(
        expected="a GPU whose peak is known, to say what share of it is used (mfu)", found=repr(name),
        fix=f"set watch.peak_tflops to its dense {precision} peak in 1e12 operations per second, from the maker's data sheet",
    )
