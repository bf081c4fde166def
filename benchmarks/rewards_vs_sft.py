"""Does training on rewards help a small model more than fine-tuning on worked answers? The last steps of quickstart_grpo, on a finished quickstart.

    megatron-r1 run quickstart
    python benchmarks/rewards_vs_sft.py --quickstart runs/quickstart --steps 100

Four models answer the same held-out questions: fine-tuned for the format only, the same then rewarded, fine-tuned, the same then rewarded.
Prints and appends one dated row: share of right answers of each with its 95 % interval, per task, what rewards changed (paired over
questions), and how reward, length and the share of groups without a difference moved. Whatever comes out is stored.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from datetime import date
from pathlib import Path
from typing import Any

from megatron_r1.artifacts.base import MANIFEST, Artifact, open_artifact, open_workspace
from megatron_r1.pipeline.recipe import load_recipe
from megatron_r1.utils import io, machine

RESULTS = Path(__file__).parent / "results" / "rewards_vs_sft.jsonl"
STEPS = {
    "eval_sft": "sft", "sft_format": None, "eval_format": "sft_format", "grpo_base": None, "eval_grpo_base": "grpo_base", "grpo_final": None, "eval_grpo_final": "grpo_final",
}
"""Steps that are run, in this order, and the model an evaluation is of."""
CURVE = ("correct", "marked", "ended", "tied", "length", "entropy")


def made(folder: Path, step: str) -> Artifact:
    """The newest artifact of a step of a run."""
    found = sorted((path for path in folder.glob(f"{step}-????????") if (path / MANIFEST).is_file()), key=lambda path: path.stat().st_mtime)
    if not found:
        raise SystemExit(f"expected a finished step {step} in {folder}; run the quickstart first")
    return open_artifact(found[-1], verify="sizes")


def answers(artifact: Artifact) -> dict[str, Any]:
    """Right answers of an evaluation."""
    found = io.read_json(artifact.file("evaluation.json"))
    pooled = next(result for result in found["results"] if result["group"] == "pooled")
    tasks = {result["task"]: round(result["value"], 4) for result in found["results"] if result["metric"] == "accuracy" and result["group"] == "generated"}
    row = {"accuracy": pooled["value"], "low": pooled["low"], "high": pooled["high"], "n": pooled["n"], "tasks": tasks}
    change = next((change for change in found["comparison"] if change["task"] == pooled["task"]), None)
    return row | ({} if change is None else {"change": {key: change[key] for key in ("difference", "low", "high")}})


def curve(artifact: Artifact) -> dict[str, Any]:
    """First and last record of a rewarded phase, and its time."""
    records = [record for record in io.read_jsonl(artifact.file("metrics.jsonl")) if "grpo" in record]
    ends = {end: {"reward": round(record["reward"], 4), **{key: round(record["grpo"][key], 4) for key in CURVE}} for end, record in (("first", records[0]), ("last", records[-1]))}
    writing = sum(record["generation_seconds"] for record in records) / len(records)
    return ends | {"steps": records[-1]["step"], "seconds": round(records[-1]["seconds"], 1), "generation_seconds_per_step": round(writing, 3)}


def main() -> None:
    """Run, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, default=Path("runs/quickstart"), help="a finished run of the quickstart; nothing in it is changed")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/rewards_vs_sft"))
    parser.add_argument("--steps", type=int, default=100, help="rewarded steps")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()

    budgets = [f"steps.{step}.budget={options.steps} steps" for step in ("grpo_base", "grpo_final")]
    # The evaluation of the fine-tuned model is made anew, so that all four are asked by the same code.
    alike = [f"steps.eval_sft.tasks.{task}=null" for task in ("bits_per_byte", "country_mcq", "humaneval_ranking", "humaneval_pass")]
    recipe = load_recipe("quickstart_grpo", [*budgets, *alike, "steps.eval_sft.inputs.baseline=null", "steps.eval_format.inputs.baseline=null", *options.overrides])
    known: dict[str, Artifact] = {}
    for step in STEPS:
        inputs = {role: known[name] if name in known else made(options.quickstart, name) for role, name in recipe.inputs(step).items() if isinstance(name, str)}
        config = recipe.steps[step]
        stage = recipe.stage(step)
        work = open_workspace(options.runs_dir, step, stage.kind, config, inputs, shlex.join(sys.argv))
        known[step] = open_artifact(work.final, verify="sizes") if (work.final / MANIFEST).is_file() else stage.run(config, inputs, work)
    found = {model: answers(known[step]) for step, model in STEPS.items() if model}
    curves = {step: curve(known[step]) for step in ("grpo_base", "grpo_final")}
    for model, row in found.items():
        change = "".join(f", change {row['change'][key]:+.3f}" if key == "difference" else f" {row['change'][key]:+.3f}" for key in row.get("change", ()))
        print(f"{model:>12}: {100 * row['accuracy']:.1f} % of {row['n']} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]{change}")
    for step, row in curves.items():
        print(f"{step}: {row}")
    row = {
        "date": date.today().isoformat(), "command": "python " + shlex.join(sys.argv), "overrides": options.overrides, "machine": machine.describe(),
        "versions": machine.versions(), "models": found, "curves": curves,
    }
    io.append_jsonl(RESULTS, row)


if __name__ == "__main__":
    main()
