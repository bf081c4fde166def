"""Influence mixture against uniform ones at equal tokens, from the same start, over several seeds.

    python benchmarks/influence_vs_uniform.py --seeds 1 2 3

For every seed the recipe (benchmarks/recipes/controls.yaml) runs up to three second pre-training phases: same start, same
tokens, same order seeds, only the mixture differs: by influence, uniform over the pool, uniform over the pool's real
sources. Prints and appends one dated row: final probe loss per capability under each, the differences, and their means over
seeds with a 95 % t-interval. Whatever comes out is stored.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from datetime import date
from pathlib import Path

from evidence import interval

from megatron_r1.artifacts.base import Artifact
from megatron_r1.pipeline.recipe import load_recipe
from megatron_r1.pipeline.runner import run_recipe
from megatron_r1.utils import io, machine

RESULTS = Path(__file__).parent / "results" / "influence_vs_uniform.jsonl"
STEPS = {"influence": "pretrain2", "uniform": "pretrain2_uniform", "uniform_real": "pretrain2_real"}
"""What is compared -> train step."""


def probe_losses(artifact: Artifact) -> dict[str, float]:
    """Capability -> last probe loss (nats per token) of a training step."""
    records = [record for record in io.read_jsonl(artifact.file("metrics.jsonl")) if record.get("validation")]
    last = records[-1]["validation"]
    return {name.removeprefix("probe/"): value for name, value in last.items() if name.startswith("probe/")}


def compare(rows: list[dict], control: str) -> dict[str, dict[str, float]]:
    """Capability -> mean gain over a control in nats per token, its interval, and how many seeds gained. Prints it too."""
    summary = {}
    for name in rows[0]["influence"]:
        gains = [row[control][name] - row["influence"][name] for row in rows]
        gain = interval(gains)
        wins = sum(gain > 0 for gain in gains)
        summary[name] = {"mean_gain_nats": gain["mean"], "low": gain["low"], "high": gain["high"], "wins": wins, "seeds": len(rows)}
        print(f"{name:>12}: {control} - influence = {gain['mean']:+.4f} nats/token, 95 % [{gain['low']:+.4f}, {gain['high']:+.4f}], better in {wins} of {len(rows)}")
    return summary


def main() -> None:
    """Run, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default=str(Path("benchmarks/recipes/controls.yaml")))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()

    rows = []
    for seed in options.seeds:
        # The corpus keeps its own seed (1), so that seeds differ in training and measuring, not in the split of the text.
        recipe = load_recipe(options.recipe, [f"seed={seed}", "steps.corpus.seed=1", *options.overrides])
        row: dict = {"seed": seed}
        for name, step in STEPS.items():
            done = run_recipe(recipe, options.runs_dir, shlex.join(sys.argv), until=step, verify="sizes")
            row[name] = probe_losses(done[-1].artifact)
        rows.append(row)
        print(f"seed {seed}: " + "; ".join(f"{name} " + ", ".join(f"{c} {v:.4f}" for c, v in row[name].items()) for name in STEPS), flush=True)

    RESULTS.parent.mkdir(exist_ok=True)
    summary = {control: compare(rows, control) for control in STEPS if control != "influence"}
    io.append_jsonl(
        RESULTS,
        {
            "date": date.today().isoformat(), "command": "python " + shlex.join(sys.argv), "recipe": options.recipe, "overrides": options.overrides,
            "machine": machine.describe(), "versions": machine.versions(), "rows": rows, "summary": summary,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
