"""What every kernel benchmark shares: checked first, timed interleaved, compared with a floor.

A case is one op at one shape. Its contestants do the same work; each is checked against fp64 on fresh random inputs before
anything is timed, and a wrong one stops the benchmark. Then rounds: in each, every contestant runs once, in random order, so
that a slow moment of the machine hits all of them; ratios are medians over rounds of the ratio within a round.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

OURS = "csrc"


@dataclass(frozen=True)
class Floors:
    """Measured ceilings of this machine: bytes per second read plus written by a copy, and FLOP/s of a square product."""

    copy: float
    product: dict[torch.dtype, float]


@dataclass
class Case:
    """One op at one shape. `bytes` and `flops` are the fewest the work needs; `target` states a goal in words."""

    op: str
    shape: str
    dtype: torch.dtype
    contestants: dict[str, Callable[[], object]]
    check: Callable[[str], float]
    """Contestant -> its largest error relative to fp64; raises when it is above what the case allows."""
    bytes: float = 0.0
    flops: float = 0.0
    target: str = ""
    floor_contestant: str = ""
    """When the floor is another computation (the plain weight-gradient product), its name among the contestants."""


@dataclass
class Row:
    """What was measured: milliseconds (median), and how many times longer than ours each contestant takes."""

    op: str
    shape: str
    dtype: str
    milliseconds: dict[str, float]
    times_ours: dict[str, float]
    errors: dict[str, float]
    floor_ms: float
    over_floor: float
    target: str
    rounds: int = 0
    notes: list[str] = field(default_factory=list)


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def once(run: Callable[[], object], device: str) -> float:
    """Seconds of one call: by events on a GPU, by the clock on a CPU."""
    if device == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def measure_floors(device: str) -> Floors:
    """Copy bandwidth and product rates, the best of several: ceilings, not averages."""
    size = 1 << (30 if device == "cuda" else 26)
    source = torch.empty(size // 4, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    copy = min(once(lambda: target.copy_(source), device) for _ in range(12))
    side = 8192 if device == "cuda" else 1024
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        rates[dtype] = 2 * side**3 / min(once(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device) for _ in range(8))
    return Floors(2 * size / copy, rates)


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| in fp64; NaN counts as infinite."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    error = float((got - want).norm() / want.norm().clamp_min(1e-300))
    return error if error == error else float("inf")


def run_case(case: Case, floors: Floors, device: str, seconds: float) -> Row:
    """Check every contestant, then time them for about `seconds` in all."""
    errors = {name: case.check(name) for name in case.contestants if name != case.floor_contestant}
    names = list(case.contestants)
    for name in names:  # warm-up: allocations, compilation, caches
        for _ in range(3):
            case.contestants[name]()
    synchronize(device)
    one_round = sum(once(case.contestants[name], device) for name in names)
    rounds = max(9, min(400, int(seconds / max(one_round, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    for _ in range(rounds):
        order.shuffle(names)
        for name in names:
            times[name].append(once(case.contestants[name], device))
    ours = times.get(OURS) or times[next(iter(case.contestants))]
    median = {name: statistics.median(times[name]) for name in case.contestants}
    ratios = {name: statistics.median(t / o for t, o in zip(times[name], ours)) for name in case.contestants}
    if case.floor_contestant:
        floor = median[case.floor_contestant]
        over = 1 / ratios[case.floor_contestant]
    else:
        floor = max(case.bytes / floors.copy, case.flops / floors.product.get(case.dtype, floors.product[torch.float32]))
        over = statistics.median(ours) / floor if floor else 0.0
    return Row(
        op=case.op, shape=case.shape, dtype=str(case.dtype).removeprefix("torch."),
        milliseconds={n: round(v * 1e3, 4) for n, v in median.items()},
        times_ours={n: round(v, 3) for n, v in ratios.items() if n != OURS},
        errors={n: float(f"{v:.2g}") for n, v in errors.items()},
        floor_ms=round(floor * 1e3, 4), over_floor=round(over, 3), target=case.target, rounds=rounds,
    )  # fmt: skip
