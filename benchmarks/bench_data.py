"""What the data plane costs between shards and device: mixture start-up, random access, the loader, packing, DALI.

    python benchmarks/bench_data.py                          all parts, on one core
    python benchmarks/bench_data.py access packing --quick --no-store
    python benchmarks/bench_data.py --write-docs             only rewrite the table in docs/data.md from the stored rows

Speeds are per core: of CPU time of the process, so that a neighbour's work does not count, and of a median over rounds in which
every contestant runs once, in random order; ratios are medians of the ratios within a round. Start-up runs in
fresh processes. Before anything is timed, what contestants return is compared. Rows are appended to
benchmarks/results/data.jsonl with date, command, machine and versions.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from bisect import bisect_left, insort
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import result_rows

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results" / "data.jsonl"
DOCS = ROOT / "docs" / "data.md"
BEGIN = "<!-- table: python benchmarks/bench_data.py --write-docs -->"
PARTS = ("startup", "access", "loader", "packing", "dali")
SAMPLES, SOURCES, WINDOW = 2_100_000_000, 10_000, 2049
H100_TOKENS = 500_000
"""Tokens a second of the 140M model on one H100, assumed: 0.9 GFLOP a token at 45 % of the peak of 989 TFLOP/s. Not measured."""
Row = dict[str, Any]


def row(part: str, what: str, value: float, unit: str, **more: Any) -> Row:
    """One line of the table. more: `floor`, `peer` = [name, ratio], `goal`, `note`, and numbers kept for the record."""
    return {"part": part, "what": what, "value": value, "unit": unit, **more}


def duel(contestants: dict[str, Callable[[], object]], rounds: int) -> tuple[dict[str, float], Callable[[str, str], float]]:
    """Median CPU seconds of each, and a function: median over rounds of the ratio of two."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for contestant in contestants.values():
        contestant()
    for _ in range(rounds):
        for name in random.sample(list(contestants), len(contestants)):
            began = time.process_time()
            contestants[name]()
            seconds[name].append(time.process_time() - began)

    def ratio(one: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[one], seconds[other]))

    return {name: statistics.median(values) for name, values in seconds.items()}, ratio


# ------------------------------------------------------------------------------------------------ inputs


def write_shard(folder: Path, lengths: np.ndarray, seed: int = 0, name: str = "train", masked: bool = False) -> Any:
    """A shard of random documents: 16-bit tokens."""
    from megatron_r1.data.shards import Shard, ShardWriter

    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    writer = ShardWriter(folder / name, 60_000, masked=masked)
    for i, n in enumerate(lengths.tolist()):
        tokens = draw.integers(0, 60_000, n, dtype=np.uint16)
        writer.add(tokens, 4 * n, str(i), mask=(tokens % 3 > 0).astype(np.uint8) if masked else None)
    return Shard(folder / name, writer.close())


