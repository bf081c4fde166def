"""What scoring documents costs, against a plain forward and backward pass of the same batch.

    python benchmarks/influence_engines.py                 7 rounds, about two minutes of one core
    python benchmarks/influence_engines.py --no-store

One thread, fp32: a decoder of hidden size 256, 4 layers, vocabulary 4096, tied head, 8 documents of 256 tokens, trained for a
few steps. All contestants run in turn in one process, round after round; a figure is the median over rounds of a contestant's CPU
seconds over the plain pass's in the same round (wall time would count who else uses the machine). Memory: the peak over the loaded
model, each contestant in a process of its own. Error: against every document's gradient in float64 (relative, L2). Appends a dated
row to benchmarks/results/influence_engines.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from megatron_r1.influence.finite_difference import FiniteDifference
from megatron_r1.influence.ghost import Ghost
from megatron_r1.influence.probe_gradient import fold_gradient
from megatron_r1.influence.rows import Row, batches, packed
from megatron_r1.model.build import R1Model, build_model
from megatron_r1.model.config import ModelConfig
from megatron_r1.model.forward import token_losses
from megatron_r1.model.loss import masked_sum
from megatron_r1.model.scores_in_training import ScoresInTraining
from megatron_r1.ops.low_rank import Factors, factor, stack
from megatron_r1.parallel.config import LayoutConfig
from megatron_r1.parallel.context import ParallelContext, initialize
from megatron_r1.parallel.ddp import wrap
from megatron_r1.parallel.schedule import forward_backward
from megatron_r1.utils import io, machine

RESULTS = Path(__file__).parent / "results" / "influence_engines.jsonl"
MODEL = ModelConfig(vocab_size=4096, hidden_size=256, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=32, ffn_size=688)
DOCUMENTS, TOKENS, DIRECTIONS, WARM_UP = 8, 256, 4, 12
RANK = 16
PLAIN, STEP = "forward and backward", "the same as a training step does it"
IN_TRAINING = {"in training, rank 16, 1 direction": (RANK, 1), "in training, rank 16, 3 directions": (RANK, 3), "in training, whole, 1 direction": (None, 1)}
GOALS = {"ghost, 1 direction": 1.10, "ghost, 4 directions": 1.60, "finite differences": 0.68, next(iter(IN_TRAINING)): 1.10}
"""At most these times a plain pass. Memory: 1.1 times."""


def documents(seed: int, count: int) -> list[Row]:
    """Walks on one random graph of four successors a token, a fifth of the steps anywhere."""
    graph = np.random.default_rng(0).integers(0, MODEL.vocab_size, (MODEL.vocab_size, 4))
    draw = np.random.default_rng(seed)
    rows = []
    for unit in range(count):
        tokens = [int(draw.integers(MODEL.vocab_size))]
        while len(tokens) <= TOKENS:
            tokens.append(int(draw.integers(MODEL.vocab_size) if draw.random() < 0.2 else graph[tokens[-1], draw.integers(4)]))
        rows.append(Row(unit, np.array(tokens)))
    return rows


def trained(ctx: ParallelContext) -> R1Model:
    """A model that has left its start."""
    model = build_model(MODEL, ctx, seed=0)[0].eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(WARM_UP):
        (batch,) = batches(documents(100 + step, DOCUMENTS), DOCUMENTS * TOKENS, ctx.device)
        token_losses(model, batch.tensors).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


class World:
    """Model, documents, directions, and the contestants: each returns float64 [documents, directions], the plain pass None."""

    def __init__(self, warm_up: bool = True) -> None:
        self.ctx = initialize(LayoutConfig(device="cpu"), 0)
        self.model = trained(self.ctx) if warm_up else build_model(MODEL, self.ctx, seed=0)[0].eval()
        self.parameters = dict(self.model.named_parameters())
        self.rows = documents(1, DOCUMENTS)
        (self.batch,), self.packed = batches(self.rows, DOCUMENTS * TOKENS, self.ctx.device), packed(self.rows, DOCUMENTS * TOKENS, self.ctx.device)
        self.directions = [self._direction(k) for k in range(DIRECTIONS)]

    def _direction(self, number: int) -> dict[str, torch.Tensor]:
        rows = documents(10 + number, 4)
        return fold_gradient(
            lambda batch: token_losses(self.model, batch), self.parameters, rows, 0, 1, "documents", 4 * TOKENS, self.ctx.device
        ).gradient

    def plain(self) -> None:
        """What training does with the batch, up to the gradients."""
        (token_losses(self.model, self.batch.tensors) * self.batch.tensors["loss_mask"]).sum().backward()
        self.model.zero_grad(set_to_none=True)

    def ghost(self, directions: int) -> np.ndarray:
        """The default engine."""
        return Ghost([self.model], self.ctx).scores(self.directions[:directions], self.packed)

    def differences(self) -> np.ndarray:
        """Two forwards."""
        return self.engine.scores(self.directions[0], [self.batch])[:, None]

    def _trainer(self) -> list[nn.Module]:
        """The model wrapped for training, made once."""
        if not hasattr(self, "chunks"):
            chunks = build_model(MODEL, self.ctx, seed=0)
            chunks[0].load_state_dict(self.model.state_dict())
            self.chunks = wrap(chunks, self.ctx.layout, self.ctx)
        return self.chunks

    def step(self, engine: ScoresInTraining | None = None) -> np.ndarray | None:
        """Both passes through the schedule, gradients in megatron-core's buffer; with an engine also scores."""
        chunks, mask = self._trainer(), self.batch.tensors["loss_mask"]
        ends = torch.arange(DOCUMENTS + 1) * TOKENS

        def step(stream: Iterator[Any], chunk: nn.Module) -> Any:
            heard = engine.begin(0, next(stream)["tokens"], ends) if engine else None
            return token_losses(chunk, self.batch.tensors, heard), lambda losses: (*masked_sum(losses, mask), {})

        forward_backward(self.ctx, chunks, step, iter([self.batch.tensors]), 1, TOKENS, DOCUMENTS)
        return engine.take()[0][1].numpy()[[self.batch.positions.index(i) for i in range(DOCUMENTS)]] if engine else None

    def in_training(self, rank: int | None, count: int) -> Callable[[], np.ndarray | None]:
        """A step that is listened to; factors are made here, as directions are for the others."""
        engine = ScoresInTraining(self._trainer(), self.ctx, full=rank is None)

        def line(name: str) -> torch.Tensor | Factors:
            parts = [direction[name] for direction in self.directions[:count]]
            return torch.stack(parts) if rank is None or parts[0].ndim == 1 else stack([factor(part, rank)[:2] for part in parts])

        lines = {name: line(name) for name in self.parameters}

        def run() -> np.ndarray | None:
            engine.aim(lines, count)
            with engine.attached():
                return self.step(engine)

        return run

    def one_by_one(self) -> np.ndarray:
        """A backward pass per document and a product with its gradient."""
        found = []
        for row in self.rows:
            (batch,) = batches([row], TOKENS, self.ctx.device)
            own = torch.autograd.grad(token_losses(self.model, batch.tensors).sum(), list(self.parameters.values()))
            found.append([sum(float(torch.dot(g.flatten(), self.directions[0][n].flatten())) for n, g in zip(self.parameters, own))])
        return np.array(found)

    def contestants(self) -> dict[str, Callable[[], np.ndarray | None]]:
        """By name; the engine of differences is made here, its copy of the weights is part of its memory."""
        self.engine = FiniteDifference(lambda batch: token_losses(self.model, batch), self.parameters, 3e-4)
        return {
            PLAIN: self.plain,
            "ghost, 1 direction": lambda: self.ghost(1),
            "ghost, 4 directions": lambda: self.ghost(DIRECTIONS),
            "finite differences": self.differences,
            "autograd, document by document": self.one_by_one,
            STEP: self.step,
            **{name: self.in_training(*what) for name, what in IN_TRAINING.items()},
        }

    def exact(self) -> np.ndarray:
        """[documents, directions] in float64."""
        model = build_model(MODEL, self.ctx, seed=0)[0].eval().double()
        model.load_state_dict(self.model.state_dict())
        own = list(model.parameters())
        found = []
        for row in self.rows:
            (batch,) = batches([row], TOKENS, self.ctx.device)
            parts = torch.autograd.grad(token_losses(model, batch.tensors).sum(), own)
            found.append([sum(float((g * d[n].double()).sum()) for n, g in zip(self.parameters, parts)) for d in self.directions])
        return np.array(found)


