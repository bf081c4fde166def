"""How much of documents' scores survives when probe directions are cut down to a low rank, on a run of your own.

    python benchmarks/rank_of_directions.py runs/quickstart --train pretrain1

Takes the last checkpoint of a train step (its weights and Adam's second moment), the run's probe and documents of all its sources, and
scores them along each capability's direction, whole and factored, by the ghost engine. Per rank: the recorded bound's share
|D - L R^T| / |D|, the relative error of the scores (L2 over documents) and Spearman's correlation of scores per token with the whole
direction's. One CPU thread, about a minute for the quickstart. Appends a dated row to benchmarks/results/rank_of_directions.jsonl.
"""

from __future__ import annotations

import argparse
import json
import shlex
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_r1.artifacts.base import Artifact, open_artifact
from megatron_r1.artifacts.checkpoint import CheckpointSet
from megatron_r1.artifacts.probe import load_probe
from megatron_r1.data.shards import ShardSet
from megatron_r1.influence.ghost import Ghost
from megatron_r1.influence.probe_gradient import fold_gradient
from megatron_r1.influence.rows import Row, packed
from megatron_r1.model.forward import token_losses
from megatron_r1.model.load import load_model
from megatron_r1.model.precondition import Adam
from megatron_r1.ops.low_rank import factor
from megatron_r1.parallel.checkpoint import load_second_moment
from megatron_r1.parallel.config import LayoutConfig
from megatron_r1.parallel.context import initialize
from megatron_r1.utils import io, machine
from megatron_r1.utils.statistics import spearman

RESULTS = Path(__file__).parent / "results" / "rank_of_directions.jsonl"
RANKS = (4, 8, 16, 32, 64)
BATCH = 4096


def step_of(run: Path, name: str) -> Artifact:
    """The newest finished artifact of a step."""
    found = sorted(run.glob(f"{name}-*/manifest.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise SystemExit(f"no finished step {name} in {run}")
    return open_artifact(found[-1].parent, verify="none")


def cut_down(direction: dict[str, Tensor], rank: int) -> tuple[dict[str, Tensor], float]:
    """The direction that factors of this rank stand for, and the share of its norm that is lost. Gains stay whole."""
    lost, found = 0.0, {}
    for name, part in direction.items():
        left, right, missing = factor(part, rank) if part.ndim == 2 else (part, None, 0.0)
        found[name] = part if right is None else left @ right.t()
        lost += missing**2
    return found, (lost / sum(float(part.double().norm()) ** 2 for part in direction.values())) ** 0.5


def measure(run: Path, train: str, documents: int, windows: int, length: int) -> list[dict[str, Any]]:
    """One row per capability and preconditioner."""
    shards, probe, checkpoints = ShardSet.open(step_of(run, "corpus")), load_probe(step_of(run, "probe")), CheckpointSet.open(step_of(run, train))
    ctx, point = initialize(LayoutConfig(device="cpu"), 0), checkpoints.final
    (model,) = load_model(point, ctx)
    parameters = dict(model.named_parameters())
    moment, step = load_second_moment(point.path, [model], ctx)
    adam = Adam(moment, step, float(checkpoints.optimizer["beta2"]), float(checkpoints.optimizer["eps"]))
    draw, rows = np.random.default_rng(0), list[Row]()
    for source in shards.sources:
        split = shards.split(source)
        for index in draw.permutation(len(split))[:documents]:
            tokens = np.asarray(split.tokens(int(index)))[: length + 1]
            if len(tokens) > 1:
                rows.append(Row(len(rows), tokens))
    lengths, engine, batches = np.array([row.targets for row in rows]), Ghost([model], ctx), packed(rows, BATCH, ctx.device)
    found = []
    for capability, record in probe.capabilities.items():
        own = [Row(i, document.tokens(shards)) for i, document in enumerate(record.documents[:windows])]
        gradient = fold_gradient(lambda batch: token_losses(model, batch), parameters, own, 0, 1, "documents", BATCH, ctx.device).gradient
        for kind, direction in (("none", gradient), ("adam", adam(gradient))):
            factored, shares = zip(*(cut_down(direction, rank) for rank in RANKS))
            scores = engine.scores([direction, *factored], batches)
            exact, rest = scores[:, :1], scores[:, 1:]
            errors = np.linalg.norm(rest - exact, axis=0) / np.linalg.norm(exact)
            ranks = [spearman(exact[:, 0] / lengths, column / lengths) for column in rest.T]
            found.append({"capability": capability, "preconditioner": kind, "documents": len(rows), "step": point.step} | {
                name: [round(float(x), 4) for x in values] for name, values in (("bound", shares), ("error", errors), ("spearman", ranks))
            })  # fmt: skip
    return found


def main() -> None:
    """Run, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run, such as runs/quickstart")
    parser.add_argument("--train", default="pretrain1", help="train step whose last checkpoint is taken")
    parser.add_argument("--documents", type=int, default=20, help="documents per source")
    parser.add_argument("--windows", type=int, default=16, help="probe windows per capability")
    parser.add_argument("--length", type=int, default=256, help="longest document in tokens")
    parser.add_argument("--no-store", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(options.run, options.train, options.documents, options.windows, options.length)
    print(f"{'':<22}" + "".join(f"{f'rank {rank}':>24}" for rank in RANKS) + "\n" + f"{'':<22}" + f"{'bound   error   Spearman':>24}" * len(RANKS))
    for row in rows:
        cells = "".join(f"{bound:>9.3f}{error:>7.3f}{rank:>8.3f}" for bound, error, rank in zip(row["bound"], row["error"], row["spearman"]))
        print(f"{row['capability'] + ', ' + row['preconditioner']:<22}{cells}")
    if not options.no_store:
        config = json.loads((step_of(options.run, options.train).path / "model.json").read_text())
        command = shlex.join(["python", "benchmarks/rank_of_directions.py", f"runs/{options.run.name}", "--train", options.train])
        record = {"date": date.today().isoformat(), "command": command, "ranks": list(RANKS), "model": config, "machine": machine.describe()}
        io.append_jsonl(RESULTS, record | {"versions": machine.versions(), "rows": rows})


if __name__ == "__main__":
    main()
