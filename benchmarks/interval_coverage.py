"""How often do the intervals of the weights hold the true weight, and how often do they raise a false alarm?

    python benchmarks/interval_coverage.py --repetitions 1000

Simulated scores of a crossed design (documents x probe folds, tests/mixture/toy_tables.py), four sources of known benefit,
nominal 95 %: coverage of the weights of Eq. 6 with the bootstrap as it is and without its correction for few units, and the
share of intervals that exclude 0 in a world where no source does anything. Prints a table and appends a dated row.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "mixture"))
from toy_tables import crossed, toy_table

from megatron_r1.artifacts import influence
from megatron_r1.mixture.config import MixtureConfig
from megatron_r1.mixture.solve import measure, solve
from megatron_r1.utils import io, machine

RESULTS = Path(__file__).parent / "results" / "interval_coverage.jsonl"
MEANS = {"a": 1.0, "b": 0.7, "c": 0.4, "d": 0.2}
DESIGNS = ((40, 8, 0.15), (40, 4, 0.15), (12, 8, 0.02), (40, 1, 0.0), (12, 1, 0.0))
"""Documents a source, probe folds (1: no noise of the probe), standard deviation of a fold's effect."""
CONFIG = MixtureConfig.model_validate(
    {"method": "influence", "inputs": {"shards": "s", "influence": "i"}, "seed": 1, "floor": 0.0, "bootstrap": 300}
)


def coverage(documents: int, folds: int, probe_sd: float, repetitions: int) -> float:
    """Share of intervals, over sources and repetitions, that hold the population weight."""
    rng = np.random.default_rng(5)
    inside = []
    for repetition in range(repetitions):
        table = toy_table(crossed(rng, MEANS, documents, folds, 0.5, probe_sd, 0.2))
        found = solve(CONFIG, table, dict.fromkeys(MEANS, 1000), repetition).intervals
        inside += [low <= MEANS[name] / sum(MEANS.values()) <= high for name, (low, high) in found.items()]
    return float(np.mean(inside))


def alarms(documents: int, folds: int, probe_sd: float, repetitions: int) -> float:
    """Share of intervals that exclude 0 where every source's benefit is 0."""
    rng = np.random.default_rng(9)
    excluded = []
    for repetition in range(repetitions):
        table = toy_table(crossed(rng, dict.fromkeys("abcdef", 0.0), documents, folds, 0.5, probe_sd, 0.2))
        found = measure(CONFIG, table, table.sources, repetition)
        excluded += [low > 0 or high < 0 for low, high in found.rho_intervals.values()]
    return float(np.mean(excluded))


def main() -> None:
    """Run, print, store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=1000)
    parser.add_argument("--no-store", action="store_true", help="print only")
    options = parser.parse_args()
    rows = []
    print(f"{'documents':>9} {'folds':>5} {'probe sd':>8}   coverage   uncorrected   false alarms   uncorrected")
    for design in DESIGNS:
        runs: list[Callable[..., float]] = [coverage, alarms]
        corrected = [run(*design, options.repetitions) for run in runs]
        with mock.patch.object(influence, "stretch", return_value=1.0):
            plain = [run(*design, options.repetitions) for run in runs]
        rows.append({"design": design, "coverage": corrected[0], "coverage_uncorrected": plain[0], "alarms": corrected[1], "alarms_uncorrected": plain[1]})
        print(f"{design[0]:>9} {design[1]:>5} {design[2]:>8.2f} {corrected[0]:>10.3f} {plain[0]:>13.3f} {corrected[1]:>14.3f} {plain[1]:>13.3f}")
    if not options.no_store:
        record = {"date": date.today().isoformat(), "command": shlex.join(["python", *sys.argv]), "repetitions": options.repetitions}
        io.append_jsonl(RESULTS, {**record, "machine": machine.describe(), "versions": machine.versions(), "rows": rows})


if __name__ == "__main__":
    main()
