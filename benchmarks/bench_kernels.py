"""Build, check and time every kernel in one call.

    python benchmarks/bench_kernels.py                    on this machine's best device
    python benchmarks/bench_kernels.py --device cpu --ops qk_norm_rope --quick --no-store
    python benchmarks/bench_kernels.py --write-docs       only rewrite the table in docs/kernels.md from the stored rows

Every contestant is first compared with fp64 on fresh random inputs (the seed is printed and stored); a wrong one ends the run
with status 1 and nothing is stored. Rows are appended to benchmarks/results/kernels.jsonl with date, command, device and
versions. The table gives, per case, our time, how far it is from the floor (fewest bytes over measured copy bandwidth, fewest
FLOPs over the measured rate of a large product, or the plain computation that the op extends), and how many times longer
the others take.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import time
from datetime import date
from pathlib import Path

import result_rows

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results" / "kernels.jsonl"
DOCS = ROOT / "docs" / "kernels.md"
BEGIN = "<!-- table: python benchmarks/bench_kernels.py --write-docs -->"
OPS = ("qk_norm_rope", "attention", "influence", "row_loss")


def device_name(device: str) -> str:
    """What the figures are of."""
    from megatron_r1.utils import machine

    if device == "cpu":
        return machine.cpu_name()
    import torch

    return torch.cuda.get_device_name()


def versions(device: str) -> dict[str, str]:
    """Versions a kernel's speed may depend on."""
    import torch

    from megatron_r1.ops import extension
    from megatron_r1.utils import machine

    found = {name: value for name, value in machine.versions().items() if name in {"torch", "numpy"}}
    found["library"] = extension.build_info().get("sources", "")
    if device == "cuda":
        found["cuda"] = str(torch.version.cuda)
    return found


def bench(options: argparse.Namespace) -> list[dict]:
    """Run the cases; returns the rows."""
    import torch
    from kernels import attention, harness, influence, qk_norm_rope, row_loss

    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(options.threads)
    seed = options.seed if options.seed is not None else time.time_ns() % 2**31
    torch.manual_seed(seed)
    floors = harness.measure_floors(device)
    rates = ", ".join(f"{str(d).removeprefix('torch.')} {r / 1e9:,.0f} GFLOP/s" for d, r in floors.product.items())
    print(f"{device_name(device)} ({device}), {options.threads} thread(s), seed {seed}; copy {floors.copy / 1e9:.1f} GB/s, product {rates}")
    modules = dict(zip(OPS, (qk_norm_rope, attention, influence, row_loss)))
    rows = []
    for name in options.ops or OPS:
        for case in modules[name].cases(device, options.quick):
            row = dataclasses.asdict(harness.run_case(case, floors, device, options.seconds))
            row |= {"device": device, "seed": seed}
            rows.append(row)
            print(line(row), flush=True)
    common = {
        "date": date.today().isoformat(), "command": "python " + shlex.join(sys.argv), "machine": device_name(device), "threads": options.threads,
        "copy_gb_s": round(floors.copy / 1e9, 1), "gflop_s": {str(d).removeprefix("torch."): round(r / 1e9, 1) for d, r in floors.product.items()},
        "versions": versions(device),
    }  # fmt: skip
    return [common | row for row in rows]


def line(row: dict) -> str:
    """One row for the terminal."""
    ours = row["milliseconds"].get("csrc")
    others = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in row["times_ours"].items())
    goal = f"  [goal: {row['target']}]" if row["target"] else ""
    return f"{row['op']:<34} {row['dtype']:<9} {row['shape']:<44} {ours:9.3f} ms = {row['over_floor']:.2f}x floor; others/ours: {others}{goal}"


def table(rows: list[dict]) -> str:
    """Markdown: the newest row of every case and device; what has not been run says so."""
    newest: dict[tuple, dict] = {}
    for row in rows:
        newest[row["device"], row["op"], row["dtype"], row["shape"]] = row
    parts = []
    for device, title in (("cpu", "CPU"), ("cuda", "GPU")):
        mine = [row for key, row in newest.items() if key[0] == device]
        if not mine:
            parts.append(f"**{title}: not run.** No machine with one was at hand; no figure is claimed, and the kernels stay off until the self-check passes.\n")
            continue
        seen: dict[tuple, set[str]] = {}
        for r in mine:
            run = r["machine"], r["threads"], r["date"], r["versions"].get("torch", "?")
            seen.setdefault(run, set()).add(str(r["copy_gb_s"]))
        for (machine, threads, day, torch_version), copies in sorted(seen.items()):
            measured = " and ".join(sorted(copies, key=float))
            parts.append(f"**{title}**: {machine}, {threads} thread(s), torch {torch_version}, {day}; copy {measured} GB/s.\n")
        order = list(dict.fromkeys(row["op"].split()[0] for row in mine))
        mine.sort(key=lambda row: order.index(row["op"].split()[0]))
        parts.append("| op | shape | type | ours, ms | over the floor | others, times ours | error against fp64 | goal |\n|---|---|---|---|---|---|---|---|")
        for row in mine:
            others = ", ".join(f"{name} {ratio:.2f}" for name, ratio in row["times_ours"].items())
            parts.append(
                f"| {row['op']} | {row['shape']} | {row['dtype']} | {row['milliseconds']['csrc']:.3f} | {row['over_floor']:.2f} | {others} "
                f"| {row['errors'].get('csrc', float('nan')):.1g} | {row['target'] or '-'} |"
            )
        parts.append("")
    return "\n".join(parts)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--ops", nargs="+", choices=OPS)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1: ratios of more are noisy)")
    parser.add_argument("--seconds", type=float, default=6.0, help="time per case")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--quick", action="store_true", help="one shape per op")
    parser.add_argument("--no-build", action="store_true", help="measure the installed library as it is")
    parser.add_argument("--no-store", action="store_true", help="print only")
    parser.add_argument("--write-docs", action="store_true")
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(HERE)]
    if options.write_docs:
        result_rows.write_table(RESULTS, DOCS, BEGIN, table)
        return 0
    if not options.no_build:
        from tools.build_csrc import LIBRARY, build

        build(LIBRARY)
    rows = bench(options)
    if not options.no_store:
        result_rows.store(rows, RESULTS, DOCS, BEGIN, table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
