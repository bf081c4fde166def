"""What a checkpoint costs: how long the loop stands still for a save in the background, and loading against the disk's read speed.

    python benchmarks/bench_checkpoints.py                       the 140M model's training state, 2 GB: 5 GB of disk, 8 GB of memory
    python benchmarks/bench_checkpoints.py --model tiny --no-store

The state is that of bf16 training: bf16 weights, fp32 main weights and both moments. The stall is the time `begin_save` takes, plus
that of the commit at the later step boundary; the memory for the copies is asked for ahead, as training does beside its first steps. Reading is measured with
the files dropped from the system's cache, the disk's speed on the same files, as the faster of one and of four threads; loading verifies every byte first.
The floor of that is SHA-256, measured too, on cached files. `reshard` loads it into a pipeline of the fewest stages that its layers divide into (3 for the 140M),
a process each. Rows are appended to benchmarks/results/checkpoints.jsonl with date, command, machine, its load at the start, and versions. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_r1.model.build import build_model  # noqa: E402
from megatron_r1.model.config import PRESETS  # noqa: E402
from megatron_r1.parallel import checkpoint, context  # noqa: E402
from megatron_r1.parallel.config import LayoutConfig  # noqa: E402
from megatron_r1.parallel.ddp import wrap  # noqa: E402
from megatron_r1.parallel.device import HostCopies  # noqa: E402
from megatron_r1.parallel.optimizer import build_optimizer, local_states  # noqa: E402
from megatron_r1.utils import machine  # noqa: E402
from megatron_r1.utils.io import sha256_file  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results" / "checkpoints.jsonl"


def state(model: str, layout: LayoutConfig) -> tuple[Any, Any, Any]:
    """Context, wrapped chunks and optimizer; the moments hold numbers, so that nothing is stored as holes or zero pages."""
    ctx = context.initialize(layout, 0)
    chunks = wrap(build_model(PRESETS[model], ctx, seed=0, precision="bf16"), layout, ctx)
    optimizer = build_optimizer(chunks, lr=1e-3, layout=layout, precision="bf16")
    for _, _, tensors in local_states(optimizer):
        for tensor in tensors.values():
            tensor.detach().normal_()
    return ctx, chunks, optimizer


def seconds(act: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def files(path: Path) -> list[Path]:
    """All files under a folder."""
    return [file for file in path.rglob("*") if file.is_file()]


def forget(path: Path) -> None:
    """Drop the files from the system's cache (they have been flushed)."""
    for file in files(path):
        with open(file, "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(path: Path, threads: int) -> None:
    """Read every byte once, 8 MiB at a time, each thread an equal part of each file."""
    def part(file: Path, number: int) -> None:
        room, size = memoryview(bytearray(8 << 20)), file.stat().st_size
        with open(file, "rb", buffering=0) as stream:
            stream.seek(size * number // threads)
            left = size * (number + 1) // threads - stream.tell()
            while left > 0 and (count := stream.readinto(room[: min(left, len(room))])):
                left -= count

    with ThreadPoolExecutor(threads) as pool:
        for file in files(path):
            list(pool.map(part, [file] * threads, range(threads)))


def disk_speed(path: Path) -> float:
    """Seconds in which the disk gives the files, nothing of them cached."""
    taken = []
    for threads in (1, 4):
        forget(path)
        taken.append(seconds(lambda threads=threads: read(path, threads)))
    return min(taken)


def stages(model: str) -> int:
    """Pipeline stages of the other layout: the 140M's 9 heads, 3 key heads and 15 layers leave no half."""
    layers = PRESETS[model].num_layers
    return next(count for count in range(2, layers + 1) if layers % count == 0)


def timed_load(path: Path, model: str, pipeline: int) -> float:
    """Seconds to load into so many pipeline stages, the cache cold; on every rank."""
    ctx, chunks, optimizer = state(model, LayoutConfig(pipeline=pipeline))
    if ctx.is_main:
        forget(path)
    ctx.barrier()
    return seconds(lambda: checkpoint.load(path, chunks, optimizer, ctx))


def resharded(path: Path, model: str) -> float:
    """Seconds of a load into a pipeline, from the start of loading."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={stages(model)}", __file__, "--model", model, "--load", str(path)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return float(next(line for line in done.stdout.splitlines() if line.startswith("seconds ")).split()[1])


def measure(model: str, folder: Path) -> list[dict[str, Any]]:
    """All rows."""
    load = os.getloadavg()[0]
    ctx, chunks, optimizer = state(model, LayoutConfig())
    copies, rows = HostCopies(), []
    checkpoint.reserve(copies, chunks, optimizer)
    rows.append({"what": "memory for the copies, asked for beside training", "value": seconds(copies.wait), "unit": "s"})
    for which in ("first", "second"):
        path, pending = folder / which, []
        asked = seconds(lambda path=path, pending=pending: pending.append(checkpoint.begin_save(path, chunks, optimizer, {}, ctx, copies)))
        written = seconds(lambda pending=pending: wait(pending[0]))
        committed = seconds(pending[0].finish)
        rows += [
            {"what": f"{which} save: the loop stalls", "value": asked + committed, "unit": "s"},
            {"what": f"{which} save: of that for the commit", "value": committed, "unit": "s"},
            {"what": f"{which} save: from asking to the commit, nothing else running", "value": asked + written + committed, "unit": "s"},
        ]
    path = folder / "second"
    size = sum(file.stat().st_size for file in files(path)) / 1e9
    tensors = max(files(path), key=lambda file: file.stat().st_size)
    read(path, 1)
    hashed = tensors.stat().st_size / 1e9 / seconds(lambda: sha256_file(tensors))
    checked = size / seconds(lambda: checkpoint.verify(path, ctx))
    filled = size / seconds(lambda: checkpoint.load(path, chunks, optimizer, ctx, verified=True))
    chunks = optimizer = copies = None  # the loads have a state of their own
    disk = size / disk_speed(path)
    loaded, split = size / timed_load(path, model, 1), size / resharded(path, model)
    return [
        {"what": "load of the machine at the start (processes; 0: quiet)", "value": load, "unit": ""},
        {"what": "size of the checkpoint", "value": size, "unit": "GB"}, *rows,
        {"what": "the disk reads", "value": disk, "unit": "GB/s"},
        {"what": "SHA-256, one thread, files cached", "value": hashed, "unit": "GB/s"},
        {"what": f"verify, {checkpoint.HASH_THREADS} threads, files cached", "value": checked, "unit": "GB/s"},
        {"what": "tensors to their places, files cached", "value": filled, "unit": "GB/s"},
        {"what": "verify and load, same layout", "value": loaded, "unit": "GB/s"},
        {"what": f"verify and load into {stages(model)} pipeline stages", "value": split, "unit": "GB/s"},
        {"what": "load over the disk's speed (goal: 0.5)", "value": loaded / disk, "unit": ""},
        {"what": "reshard over the disk's speed (goal: 0.5)", "value": split / disk, "unit": ""},
    ]


def wait(pending: checkpoint.PendingSave) -> None:
    """Until the thread has written."""
    while not pending.ready():
        time.sleep(0.01)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mobilellm_r1_140m", choices=sorted(PRESETS))
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure (default: the system's temporary folder)")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--no-store", action="store_true", help="only print")
    args = parser.parse_args()
    if args.load:
        taken = timed_load(args.load, args.model, stages(args.model))
        if context.current().is_main:
            print(f"seconds {taken}", flush=True)
        context.shutdown()
        return 0
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        rows = measure(args.model, Path(name))
    for row in rows:
        print(f"{row['what']:70s} {row['value']:>10,.3f} {row['unit']}")
    if not args.no_store:
        RESULTS.parent.mkdir(exist_ok=True)
        command = "python " + shlex.join(["benchmarks/bench_checkpoints.py", *(["--model", args.model] if args.model != "mobilellm_r1_140m" else [])])
        record = {"date": date.today().isoformat(), "command": command, "machine": machine.describe(), "versions": machine.versions(), "rows": rows}
        with open(RESULTS, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
