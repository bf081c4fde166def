"""`megatron-r1 doctor --cluster`: whether these processes can train together. Run it as the training is run, under torchrun or srun.

Every process reports what it is; all of them add numbers up over the network; the first one judges and prints. What would stop a
run, or make it slow or wrong in silence, is a problem (exit status 1); the rest is a remark.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import megatron_r1
from megatron_r1.parallel import device as _device
from megatron_r1.parallel.config import LayoutConfig
from megatron_r1.parallel.context import ParallelContext, initialize
from megatron_r1.utils.errors import EnvironmentProblem
from megatron_r1.utils.machine import versions

BAD_NCCL = (((2, 28, 3), (2, 28, 8), "NVIDIA's Resiliency Extension advises against 2.28.3 to 2.28.8"),)
"""(first, last, why) of NCCL versions that are not to be trained with."""
SMI_FIELDS = ("index", "name", "driver_version", "clocks.sm", "clocks.max.sm", "ecc.errors.uncorrected.volatile.total", "clocks_throttle_reasons.hw_slowdown")
PAYLOAD = 16 << 20
"""Bytes of the timed sum."""


@dataclass
class Report:
    """What one process is. `gpus`: rows of nvidia-smi (SMI_FIELDS), of the first process of a machine; `free`: bytes where the runs go."""

    rank: int
    host: str
    local_rank: int
    python: str
    versions: dict[str, str]
    code: str
    device: str
    nccl: tuple[int, ...] | None
    free: int
    gpus: list[dict[str, str]] = field(default_factory=list)
    remark: str = ""


@dataclass(frozen=True)
class Verdict:
    """Sentences for people. Nothing may start while there are `problems`."""

    problems: list[str]
    remarks: list[str]


def code_fingerprint() -> str:
    """Hash of this package's sources and compiled kernels: equal on all machines, or they run different programs."""
    digest, root = hashlib.sha256(), Path(megatron_r1.__file__).parent
    for path in sorted([*root.rglob("*.py"), *root.rglob("*.yaml"), *root.rglob("*.so")]):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def nvidia_smi() -> tuple[list[dict[str, str]], str]:
    """(a row per GPU of this machine, why there are none)."""
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return [], f"nvidia-smi does not run: {error}"
    if done.returncode:
        return [], f"nvidia-smi fails: {(done.stderr or done.stdout).strip()[:200]}"
    return [dict(zip(SMI_FIELDS, (cell.strip() for cell in line.split(",")))) for line in done.stdout.splitlines() if line.strip()], ""


def report(ctx: ParallelContext, runs: Path) -> Report:
    """This process."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    gpus, why = nvidia_smi() if local == 0 and ctx.device.type != "cpu" else ([], "")
    folder = runs
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return Report(
        ctx.rank, platform.node(), local, platform.python_version(), versions(), code_fingerprint(), f"{ctx.device.type}", _device.nccl_version(),
        shutil.disk_usage(folder).free, gpus, why,
    )  # fmt: skip


def judge(reports: Sequence[Report], needed: int) -> Verdict:
    """What is wrong with these processes together. `needed`: bytes that must be free where the runs go."""
    problems, remarks = [], []
    problems += _differing("python", reports, lambda one: one.python)
    problems += _differing("this package's code", reports, lambda one: one.code)
    problems += _differing("devices", reports, lambda one: one.device)
    problems += _differing("NCCL", reports, lambda one: ".".join(map(str, one.nccl or ())) or "none")
    for package in sorted({name for one in reports for name in one.versions}):
        problems += _differing(package, reports, lambda one, package=package: one.versions.get(package, "not installed"))
    for version in sorted({one.nccl for one in reports if one.nccl}):
        problems += [f"NCCL {'.'.join(map(str, version))}: {why}; install another one" for first, last, why in BAD_NCCL if first <= version <= last]
    for host, free in {one.host: one.free for one in reports}.items():
        if free < needed:
            problems.append(f"{host}: {free / 2**30:.1f} GiB are free where the runs go, {needed / 2**30:.1f} GiB are needed; make room or name another folder with --runs-dir")
    for one in reports:
        if one.remark:
            remarks.append(f"{one.host}: {one.remark}; clocks and memory errors were not looked at")
        problems += [f"{one.host}: {text}" for row in one.gpus for text in _gpu_problems(row)]
    remarks += _slower_clocks(reports)
    return Verdict(problems, remarks)


def _differing(what: str, reports: Sequence[Report], of: Callable[[Report], str]) -> list[str]:
    """A sentence when not all processes agree; the minority is named."""
    found = Counter(map(of, reports))
    if len(found) == 1:
        return []
    usual = found.most_common(1)[0][0]
    others = sorted({f"{one.host} has {of(one)}" for one in reports if of(one) != usual})
    return [f"{what} differs: {', '.join(others[:8])}{' ...' if len(others) > 8 else ''}; the others have {usual}; install the same everywhere"]


def _gpu_problems(row: dict[str, str]) -> list[str]:
    found = []
    errors = row["ecc.errors.uncorrected.volatile.total"]
    if errors.isdigit() and int(errors) > 0:
        found.append(f"GPU {row['index']} has had {errors} uncorrectable memory errors since its driver was loaded; take the machine out, or reset the GPU")
    if row["clocks_throttle_reasons.hw_slowdown"] == "Active":
        found.append(f"GPU {row['index']} is slowed down by its hardware (heat or power); one slow GPU slows all")
    return found


def _slower_clocks(reports: Sequence[Report]) -> list[str]:
    """GPUs whose highest clock is below the others'."""
    highest = {(one.host, row["index"]): int(row["clocks.max.sm"]) for one in reports for row in one.gpus if row["clocks.max.sm"].isdigit()}
    top = max(highest.values(), default=0)
    return [f"{host}: GPU {index} goes up to {clock} MHz, others to {top}" for (host, index), clock in highest.items() if clock < top]


