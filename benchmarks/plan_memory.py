#!/usr/bin/env python
"""Memory of a training step: what `megatron-r1 plan` computes against what torch's allocator counts, for several models and settings.

Measured: every allocation and release of torch's CPU allocator from before the model is built to the end of a second step, and their
highest sum; on a GPU (--device gpu) `max_memory_allocated`. Each case is a process of its own, or several (gloo): then every
process is compared with the estimate for its pipeline stage, and the one that is furthest off is shown.
    python benchmarks/plan_memory.py                    # prints a table, appends dated rows to benchmarks/results/plan_memory.jsonl
    python benchmarks/plan_memory.py --case tiny --dry   # one case, nothing written
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "plan_memory.jsonl"

CASES: dict[str, dict] = {
    "tiny": {"model": {"preset": "tiny"}, "micro": 8, "length": 256, "micros": 2},
    "tiny_bf16": {"model": {"preset": "tiny"}, "micro": 8, "length": 256, "micros": 2, "precision": "bf16"},
    "tiny_recompute": {"model": {"preset": "tiny", "num_layers": 12}, "micro": 8, "length": 256, "micros": 1, "recompute": True},
    "small": {"model": {"preset": "small"}, "micro": 16, "length": 256, "micros": 1},
    "deep": {"model": {"preset": "small", "vocab_size": 1024, "num_layers": 24}, "micro": 4, "length": 512, "micros": 1},
    "untied": {"model": {"preset": "small", "tied_embeddings": False}, "micro": 4, "length": 256, "micros": 2},
    "vocabulary": {"model": {"preset": "tiny", "vocab_size": 128256}, "micro": 1, "length": 256, "micros": 1},
    "sharded": {"model": {"preset": "small"}, "micro": 4, "length": 256, "micros": 1, "layout": {"distributed_optimizer": True}},
    "tensor": {"model": {"preset": "small"}, "micro": 8, "length": 256, "micros": 1, "layout": {"tensor": 2, "sequence_parallel": True}, "processes": 2},
    "tensor_only": {"model": {"preset": "small"}, "micro": 8, "length": 256, "micros": 1, "layout": {"tensor": 2}, "processes": 2},
    "pipeline": {"model": {"preset": "small"}, "micro": 4, "length": 256, "micros": 4, "layout": {"pipeline": 2}, "processes": 2},
    "data": {"model": {"preset": "small"}, "micro": 4, "length": 256, "micros": 1, "layout": {"distributed_optimizer": True}, "processes": 2},
    "sharded_bf16": {"model": {"preset": "small"}, "micro": 4, "length": 256, "micros": 1, "precision": "bf16", "layout": {"distributed_optimizer": True}},
}


def measure(name: str, device: str) -> dict:
    """Run one case here. Bytes."""
    import torch

    from megatron_r1.model.build import build_model
    from megatron_r1.model.config import ModelConfig
    from megatron_r1.parallel.config import LayoutConfig
    from megatron_r1.parallel.context import initialize
    from megatron_r1.parallel.ddp import wrap
    from megatron_r1.parallel.optimizer import build_optimizer, step
    from megatron_r1.parallel.schedule import forward_backward
    from megatron_r1.pipeline.memory import Shape, stage_memory
    from megatron_r1.train.objectives import Objective

    case = CASES[name]
    model, layout = ModelConfig.model_validate(case["model"]), LayoutConfig.model_validate({"device": device, **case.get("layout", {})})
    precision, recompute = case.get("precision", "fp32"), case.get("recompute", False)
    ctx = initialize(layout)
    shape = Shape(model, layout, ctx.data_size, case["micro"], case["length"], case["micros"], precision, recompute, device)
    memory = stage_memory(shape, ctx.pipeline_rank)

    def run() -> None:
        chunks = wrap(build_model(model, ctx, seed=1, precision=precision, recompute=recompute), layout, ctx)
        optimizer = build_optimizer(chunks, lr=1e-3, layout=layout, precision=precision)
        objective = Objective(1, ctx.device)
        for number in range(2):
            batches = []
            for micro in range(case["micros"]):
                tokens = torch.randint(model.vocab_size, (case["micro"], case["length"] + 1), generator=torch.Generator().manual_seed(number * 100 + micro))
                batches.append({
                    "tokens": tokens[:, :-1].numpy(), "labels": tokens[:, 1:].numpy(), "loss_mask": torch.ones(case["micro"], case["length"]).numpy(),
                    "segment_ids": torch.zeros(case["micro"], case["length"], dtype=torch.int32).numpy(),
                    "position_ids": torch.arange(case["length"]).expand(case["micro"], -1).numpy(),
                    "source_ids": torch.zeros(case["micro"], dtype=torch.int32).numpy(),
                })  # fmt: skip
            forward_backward(ctx, chunks, objective.forward_step, iter(batches), len(batches), case["length"], case["micro"])
            step(optimizer)

    if device == "gpu":
        torch.cuda.reset_peak_memory_stats()
        run()
        measured = torch.cuda.max_memory_allocated()
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            run()
        measured = most_held(profile)
    every = ctx.gather_objects({"measured": measured, "estimated": memory.peak, "moment": memory.moment, "stage": memory.stage})
    worst = max(every, key=lambda one: abs(one["estimated"] / one["measured"] - 1))
    return {
        "case": name, "model": case["model"], "micro_batch": case["micro"], "seq_length": case["length"], "microbatches": case["micros"], "precision": precision,
        "recompute": recompute, "layout": case.get("layout", {}), "device": device, "processes": ctx.world_size, **worst,
        "error": round(worst["estimated"] / worst["measured"] - 1, 4),
        "parts": {"weights": memory.weights, "gradients": memory.gradients, "optimizer": memory.optimizer, "activations": memory.activations, "working": memory.working},
    }  # fmt: skip


def most_held(profile: Any) -> int:
    """The highest sum of what is allocated, in bytes.

    The profiler sees the threads of Python and autograd. A buffer of a collective may be released by a thread of gloo's, unseen: memory
    counts until it is released or its address is given out again. What gloo's threads allocate for themselves is not seen.
    """
    stack, found = [*profile.profiler.kineto_results.experimental_event_tree()], []
    while stack:
        event = stack.pop()
        stack += event.children
        if event.tag.name == "Allocation":
            found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    at: dict[int, int] = {}
    held = peak = 0
    for _, address, size in sorted(found, key=lambda one: one[0]):
        held -= at.pop(address, 0)
        if size > 0:
            at[address] = size
            held += size
        peak = max(peak, held)
    return peak


def main() -> int:
    """Status 1 when an estimate is off by more than 5 %."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=CASES, help="only this one (may be repeated)")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="where to measure")
    parser.add_argument("--dry", action="store_true", help="append nothing to the results")
    parser.add_argument("--here", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        row = json.dumps(measure(options.here, options.device))
        if os.environ.get("RANK", "0") == "0":
            print(row, flush=True)
        return 0
    from megatron_r1.utils.machine import describe, versions

    rows = []
    print(f"{'case':16} {'measured MiB':>13} {'estimated MiB':>14} {'error':>8}  peak at")
    for name in options.case or CASES:
        processes = CASES[name].get("processes", 1)
        several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
        done = subprocess.run([sys.executable, *several, __file__, "--here", name, "--device", options.device], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
        row = json.loads(done.stdout.splitlines()[-1])
        print(f"{name:16} {row['measured'] / 2**20:13.1f} {row['estimated'] / 2**20:14.1f} {100 * row['error']:+7.2f}%  {row['moment']}", flush=True)
        rows.append({"date": datetime.now(UTC).strftime("%Y-%m-%d"), **row, "machine": describe(), "versions": versions()})
    if not options.dry:
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows)
    return int(any(abs(row["error"]) > 0.05 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
