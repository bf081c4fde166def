"""What accelerators are rated at: peaks for MFU, memory for plans. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.utils.errors import ConfigError


@dataclass(frozen=True)
class Device:
    """`tflops`: dense bf16 products with fp32 sums, 10^12 FLOP/s, by the maker's data sheet. `memory`: bytes as the driver reports them."""

    tflops: float
    memory: int


_MIB = 1 << 20

DEVICES = {
    "b200": Device(2250.0, 183_359 * _MIB),
    "h200": Device(989.4, 143_771 * _MIB),
    "gh200": Device(989.4, 97_871 * _MIB),
    "h100": Device(989.4, 81_559 * _MIB),
    "h100-pcie": Device(756.0, 81_559 * _MIB),
    "a100": Device(312.0, 81_920 * _MIB),
    "a100-40gb": Device(312.0, 40_960 * _MIB),
    "l40s": Device(362.0, 46_068 * _MIB),
}
"""Name -> ratings; h100 and a100 are the SXM modules with 80 GB."""


def device(name: str) -> Device:
    """The ratings of a device. Raises ConfigError for one that is not in the table: a guessed peak would make every MFU a guess."""
    found = DEVICES.get(name.lower())
    if found is None:
        raise ConfigError(
            expected=f"a device with known ratings: {', '.join(DEVICES)}", found=repr(name),
            fix="name one of these, or state peak_tflops and memory of yours in a cluster file (docs/clusters.md)",
        )  # fmt: skip
    return found