def add_up(ctx: ParallelContext) -> float:
    """Sum numbers over all processes and check the result; collective. Returns bytes a second that left each process in the timed sum.

    Raises EnvironmentProblem when the sum is wrong (a network that loses or swaps data).
    """
    n = ctx.world_size
    numbers = torch.full((PAYLOAD // 4,), float(ctx.rank + 1), device=ctx.device)
    ctx.all_reduce_sum(numbers, over="world")
    _device.synchronize()
    began = time.perf_counter()
    again = torch.ones_like(numbers)
    ctx.all_reduce_sum(again, over="world")
    _device.synchronize()
    seconds = time.perf_counter() - began
    lowest, highest = float(numbers.min()), float(numbers.max())
    if not lowest == highest == n * (n + 1) / 2:
        raise EnvironmentProblem(
            expected=f"the sum {n * (n + 1) // 2} over {n} processes on process {ctx.rank} ({platform.node()})", found=f"{lowest:g} to {highest:g}",
            fix="take this machine out and look at its network; nothing can be trained on a network that adds wrongly",
        )  # fmt: skip
    return 2 * (n - 1) / n * PAYLOAD / seconds


def run(runs: Path, needed: int) -> int:
    """Check and print; every process calls it. Status 0, or 1 on every process when there are problems."""
    ctx = initialize(LayoutConfig())
    reports = ctx.gather_objects(report(ctx, runs))
    speed = add_up(ctx)
    verdict = judge(reports, needed)
    if ctx.is_main:
        _print(reports, speed, verdict)
    ctx.barrier()
    return 1 if verdict.problems else 0


def _print(reports: Sequence[Report], speed: float, verdict: Verdict) -> None:
    first, hosts = reports[0], Counter(one.host for one in reports)
    print(f"{len(reports)} process{'es' * (len(reports) > 1)} on {len(hosts)} machine{'s' * (len(hosts) > 1)}, {first.device}; code {first.code}, python {first.python}")
    print("  " + ", ".join(f"{name} {version}" for name, version in first.versions.items()))
    if first.nccl:
        print(f"  NCCL {'.'.join(map(str, first.nccl))}")
    print(f"  free where the runs go: {min(one.free for one in reports) / 2**30:.1f} GiB at least")
    print(f"  summed over the network: right; {speed / 2**30:.2f} GiB/s from each process at {PAYLOAD >> 20} MiB" if len(reports) > 1 else "  one process: no network to try")
    for text in verdict.remarks:
        print(f"remark: {text}")
    for text in verdict.problems:
        print(f"PROBLEM: {text}", file=sys.stderr)
    print("fit to train" if not verdict.problems else f"{len(verdict.problems)} problem{'s' * (len(verdict.problems) > 1)}: not fit to train", flush=True)


