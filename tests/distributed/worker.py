"""What each of the two ranks runs: every layout, one after the other, in one process start."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from scenarios import Run

from megatron_r1.model.build import build_model
from megatron_r1.parallel import checkpoint, context
from megatron_r1.parallel.config import LayoutConfig


def resume(layout: LayoutConfig, path: Path, **options: Any) -> bool:
    """Save after two steps, continue to four; start anew, load, continue: bit for bit the same?"""
    first = Run(layout, **options)
    first.steps(2)
    first.save(path)
    straight = first.steps(2)
    second = Run(layout, seed=6, **options)
    second.load(path)
    again = second.steps(2)
    same_weights = all(torch.equal(a, b) for one, two in zip(first.chunks, second.chunks) for a, b in zip(one.parameters(), two.parameters()))
    return straight == again and same_weights


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    arguments = json.loads((folder / "arguments.json").read_text())
    results: dict[str, Any] = {}
    for name, case in arguments["cases"].items():
        started = time.monotonic()
        run = Run(LayoutConfig(**case["layout"]), **case.get("options", {}))
        results[name] = run.steps()
        run.save(folder / name)
        if case.get("continue"):
            results[f"{name} continued"] = run.steps(2)
        if case.get("validate"):
            results[f"{name} validation"] = run.validation()
        print(f"{name}: {time.monotonic() - started:.1f} s", flush=True)
    for name, case in arguments.get("resume", {}).items():
        results[f"resume {name}"] = resume(LayoutConfig(**case["layout"]), folder / f"resume-{name}", **case.get("options", {}))
    for name, case in arguments.get("load", {}).items():
        run = Run(LayoutConfig(**case["layout"]), seed=9)
        run.load(Path(case["path"]))
        results[f"load {name}"] = run.steps(2)
        ctx = run.ctx
        moments, step = checkpoint.load_second_moment(Path(case["path"]), run.chunks, ctx)
        total = torch.stack([v.double().sum() for n, v in sorted(moments.items()) if "layernorm" not in n]).sum()
        results[f"moments {name}"] = [step, float(ctx.all_reduce_sum(total, over="model"))]
    if arguments.get("damage"):
        ctx = context.initialize(LayoutConfig(**arguments["damage"]["layout"]), seed=0)
        chunks = build_model(Run(ctx.layout).model, ctx, seed=1)
        try:
            checkpoint.load(Path(arguments["damage"]["path"]), chunks, None, ctx)
            results["damage"] = "loaded"
        except checkpoint.CheckpointError as error:
            results["damage"] = str(error)
    (folder / f"result-{context.current().rank}.json").write_text(json.dumps(results))
    context.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
