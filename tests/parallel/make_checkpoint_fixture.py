"""Writes the checkpoint that stands for this release's format in the tests of later releases: python tests/parallel/make_checkpoint_fixture.py

    fixtures/format-N/checkpoint/   as `parallel.checkpoint.save` wrote it: 15 k parameters, fp32, after two steps
    fixtures/format-N/expected.json the losses and gradient norms of the two steps after it, and sums over weights and moments

Run it once for a new format, into a new folder; fixtures of earlier formats stay as they are, and must go on loading.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent / "distributed")]

import scenarios  # noqa: E402

from megatron_r1.model.config import ModelConfig  # noqa: E402
from megatron_r1.parallel import checkpoint  # noqa: E402
from megatron_r1.parallel.config import LayoutConfig  # noqa: E402
from megatron_r1.parallel.optimizer import local_states  # noqa: E402

FIXTURES = HERE / "fixtures"
SMALL = ModelConfig(vocab_size=256, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, ffn_size=32)


def small_run(layout: LayoutConfig | None = None, seed: int = 5, **options: Any) -> scenarios.Run:
    """The run of the distributed tests, on the smallest model."""
    whole, scenarios.MODEL = scenarios.MODEL, SMALL
    try:
        return scenarios.Run(layout or LayoutConfig(), seed=seed, **options)
    finally:
        scenarios.MODEL = whole


def sums(run: scenarios.Run) -> dict[str, float]:
    """Sum of magnitudes of weights and of each moment, fp64."""
    found = {"weights": sum(float(p.detach().double().abs().sum()) for chunk in run.chunks for p in chunk.parameters())}
    for _, _, tensors in local_states(run.optimizer):
        for kind in ("exp_avg", "exp_avg_sq"):
            found[kind] = found.get(kind, 0.0) + float(tensors[kind].double().abs().sum())
    return found


if __name__ == "__main__":
    folder = FIXTURES / f"format-{checkpoint.FORMAT}"
    if folder.exists():
        raise SystemExit(f"{folder} exists: a released format does not change")
    run = small_run()
    run.steps(2)
    run.save(folder / "checkpoint")
    expected = {"sums": sums(run), "steps": run.steps(2)}
    (folder / "expected.json").write_text(json.dumps(expected, indent=2) + "\n")
