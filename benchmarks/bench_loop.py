"""What our training loop costs over bare megatron-core, and what RankMe costs while training.

    python benchmarks/bench_loop.py                 a tiny model on one core of a CPU, some minutes
    python benchmarks/bench_loop.py --steps 6 --model nano --batch 8 --no-store

Two models with the same initial weights take turns, step by step, in one process: one is trained by `train.loop.Trainer` with the callbacks of
the default settings (metrics, journal, TensorBoard, console, watchdog; guard on; checkpoints only after the last step, which is not
counted), the other by megatron-core's DDP, forward-backward function and optimizer on batches that are ready. They see the same tokens and must
have the same losses, to the last bit. CPU time of our loop holds that of its other threads (reading ahead, TensorBoard, watchdog); `load` is the machine's average load in the last minute. Shown are medians
and least times of a step, the ratio of each, the median ratio of two steps in succession, and what the callbacks took. RankMe is measured by itself: the seconds of one measurement, and how
far apart they have to be to take 0.5 % of the time. One row with date, command, machine and versions is appended to
benchmarks/results/loop.jsonl. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import in_memory  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from megatron_r1.model.config import PRESETS  # noqa: E402
from megatron_r1.model.forward import token_losses  # noqa: E402
from megatron_r1.model.loss import masked_sum  # noqa: E402
from megatron_r1.train import run  # noqa: E402
from megatron_r1.train.callbacks.base import Callback  # noqa: E402
from megatron_r1.train.config import TrainConfig  # noqa: E402
from megatron_r1.train.heldout import Document, pack  # noqa: E402
from megatron_r1.train.loop import Trainer  # noqa: E402
from megatron_r1.train.measure import states_at  # noqa: E402
from megatron_r1.train.rankme import rankme  # noqa: E402
from megatron_r1.utils import machine  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "loop.jsonl"
ALLOWED = {"loop": 0.02, "rankme": 0.005}
WARM_UP = 3
"""Steps of both that are not counted: memory, caches and thread pools."""


def forward_step(batches: Any, chunk: Any) -> Any:
    """The least that computes the loss of a micro-batch."""
    batch = next(batches)

    def loss(losses: torch.Tensor) -> Any:
        total, count = masked_sum(losses, batch["loss_mask"])
        return total, count, {"loss": total.detach().double()}

    return token_losses(chunk, batch), loss


class Bare(Callback):
    """After each of the trainer's steps, a step of a model of its own by megatron-core alone. Last in the list, so the time between two of its
    calls is a step of the trainer with all its callbacks."""

    def __init__(self, config: TrainConfig, data: in_memory.RandomTokens) -> None:
        self.config, self.data = config, data
        self.times: dict[str, list[tuple[float, float]]] = {"ours": [], "bare": []}
        self.left = (0.0, 0.0)
        self.losses: list[float] = []
        self.beside: list[float] = []

    def on_start(self, trainer: Trainer) -> None:
        """Build the other model, as the trainer's was."""
        assert self.config.model is not None
        (self.chunk,), self.optimizer = run.build(self.config, self.config.model, trainer.ctx)

    def on_step(self, trainer: Trainer) -> None:
        """One bare step: the trainer's next."""
        now = _clocks()
        self.beside.append(_threads())
        if trainer.step:
            self.times["ours"].append(_since(self.left, now))
            if trainer.last.loss != self.losses[-1]:
                raise SystemExit(f"step {trainer.step}: the loop's loss is {trainer.last.loss}, bare megatron-core's {self.losses[-1]}: not the same computation")
        if trainer.step < trainer.total:
            batches = in_memory.batches_of(self.data, trainer.ctx, self.config, trainer.step)
            began = _clocks()
            total = float(in_memory.bare_step(self.chunk, self.optimizer, forward_step, batches))
            self.times["bare"].append(_since(began, _clocks()))
            self.losses.append(total / int(self.config.global_batch))
        self.left = _clocks()


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.thread_time()


def _threads() -> float:
    """CPU seconds of Python's other threads so far: all of them are our loop's. gloo's own threads poll whoever computes, and are left out."""
    others = [thread.ident for thread in threading.enumerate() if thread is not threading.current_thread() and thread.ident is not None]
    return sum(time.clock_gettime(time.pthread_getcpuclockid(ident)) for ident in others)


def _since(began: tuple[float, float], now: tuple[float, float]) -> tuple[float, float]:
    return now[0] - began[0], now[1] - began[1]


def timed(callbacks: list[Callback], spent: dict[str, float]) -> None:
    """Count the CPU seconds of each callback's steps in `spent`."""

    def wrap(callback: Callback, inner: Callable[[Trainer], None]) -> Callable[[Trainer], None]:
        def on_step(trainer: Trainer) -> None:
            began = time.thread_time()
            inner(trainer)
            spent[type(callback).__name__] += time.thread_time() - began

        return on_step

    for callback in callbacks:
        if not isinstance(callback, Bare):
            callback.on_step = wrap(callback, callback.on_step)  # type: ignore[method-assign]