def time_all(rounds: int) -> list[dict[str, Any]]:
    """One row per contestant."""
    world = World()
    exact, contestants = world.exact(), world.contestants()
    errors = {}
    for name, run in contestants.items():  # also what warms up
        found = run()
        errors[name] = None if found is None else float(np.linalg.norm(found - exact[:, : found.shape[1]]) / np.linalg.norm(exact[:, : found.shape[1]]))
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            started = time.process_time()
            run()
            seconds[name].append(time.process_time() - started)
    rows = []
    for name, own in seconds.items():
        ratios = np.array(own) / np.array(seconds[PLAIN])
        low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75]).round(3).tolist()
        rows.append({"contestant": name, "ratio": middle, "quartiles": [low, high], "goal": GOALS.get(name), "cpu_ms": round(1e3 * float(np.median(own)), 1), "error": errors[name]})
    return rows


def peak(name: str) -> float:
    """MB a contestant needs over the loaded model, in this process."""
    world = World(warm_up=False)
    kept = {"ghost, 4 directions": DIRECTIONS, PLAIN: 0, STEP: 0, "in training, rank 16, 3 directions": 3}.get(name, 1)
    run = world.contestants()[name]
    del world.directions[kept:]
    if name != "finite differences":
        del world.engine
    before = _kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    for _ in range(2):
        run()
    # Directions are made before the count starts, and they are part of the price.
    own = sum(p.numel() * p.element_size() for p in world.model.parameters())
    copies = kept + (1 if name == "finite differences" else 0)
    return (_kilobytes("VmHWM") - before) / 1024 + copies * own / 2**20