def documents(tokens: int, seed: int = 0) -> np.ndarray:
    """Lengths of log-normal documents, about 1000 tokens each, that sum to about `tokens`."""
    return np.clip(np.random.default_rng(seed).lognormal(6.4, 1.0, tokens // 990), 1, 200_000).astype(np.int64)


# ------------------------------------------------------------------------------------------------ start-up


def startup_child(kind: str, folder: str, sources: int) -> None:
    """Runs alone in a fresh process and prints what it measured as JSON. Imports are not counted: a run has made them before."""
    from megatron_r1.data.dataset import PretrainDataset
    from megatron_r1.data.mixture_order import MixtureOrder
    from megatron_r1.data.shards import Shard, SplitRecord
    from megatron_r1.data.view import TokenStream

    def status(name: str) -> int:
        """Bytes; of this process since it began (getrusage's peak may be that of the process it was forked from)."""
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) << 10

    weights = {f"source-{i:05d}": float(w) for i, w in enumerate(np.random.default_rng(1).pareto(1.0, sources) + 0.01)}
    records = json.loads((Path(folder) / "records.json").read_text()) if kind == "batch" else {}
    before, rows = status("VmRSS"), 256
    wall, began = time.perf_counter(), time.process_time()
    if kind == "order":
        order = MixtureOrder({name: 210_000 for name in weights}, weights, 7)
        order.locate_many(range(rows))
        first = time.process_time() - began
        order.locate_many(range(SAMPLES - rows, SAMPLES))
    else:
        streams = {name: TokenStream(Shard(Path(folder) / name / "train", SplitRecord.model_validate(record))) for name, record in records.items()}
        order = MixtureOrder({name: stream.blocks(WINDOW - 1) for name, stream in streams.items()}, weights, 7)
        data = PretrainDataset(streams, order, WINDOW - 1, True)
        data.batch(range(rows))
        first = time.process_time() - began
        data.batch(range(SAMPLES - rows, SAMPLES))
    both = time.process_time() - began
    print(json.dumps({"seconds": first, "other": both - first, "wall": time.perf_counter() - wall, "extra_bytes": status("VmHWM") - before}))


def startup(scratch: Path, quick: bool) -> list[Row]:
    """First 256 samples of 2.1 billion over 10,000 sources, then the last 256; the order alone, and with shards on disk."""
    sources = 500 if quick else SOURCES
    record = write_shard(scratch / "one", np.asarray([2 * WINDOW])).record.plain()
    records = {f"source-{i:05d}": record for i in range(sources)}
    for name in records:
        (scratch / name).mkdir()
        for path in (scratch / "one").iterdir():
            os.link(path, scratch / name / path.name)
    (scratch / "records.json").write_text(json.dumps(records))

    def child(kind: str) -> dict[str, float]:
        runs = []
        for _ in range(3):
            command = [sys.executable, __file__, "--child", kind, str(scratch), str(sources)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
            runs.append(json.loads(done.stdout.splitlines()[-1]))
        return sorted(runs, key=lambda run: run["seconds"])[1]

    from megatron.core.datasets import helpers_cpp

    weights = np.random.default_rng(1).pareto(1.0, sources) + 0.01
    bounded = 20_000 if quick else 400_000
    index, within = np.zeros(bounded, np.int16), np.zeros(bounded, np.int64)
    began = time.process_time()
    helpers_cpp.build_blending_indices(index, within, weights / weights.sum(), sources, bounded, False)
    megatron = (time.process_time() - began) / bounded * SAMPLES
    rows = []
    for kind, what in (("order", "the order alone"), ("batch", f"with {sources:,} shards opened and the tokens read")):
        found = child(kind)
        rows.append(row(
            "startup", f"first 256 of {SAMPLES / 1e9:.1f} billion samples x {sources:,} sources, {what}", found["seconds"], "s", goal="< 2 s", met=found["seconds"] < 2, wall=found["wall"],
            peer=[f"megatron-core's blend index ({bounded:,} samples timed, the rest by proportion: {megatron / 3600:.1f} h)", megatron / found["seconds"]],
            note=f"CPU time; the last 256 after {found['other']:.2f} s more, {found['wall']:.1f} s of wall time for both",
        ))
        rows.append(row(
            "startup", f"peak memory of it, {what}", found["extra_bytes"] / 1e6, "MB", goal="< 64 MB", met=found["extra_bytes"] < 64e6,
            peer=["megatron-core's blend index (10 bytes a sample)", SAMPLES * 10 / found["extra_bytes"]],
        ))
    return rows


# ------------------------------------------------------------------------------------------------ random access


def access(scratch: Path, quick: bool) -> list[Row]:
    """Windows of 2049 tokens at random places of a shard in warm memory, and whole training samples."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from megatron_r1.data.dataset import PretrainDataset
    from megatron_r1.data.mixture_order import MixtureOrder
    from megatron_r1.data.view import TokenStream

    shard = write_shard(scratch / "access", documents(20_000_000 if quick else 100_000_000))
    shard.verify()
    draw = np.random.default_rng(3)
    many, rounds = 256, 50 if quick else 200
    limit = shard.n_tokens - many * WINDOW
    everything, half = TokenStream(shard), TokenStream(shard, draw.random(len(shard)) < 0.5)
    theirs = IndexedDataset(str(scratch / "access" / "train"), mmap=True)
    flat = shard.read(0, shard.n_tokens)

    def starts() -> np.ndarray:
        return draw.integers(0, limit, many)

    at = starts()
    wanted = np.stack([flat[a : a + WINDOW] for a in at])
    assert (shard.windows(at, WINDOW) == wanted).all()
    assert (np.stack([theirs.get(0, offset=int(a), length=WINDOW) for a in at]) == wanted).all()

    def dataset(stream: TokenStream, sources: int) -> PretrainDataset:
        names = [f"s{i}" for i in range(sources)]
        order = MixtureOrder({name: stream.blocks(WINDOW - 1) for name in names}, {name: 1.0 for name in names}, 5)
        return PretrainDataset({name: stream for name in names}, order, WINDOW - 1, True)

    sets = {"one source": dataset(everything, 1), "1000 sources": dataset(everything, 1000), "half of the documents kept": dataset(half, 1)}
    begun = iter(range(0, 10**9, many))
    contestants: dict[str, Callable[[], object]] = {
        "floor": lambda: flat[(a := int(draw.integers(0, limit))) : a + many * WINDOW].astype(np.int32),
        "windows": lambda: shard.windows(starts(), WINDOW).astype(np.int32),
        "megatron": lambda: [theirs.get(0, offset=a, length=WINDOW).astype(np.int32) for a in starts().tolist()],
        **{name: (lambda data=data: data.batch(range(a := next(begun), a + many))) for name, data in sets.items()},
    }
    seconds, ratio = duel(contestants, rounds)
    rate = {name: many / value for name, value in seconds.items()}
    floor = "one long copy of as many tokens to 32 bits"
    rows = [row(
        "access", "windows of 2049 tokens, 16 bits on disk to 32 in memory, at random places", rate["windows"], "windows/s", goal=">= 200,000", met=rate["windows"] >= 2e5,
        floor=[floor, ratio("windows", "floor")], peer=["megatron-core's IndexedDataset.get", ratio("megatron", "windows")],
    )]
    for name in sets:
        rows.append(row(
            "access", f"whole samples (order, tokens, labels, mask, positions, segments), {name}", rate[name], "samples/s", floor=[floor, ratio(name, "floor")],
        ))
    return rows


# ------------------------------------------------------------------------------------------------ loader


def feed_of(dataset: Any, rows: int, micro_batch: int, steps: int, **loader: Any) -> Any:
    """A Feed as training makes it."""
    import torch

    from megatron_r1.train.config import TrainConfig
    from megatron_r1.train.feed import Feed

    config = TrainConfig.model_validate({
        "inputs": {"shards": "corpus"}, "model": "nano", "budget": f"{steps} steps", "global_batch": f"{rows * (WINDOW - 1)} tokens",
        "seq_length": f"{WINDOW - 1} tokens", "micro_batch": micro_batch, "lr": {"peak": 1e-3}, "sources": "natural", "loader": loader,
    })  # fmt: skip
    return Feed(dataset, config, 0, 1, steps, torch.device("cpu"))


def blend(scratch: Path, tokens: int, sources: int = 16) -> Any:
    """A dataset of several sources of unequal shares."""
    from megatron_r1.data.dataset import PretrainDataset
    from megatron_r1.data.mixture_order import MixtureOrder
    from megatron_r1.data.view import TokenStream

    streams = {}
    for i in range(sources):
        shard = write_shard(scratch / f"blend-{i}", documents(tokens // sources, i), i)
        shard.verify()
        streams[f"s{i}"] = TokenStream(shard)
    order = MixtureOrder({name: stream.blocks(WINDOW - 1) for name, stream in streams.items()}, {f"s{i}": 1.0 + i for i in range(sources)}, 5)
    return PretrainDataset(streams, order, WINDOW - 1, True)


def loader(scratch: Path, quick: bool) -> list[Row]:
    """A step of 256 sequences of 2048 on one GPU, micro-batches of 32: CPU time of reading it, and how long training waits."""
    data, rows, micro = blend(scratch, 20_000_000 if quick else 100_000_000), 256, 32
    step_seconds = rows * (WINDOW - 1) / H100_TOKENS
    steps = 8 if quick else 40
    feed = feed_of(data, rows, micro, steps + 2)
    waits = []
    began = 0.0
    for step in range(steps + 2):
        at = time.perf_counter()
        feed.step(step)
        if step >= 2:
            waits.append(time.perf_counter() - at)
        else:
            began = time.process_time()
        time.sleep(step_seconds / (20 if quick else 4))  # the device computes; four times as fast as assumed, to be done sooner
    spent = (time.process_time() - began) / steps
    feed.close()
    goal = f"<= 0.5 % of a step of {step_seconds:.2f} s (140M on an H100 at {H100_TOKENS:,} tokens/s, assumed)"
    share, wait = 100 * spent / step_seconds, 100 * statistics.median(waits) / step_seconds
    return [
        row("loader", "CPU time of reading a step of 256 x 2048 tokens from 16 sources, in threads beside training", share, "% of a step", goal=goal, met=share <= 0.5, milliseconds=1e3 * spent),
        row("loader", "time that training waits for it", wait, "% of a step", goal=goal, met=wait <= 0.5, milliseconds=1e3 * statistics.median(waits)),
    ]


# ------------------------------------------------------------------------------------------------ packing


def plain_best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit decreasing item by item, with a sorted list of rooms and the rows that have them: O(n log n)."""
    rows: list[list[int]] = []
    rooms: list[int] = []
    waiting: dict[int, list[int]] = {}
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            place = waiting[room].pop()
            if not waiting[room]:
                del waiting[room]
                rooms.pop(at)
        else:
            room, place = capacity, len(rows)
            rows.append([])
        rows[place].append(item)
        if room > length:
            if room - length not in waiting:
                insort(rooms, room - length)
                waiting[room - length] = []
            waiting[room - length].append(place)
    return rows


def packing(scratch: Path, quick: bool) -> list[Row]:
    """Best-fit decreasing into rows of 32,768 tokens, on long-tailed lengths."""
    from megatron_r1.data.packing import best_fit_decreasing

    capacity, small = 32_768, 100_000 if quick else 1_000_000
    draws: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
        "log-normal, median 490": lambda rng, n: rng.lognormal(6.2, 1.3, n),
        "Pareto 1.1 from 120": lambda rng, n: (rng.pareto(1.1, n) + 1) * 120,
        "log-normal, median 8100": lambda rng, n: rng.lognormal(9.0, 1.0, n),
    }
    rows = []
    for name, draw in draws.items():
        sizes = {n: np.clip(draw(np.random.default_rng(1), n), 2, capacity).astype(np.int64) for n in (small, 10 * small)}
        made: dict[str, Any] = {}
        contestants: dict[str, Callable[[], object]] = {
            "small": lambda made=made, sizes=sizes: made.update(small=best_fit_decreasing(sizes[small], capacity)),
            "large": lambda made=made, sizes=sizes: made.update(large=best_fit_decreasing(sizes[10 * small], capacity)),
            "plain": lambda made=made, sizes=sizes: made.update(plain=plain_best_fit(sizes[small], capacity)),
            "floor": lambda sizes=sizes: np.argsort(sizes[small].astype(np.uint16), kind="stable"),
        }
        seconds, ratio = duel(contestants, 2)
        packed = made["large"]
        assert len(made["small"]) == len(made["plain"])
        full = 100 * float(sizes[10 * small].sum()) / (len(packed) * capacity)
        rows.append(row("packing", f"fullness of {len(packed):,} rows of 32,768 tokens, {10 * small:,} lengths: {name}", full, "%", goal=">= 98 %", met=full >= 98))
        rows.append(row(
            "packing", f"packing {10 * small:,} conversations: {name}", 10 * small / seconds["large"] / 1e6, "M items/s", goal="linear", met=ratio("large", "small") < 15,
            floor=[f"sorting (radix) of {small:,} lengths alone, time per item", ratio("large", "floor") / 10],
            peer=[f"item by item in Python, {small:,}", ratio("plain", "small")], note=f"{ratio('large', 'small'):.1f} times the time of {small:,}",
        ))
    return rows


# ------------------------------------------------------------------------------------------------ DALI


def dali(scratch: Path, quick: bool) -> list[Row]:
    """The same steps by threads alone and through DALI's external_source, on the CPU."""
    from megatron_r1.data.dali import require_dali
    from megatron_r1.train.objectives import TENSORS
    from megatron_r1.utils.errors import EnvironmentProblem

    try:
        version = require_dali().__version__
    except EnvironmentProblem as problem:
        print(f"[dali] left out\n{problem}")
        return []
    data, rows, micro, steps = blend(scratch, 20_000_000), 256, 32, 6 if quick else 20

    def run(**loader: Any) -> list[list[dict[str, Any]]]:
        feed = feed_of(data, rows, micro, steps, **loader)
        found = [feed.step(step) for step in range(steps)]
        feed.close()
        return found

    for one, other in zip(run(), run(backend="dali")):
        for a, b in zip(one, other):
            assert all(a[key].tobytes() == b[key].tobytes() for key in TENSORS)
    seconds, ratio = duel({"threads": lambda: run() and None, "dali": lambda: run(backend="dali") and None}, 3 if quick else 7)
    return [row(
        "dali", "CPU time of a step of 256 x 2048 tokens by threads alone, on the CPU", 1e3 * seconds["threads"] / steps, "ms",
        peer=[f"with DALI {version} behind them, samples equal bit for bit", ratio("dali", "threads")],
        note="DALI copies what threads have read once more; it could pay only where it replaces a copy, in uploads to a GPU (not measured: no GPU here), or by decoding, which tokens need none of",
    )]


# ------------------------------------------------------------------------------------------------ table


def number(value: float) -> str:
    """Four digits that matter."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def table(rows: list[Row]) -> str:
    """Markdown: the newest row of everything measured on the full size."""
    newest = {(row["part"], row["what"]): row for row in rows}
    if not newest:
        return "Not run."
    runs = sorted({(r["machine"], r["date"], r["command"]) for r in newest.values()})
    lines = [f"{machine}, one core, {day}: `{command}`." for machine, day, command in runs]
    lines += ["", "| what | measured | over the floor | others, times ours | goal |", "|---|---|---|---|---|"]
    for part in PARTS:
        for r in (r for r in newest.values() if r["part"] == part):
            floor = f"{r['floor'][1]:.2f} ({r['floor'][0]})" if r.get("floor") else "-"
            peer = f"{number(r['peer'][1])} ({r['peer'][0]})" if r.get("peer") else "-"
            goal = f"{r['goal']}: {'met' if r['met'] else 'NOT met'}" if r.get("goal") else "-"
            note = f" ({r['note']})" if r.get("note") else ""
            lines.append(f"| {r['what']} | {number(r['value'])} {r['unit']}{note} | {floor} | {peer} | {goal} |")
    return "\n".join(lines)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="what to measure (default: all)")
    parser.add_argument("--quick", action="store_true", help="small sizes; rows are not stored")
    parser.add_argument("--no-store", action="store_true", help="print only")
    parser.add_argument("--scratch", help="folder for generated shards (default: a temporary one); about 1 GB")
    parser.add_argument("--write-docs", action="store_true")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if options.child:
        startup_child(options.child[0], options.child[1], int(options.child[2]))
        return 0
    if options.write_docs:
        result_rows.write_table(RESULTS, DOCS, BEGIN, table)
        return 0
    from megatron_r1.utils import machine

    # Generated inputs need not survive a power cut, and ten thousand shards would wait for the disk for minutes.
    os.fsync = lambda descriptor: None  # type: ignore[assignment]
    common = {
        "date": date.today().isoformat(), "command": "python " + shlex.join([Path(sys.argv[0]).as_posix(), *sys.argv[1:]]).removeprefix("./"), "machine": machine.cpu_name(),
        "versions": {name: value for name, value in machine.versions().items() if name in {"numpy", "torch", "megatron-core"}},
    }  # fmt: skip
    rows = []
    for part in options.parts or PARTS:
        with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
            for found in globals()[part](Path(folder), options.quick):
                rows.append(common | found)
                print(json.dumps(found), flush=True)
    if not (options.quick or options.no_store):
        result_rows.store(rows, RESULTS, DOCS, BEGIN, table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