def measure_rankme(trainer: Trainer, samples: int) -> dict[str, Any]:
    """Seconds of one measurement on documents cut at a random token, as the callback's are."""
    assert trainer.config.model is not None
    length, draw = int(trainer.config.seq_length), np.random.default_rng(0)
    positions = draw.integers(1, length - 1, samples)
    documents = [Document("rankme", draw.integers(trainer.config.model.vocab_size, size=position + 2).astype(np.int32)) for position in positions]
    rows = pack(documents, length)
    began = time.perf_counter()
    states = states_at(trainer.ctx, trainer.chunks, rows, positions, trainer.config.model.hidden_size, int(trainer.config.micro_batch))
    forward = time.perf_counter() - began
    rankme(states)
    return {"samples": samples, "tokens": int(rows.batch["tokens"].size), "seconds": time.perf_counter() - began, "forward_seconds": forward}


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both loops in turns; the row's figures."""
    config = in_memory.settings(
        args.model, steps=args.steps + WARM_UP + 1, length=args.length, micro=args.micro, sequences=args.batch, precision="fp32", device="cpu",
        checkpoints={"background": False},
    )
    assert config.model is not None
    data = in_memory.RandomTokens(4 * args.batch, args.length, config.model.vocab_size)
    bare = Bare(config, data)
    trainer = in_memory.our_trainer(config, data, folder, [bare])
    spent: dict[str, float] = defaultdict(float)
    timed(trainer.callbacks, spent)
    trainer.train()
    first, last = WARM_UP, WARM_UP + args.steps
    beside = (bare.beside[last] - bare.beside[first]) / args.steps
    spent.pop("Checkpoints")  # once, after the last step
    row: dict[str, Any] = {
        "model": args.model, "micro_batch": args.micro, "sequences": args.batch, "seq_length": args.length, "steps": args.steps, "threads": torch.get_num_threads(), "load": os.getloadavg()[0],
        "loss": trainer.last.loss,
    }
    for number, clock in enumerate(("wall", "cpu")):
        one, kept = dict[str, float](), dict[str, list[float]]()
        for name, times in bare.times.items():
            kept[name] = [time[number] + (beside if clock == "cpu" and name == "ours" else 0.0) for time in times[first:last]]
            one |= {f"{name}_median": statistics.median(kept[name]), f"{name}_least": min(kept[name])}
        row[clock] = one | {f"overhead_{what}": one[f"ours_{what}"] / one[f"bare_{what}"] - 1 for what in ("median", "least")}
        row[clock]["overhead_neighbours"] = statistics.median(ours / bare for ours, bare in zip(kept["ours"], kept["bare"])) - 1
    step = row["cpu"]["bare_median"]
    row["callbacks"] = {name: seconds / trainer.total / step for name, seconds in spent.items()} | {"other threads": beside / step}
    row["rankme"] = measure_rankme(trainer, args.rankme)
    row["rankme"]["steps_apart"] = row["rankme"]["seconds"] / (ALLOWED["rankme"] * row["wall"]["ours_median"])
    return row


def show(row: dict[str, Any]) -> None:
    """A table for people."""
    print(f"{'seconds of a step':20}{'bare':>10}{'ours':>10}{'more':>9}")
    for clock in ("wall", "cpu"):
        for what in ("median", "least"):
            one = row[clock]
            print(f"{clock + ', ' + what:20}{one[f'bare_{what}']:10.4f}{one[f'ours_{what}']:10.4f}{100 * one[f'overhead_{what}']:+8.2f}%")
        print(f"{clock + ', median ratio of neighbours':40}{100 * row[clock]['overhead_neighbours']:+8.2f}%")
    print("CPU time of a bare step: " + ", ".join(f"{name} {100 * share:.3f} %" for name, share in row["callbacks"].items()))
    found = row["rankme"]
    print(f"RankMe of {found['samples']} samples ({found['tokens']} tokens): {found['seconds']:.2f} s; 0.5 % of the time when {found['steps_apart']:.0f} such steps apart")


def main() -> int:
    """Status 1 when the loop costs more than allowed, by the median ratio of neighbours' CPU time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", choices=sorted(PRESETS))
    parser.add_argument("--steps", type=int, default=60, help="counted steps of each")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--micro", type=int, default=8, help="sequences of a micro-batch")
    parser.add_argument("--batch", type=int, default=16, help="sequences of a step")
    parser.add_argument("--rankme", type=int, default=256, help="samples of the RankMe measurement")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--no-store", action="store_true", help="only print")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        row = measure(args, Path(name))
    show(row)
    if not args.no_store:
        command = shlex.join(["python", "benchmarks/bench_loop.py", *sys.argv[1:]])
        record = {"date": date.today().isoformat(), "command": command, **row, "machine": machine.describe(), "versions": machine.versions()}
        with open(RESULTS, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
    return int(row["cpu"]["overhead_neighbours"] > ALLOWED["loop"])


if __name__ == "__main__":
    sys.exit(main())