def _kilobytes(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1])


def measure_peak(name: str) -> float:
    """`peak` in a fresh process, whose allocator gives back what is freed."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, __file__, "--peak", name], capture_output=True, text=True, check=True, env=environment)
    return round(float(done.stdout.strip().splitlines()[-1]), 1)


def main() -> None:
    """Run, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-store", action="store_true", help="print only")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        print(peak(options.peak))
        return
    rows = time_all(options.rounds)
    for row in rows:
        row["peak_mb"] = None if options.no_memory else measure_peak(row["contestant"])
    print(f"{'':<32}{'ratio':>7}  {'quartiles':<15}{'goal':>6}{'CPU ms':>9}{'peak MB':>9}{'error':>10}")
    for row in rows:
        low, high = row["quartiles"]
        error = "" if row["error"] is None else f"{row['error']:.1e}"
        print(f"{row['contestant']:<32}{row['ratio']:>7.3f}  {low:.3f}..{high:.3f}   {row['goal'] or '':>6}{row['cpu_ms']:>9}{row['peak_mb'] or '':>9}{error:>10}")
    if not options.no_store:
        from megatron_r1.ops import extension

        record = {
            "date": date.today().isoformat(), "command": shlex.join(["python", *sys.argv]), "threads": 1, "rounds": options.rounds,
            "model": json.loads(MODEL.model_dump_json()), "documents": DOCUMENTS, "tokens": TOKENS, "machine": machine.describe(),
            "versions": machine.versions(), "library": extension.build_info().get("sources", "") if extension.missing() is None else None,
        }  # fmt: skip
        io.append_jsonl(RESULTS, record | {"rows": rows})


if __name__ == "__main__":
    main()
