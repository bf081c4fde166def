"""Mixtures compared over several seeds: who trains the better model at equal tokens, and does influence foretell what a source is worth?

    python benchmarks/evidence.py --seeds 1 2 3 4 5 --leave-one-out 3
    python benchmarks/evidence.py --recipe benchmarks/recipes/coevolution.yaml --against dropped --family trained --seeds 1 2 3 4 5

The recipe (benchmarks/recipes/evidence.yaml) runs for every seed; what is done is skipped, so more seeds can be added later. Compared
are the trainings of one family of the recipe, such as compared-influence, compared-uniform, ...: same start, same tokens, same order
seeds within a seed, only the mixture differs. Appends one dated row to benchmarks/results/evidence.jsonl: for every training the last loss on the probe
and on held-out text; their differences to `--against`, seed by seed, with a two-sided 95 % t-interval; and, where the recipe leaves sources
out, Spearman of the real and the foretold effect of every source, averaged over the seeds. Whatever comes out is stored.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path

import numpy as np

from megatron_r1.artifacts.base import Artifact
from megatron_r1.pipeline.recipe import load_recipe
from megatron_r1.pipeline.runner import Done, run_recipe
from megatron_r1.report.collect import collect
from megatron_r1.report.leave_one_out import analyses, ranks
from megatron_r1.utils import io, machine
from megatron_r1.utils.statistics import spearman, t_quantile

RESULTS = Path(__file__).parent / "results" / "evidence.jsonl"
MEAN = "mean"
KINDS = {"probe": "probe/", "held_out": "test/"}
"""What is compared -> prefix of its validation streams."""
Losses = dict[str, dict[str, float]]
"""kind -> stream or mean -> nats per token (probe) or bits per byte (held-out text, whose domains differ in bytes per token)."""


def losses(artifact: Artifact) -> Losses:
    """Last measured losses of a training."""
    last = [record for record in io.read_jsonl(artifact.file("metrics.jsonl")) if record.get("validation")][-1]
    values = {"probe": last["validation"], "held_out": last["bits_per_byte"]}
    found = {kind: {name.removeprefix(prefix): values[kind][name] for name in values[kind] if name.startswith(prefix)} for kind, prefix in KINDS.items()}
    return {kind: {**each, MEAN: statistics.fmean(each.values())} for kind, each in found.items()}


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean and two-sided 95 % t-interval over seeds."""
    mean = statistics.fmean(values)
    half = t_quantile(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return {"mean": round(mean, 4), "low": round(mean - half, 4), "high": round(mean + half, 4)}


def compared(seeds: Mapping[int, Mapping[str, Losses]], against: str) -> dict[str, dict]:
    """arm -> kind -> its mean loss over seeds, and per stream what `against` gains on it: mean, interval, seeds won."""
    arms = list(next(iter(seeds.values())))
    found: dict[str, dict] = {}
    for arm in arms:
        found[arm] = {}
        for kind in KINDS:
            streams = seeds[next(iter(seeds))][arm][kind]
            level = {name: round(statistics.fmean(row[arm][kind][name] for row in seeds.values()), 4) for name in streams}
            found[arm][kind] = {"level": level}
            if arm != against:
                gains = {name: [row[arm][kind][name] - row[against][kind][name] for row in seeds.values()] for name in streams}
                found[arm][kind]["gain"] = {name: {**interval(each), "wins": sum(gain > 0 for gain in each)} for name, each in gains.items()}
    return found


def left_out(runs: Sequence[Sequence[Artifact]]) -> dict[str, dict]:
    """influence step -> Spearman of truth and prediction over sources: both averaged over the seeds, and each seed by itself."""
    seeds = [analyses(collect(artifacts)) for artifacts in runs]
    if not seeds or not all(len(each) == 1 and each[0].predictions for each in seeds):
        return {}
    found = {}
    for k, prediction in enumerate(seeds[0][0].predictions):
        capabilities = [name for name in seeds[0][0].capabilities if name != "joint"]
        tables = [(each[0].truth, each[0].predictions[k].values) for each in seeds]
        truth, predicted = (_mean([table[side] for table in tables]) for side in (0, 1))
        together = ranks(truth, predicted, tuple(capabilities))
        found[prediction.preconditioner] = {
            "spearman": {r.capability: {"value": _round(r.spearman), "low": _round(r.low), "high": _round(r.high)} for r in together},
            "by_seed": {r.capability: [_round(next(x.spearman for x in each[0].predictions[k].ranks if x.capability == r.capability)) for each in seeds] for r in together},
            "truth": {source: {c: _round(v) for c, v in values.items()} for source, values in truth.items()},
            "predicted": {source: {c: _round(v) for c, v in values.items()} for source, values in predicted.items()},
            # How well one seed's truth foretells another's: what no prediction can be expected to exceed by much.
            "truth_between_seeds": _round(_between([truth for truth, _ in tables])),
        }
    return found


def _mean(tables: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    return {source: {c: statistics.fmean(table[source][c] for table in tables) for c in values} for source, values in tables[0].items()}


def _between(truths: Sequence[Mapping[str, Mapping[str, float]]]) -> float | None:
    """Mean Spearman of the joint truth over pairs of seeds."""
    columns = [np.array([truth[source]["joint"] for source in truths[0]]) for truth in truths]
    pairs = [spearman(a, b) for i, a in enumerate(columns) for b in columns[i + 1 :]]
    known = [pair for pair in pairs if pair is not None]
    return statistics.fmean(known) if known else None


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 5)


def print_table(table: Mapping[str, dict], against: str, out: Callable[[str], None] = print) -> None:
    """For the terminal, best first."""
    for kind, unit in (("probe", "nats per token"), ("held_out", "bits per byte")):
        out(f"{kind}, {unit}, mean of its streams; gain of {against} over it, 95 % t-interval over seeds, and seeds won")
        for arm, each in sorted(table.items(), key=lambda item: item[1][kind]["level"][MEAN]):
            gain = each[kind].get("gain")
            said = "" if gain is None else "  {mean:+.4f} [{low:+.4f}, {high:+.4f}]  {wins} won".format(**gain[MEAN])
            out(f"  {arm:<16} {each[kind]['level'][MEAN]:.4f}{said}")


def main() -> None:
    """Run, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="benchmarks/recipes/evidence.yaml")
    parser.add_argument("--family", default="compared", help="the recipe's family of trainings to compare")
    parser.add_argument("--against", default="influence", help="the member of the family the others are compared with")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--leave-one-out", type=int, default=None, metavar="N", help="leave sources out for the first N seeds only (default: all)")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()

    def steps(seed: int, until: str | None = None, *more: str) -> list[Done]:
        # The corpus keeps its own seed (1), so that seeds differ in training and measuring, not in the split of the text.
        recipe = load_recipe(options.recipe, [f"seed={seed}", "steps.corpus.seed=1", *options.overrides, *more])
        return run_recipe(recipe, options.runs_dir, shlex.join(sys.argv), until=until, verify="sizes")

    prefix = f"{options.family}-"
    rows: dict[int, dict[str, Losses]] = {}
    for seed in options.seeds:
        rows[seed] = {d.step.removeprefix(prefix): losses(d.artifact) for d in steps(seed, options.family) if d.step.startswith(prefix)}
        print(f"seed {seed}: " + ", ".join(f"{arm} {row['probe'][MEAN]:.4f}" for arm, row in rows[seed].items()), flush=True)
    whole = options.seeds[: options.leave_one_out]
    runs = [[d.artifact for d in steps(seed) if d.artifact.kind != "report"] for seed in whole]
    table, agreement = compared(rows, options.against), left_out(runs)
    print_table(table, options.against)
    for name, each in agreement.items():
        said = ", ".join(f"{c} {v['value']} [{v['low']}, {v['high']}]" for c, v in each["spearman"].items())
        print(f"leave-one-out, Spearman of truth and prediction ({name}): {said}; truth between seeds {each['truth_between_seeds']}")
    row = {
        "date": date.today().isoformat(), "command": "python " + shlex.join(sys.argv), "recipe": options.recipe, "overrides": options.overrides,
        "machine": machine.describe(), "versions": machine.versions(), "against": options.against, "seeds": {str(seed): row for seed, row in rows.items()},
        "compared": table, "leave_one_out": agreement,
    }  # fmt: skip
    io.append_jsonl(RESULTS, row)
    # The page of one whole run, now with what all of them say.
    text = json.dumps(row, indent=1)
    file = options.runs_dir / f"over_seeds-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"
    io.atomic_write_text(file, text)
    print(steps((whole or options.seeds)[-1], None, f"steps.report.seeds={file}")[-1].artifact.file("report.html"))


if __name__ == "__main__":
    main()
