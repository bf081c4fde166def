"""Which preconditioner's scores foretell what a real step does to the probe loss?

    python benchmarks/preconditioners.py

The receipt of the influence stage (rank correlation of forecast and real change over random document batches) for every
preconditioner and choice of parameters, after steps of plain gradient descent and of the trainer's own AdamW (its second moment held
fixed, no momentum). On the small world of the tests: a nano model trained for 240 steps on Markov chains, probes from two of
them. Once over all sources, and once over sources other than the probes' (harder: no document is of the probe's kind). Prints a
table and appends a dated row.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from datetime import date
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests" / name) for name in ("influence", "probe", "distributed", "mixture")]
import small_world  # noqa: E402

from megatron_r1.artifacts.base import Artifact, open_workspace  # noqa: E402
from megatron_r1.artifacts.influence import InfluenceTable  # noqa: E402
from megatron_r1.influence.run import run  # noqa: E402
from megatron_r1.utils import io, machine  # noqa: E402

RESULTS = HERE / "results" / "preconditioners.jsonl"
CASES = [("none", "all"), ("adam", "all"), ("datainf", "all"), ("ekfac", "all"), ("adam", "embeddings"), ("datainf", "embeddings")]
STEPS = {"sgd": "gradient descent", "trainer": "AdamW"}
POOLS = {"all sources": None, "others only": ["twin_a", "twin_b", "shuffled"]}
BATCHES = 24


def spearmans(world: dict[str, Artifact], folder: Path, case: tuple[str, str], step: str, pool: list[str] | None, seed: int) -> list[float]:
    """The receipt's rank correlation for each capability."""
    config = small_world.influence_config(
        preconditioner=case[0],
        parameters=case[1],
        sources=pool,
        validity={"batches": BATCHES, "optimizer": step},
        checkpoints=1,
        fd_check_documents=0,
        share_documents=0,
        seed=seed,
    )
    name = f"{'-'.join(case)}-{step}-{seed}-{pool is None}"
    found = run(config, world, open_workspace(folder / name, "influence", "influence", config, world))
    assert found is not None
    validity = InfluenceTable.open(found).record.validity
    assert validity is not None
    return [entry["spearman"] for entry in validity["capabilities"].values()]


def main() -> None:
    """Run, print, store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="draws of documents and batches; the trained model is the same")
    parser.add_argument("--no-store", action="store_true", help="print only")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = small_world.small_shards(folder)
        world = {"shards": shards, "probe": small_world.small_probe(folder, shards), "checkpoint": small_world.small_checkpoint(folder, shards)}
        for case in CASES:
            for pool, sources in POOLS.items():
                for step in STEPS:
                    found = [s for seed in range(options.seeds) for s in spearmans(world, folder, case, step, sources, seed)]
                    rows.append({"preconditioner": case[0], "parameters": case[1], "pool": pool, "step": step, "mean": float(np.mean(found)), "each": found})
    print(f"Spearman of forecast and real change: mean (lowest) of {2 * options.seeds}, {BATCHES} batches each")
    print(f"{'preconditioner':<16}{'parameters':<12}" + "".join(f"{f'{STEPS[step]}, {pool}':>32}" for pool in POOLS for step in STEPS))
    for first in range(0, len(rows), 4):
        line = "".join(f"{row['mean']:>22.3f} ({min(row['each']):+.3f})" for row in rows[first : first + 4])
        print(f"{rows[first]['preconditioner']:<16}{rows[first]['parameters']:<12}{line}")
    if not options.no_store:
        record = {"date": date.today().isoformat(), "command": shlex.join(["python", *sys.argv]), "seeds": options.seeds, "batches": BATCHES}
        io.append_jsonl(RESULTS, {**record, "machine": machine.describe(), "versions": machine.versions(), "rows": rows})


if __name__ == "__main__":
    main()
