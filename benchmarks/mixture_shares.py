"""How far from its share can a source be, and how long does the order of samples take to start?

    python benchmarks/mixture_shares.py

For tables of shares: the proven bound (in samples, at every prefix), the largest error found at random prefixes up to 2^40, CPU seconds from
weights to the first sample, and memory for it. Prints a table and appends dated rows.
"""

from __future__ import annotations

import random
import time
import tracemalloc
from datetime import date
from pathlib import Path

from megatron_r1.data.mixture_order import RESOLUTION, MixtureOrder, quantise
from megatron_r1.utils import io, machine

RESULTS = Path(__file__).parent / "results" / "mixture_shares.jsonl"
PREFIXES = 300


def tables() -> dict[str, list[float]]:
    """Name -> shares."""
    draw = random.Random(0)
    return {
        "published, pre-training phase 1": [10.66, 6.93, 63.75, 5.03, 6.36, 5.03, 2.25],
        "2 equal": [1.0] * 2, "8 equal": [1.0] * 8, "13 equal": [1.0] * 13,
        "13 drawn at random (the worst of 100)": max(([draw.expovariate(1) for _ in range(13)] for _ in range(100)), key=lambda w: _order(w).max_error),
        "7 of share 1, 7 of 1e-3, 7 of 1e-6": [10.0**-e for e in (0, 3, 6) for _ in range(7)],
        "10,000 equal": [1.0] * 10_000, "10,000, share 1/rank": [1 / rank for rank in range(1, 10_001)],
    }  # fmt: skip


def _order(weights: list[float]) -> MixtureOrder:
    names = [f"s{i:05d}" for i in range(len(weights))]
    return MixtureOrder(dict.fromkeys(names, 210_000), dict(zip(names, weights)), 1)


def main() -> None:
    """Measure and print."""
    print(f"{'shares':40s} {'bound':>7s} {'found':>7s} {'start':>8s} {'memory':>8s}")
    for name, weights in tables().items():
        began = time.process_time()
        order = _order(weights)
        order.locate(0)
        seconds = time.process_time() - began
        tracemalloc.start()
        _order(weights).locate(0)
        memory = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        exact, draw, found = quantise(dict(zip(order.blocks, weights))), random.Random(1), 0.0
        for _ in range(PREFIXES if len(weights) < 1000 else 20):
            n = draw.randrange(1, 1 << draw.randrange(2, 41))
            counts = order.counts(n)
            found = max(found, *(abs(counts[source] - n * share / RESOLUTION) for source, share in exact.items()))
        print(f"{name:40s} {order.max_error:7.3f} {found:7.3f} {seconds:6.2f} s {memory / 2**20:5.1f} MB")
        io.append_jsonl(RESULTS, {
            "date": date.today().isoformat(), "shares": name, "bound": round(order.max_error, 4), "found": round(found, 4), "cpu_seconds": round(seconds, 3),
            "memory_mb": round(memory / 2**20, 2), "machine": machine.describe(), "command": "python benchmarks/mixture_shares.py",
        })  # fmt: skip


if __name__ == "__main__":
    main()
