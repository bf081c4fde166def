"""JSON lines to .bin/.idx: this project beside Megatron-LM's way with Hugging Face tokenizers and beside datatrove, ids compared.

    python benchmarks/bench_preprocess.py --datatrove-python /path/to/its/env/bin/python        1 and 2 workers
    python benchmarks/bench_preprocess.py --megabytes 8 --no-store                              a trial without datatrove
    python benchmarks/bench_preprocess.py --memory 0.5 1 2                                      peak memory over gigabytes of input
    python benchmarks/bench_preprocess.py --write-docs                                          only rewrite the table in docs/data.md

Input is the text of the embedded corpora (real code, mathematics, encyclopedia, chat), documents mixed, the same file for all. Every
contestant is a process of its own; ours is tools/preprocess_data.py from start to end, imports and self-check included, the
others are timed without their imports (their CPU time has them). Seconds are the least of --repeat runs, contestants taking turns. Peak memory is the resident
memory of the process and its children together, sampled. The floor is what has to be done in any case: reading and parsing, and
tokenising alone. With --memory the input is generated: the corpora again and again with new words in every document, zstd.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import result_rows

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from megatron_r1.corpus import embedded  # noqa: E402
from megatron_r1.corpus.config import CorpusConfig  # noqa: E402
from megatron_r1.corpus.tokenizers import make  # noqa: E402
from megatron_r1.data.bpe import train_bpe  # noqa: E402
from megatron_r1.data.indexed import read_index  # noqa: E402
from megatron_r1.data.tokenizer import Tokenizer  # noqa: E402
from megatron_r1.utils import machine  # noqa: E402
from megatron_r1.utils.errors import EnvironmentProblem  # noqa: E402

RESULTS = HERE / "results" / "preprocess.jsonl"
DOCS = ROOT / "docs" / "data.md"
BEGIN = "<!-- table: python benchmarks/bench_preprocess.py --write-docs -->"
QUIET = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
GOALS = {"megatron-style": 2.0, "datatrove": 1.5}


def corpus(size: int) -> list[str]:
    """Documents of the embedded corpora, mixed, about `size` characters. What spells a special token is left out: some of the others read one there."""
    context = embedded.Context(0, lambda group: "train")
    texts: list[str] = []
    for name in embedded.names():
        entry = embedded.corpus(name)
        if entry.format == "text" and not entry.distractor:
            try:
                texts += [document.text for document in entry.make(context) if document.text and "<|" not in document.text]
            except EnvironmentProblem as problem:
                print(f"without {name}: {problem.found}")
    random.Random(0).shuffle(texts)
    total, kept = 0, []
    for text in texts:
        kept.append(text)
        total += len(text)
        if total >= size:
            break
    return kept


def tokenizer_for(name: str, texts: list[str], folder: Path) -> Tokenizer:
    """trained (32,000 ids, on these texts), smollm2 (49,152, out of its package), or the path of a tokenizer.json."""
    if name == "trained":
        return train_bpe(texts[:: max(1, len(texts) // 4000)], 32000, folder)
    kind = {"kind": "package"} if name == "smollm2" else {"kind": "huggingface", "path": name}
    return make(CorpusConfig.model_validate({"seed": 0, "sources": {"x": {"kind": "jsonl", "path": "-", "domain": "web"}}, "tokenizer": kind}), None, (), folder)


def run(command: list[str]) -> tuple[float, float, dict[str, Any]]:
    """Seconds, peak MB of the process and its children, and what its last line of JSON says, with `cpu`: processor seconds of all of them."""
    began, peak = time.perf_counter(), 0
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(command, env=os.environ | QUIET, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ended = threading.Event()
    seen: dict[int, float] = {}  # CPU seconds of each process: those of a fork server's children never reach us through wait()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.05):
            total = 0
            try:
                whole = psutil.Process(process.pid)
                for each in (whole, *whole.children(recursive=True)):
                    total += each.memory_info().rss
                    seen[each.pid] = sum(each.cpu_times()[:2])
            except psutil.NoSuchProcess:
                continue
            peak = max(peak, total)

    watcher = threading.Thread(target=watch)
    watcher.start()
    out, error = process.communicate()
    seconds = time.perf_counter() - began
    ended.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{shlex.join(command)} failed:\n{error[-3000:]}")
    said = [line for line in out.splitlines() if line.startswith("{")]
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = (json.loads(said[-1]) if said else {}) | {"cpu": max(now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime, sum(seen.values()))}
    return found.get("seconds", seconds), peak / 1e6, found


def digest(prefixes: list[Path]) -> str:
    """Of all ids and lengths, whatever type they are stored in."""
    sums = [hashlib.sha256(), hashlib.sha256()]
    for prefix in prefixes:
        lengths, dtype = read_index(prefix.with_name(prefix.name + ".idx"))
        sums[0].update(np.asarray(lengths, np.int64).tobytes())
        tokens = np.memmap(prefix.with_name(prefix.name + ".bin"), dtype, "r")
        for at in range(0, len(tokens), 1 << 24):
            sums[1].update(np.asarray(tokens[at : at + (1 << 24)], np.int64).tobytes())
    return sums[0].hexdigest()[:16] + sums[1].hexdigest()[:16]


def ours(paths: list[Path], tokenizer: Tokenizer, prefix: Path, workers: int, library: str) -> list[str]:
    """The command line of this project."""
    return [
        sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", *map(str, paths), "--tokenizer-type", "R1Tokenizer", "--tokenizer-model", str(tokenizer.folder),
        "--append-eod", "--output-prefix", str(prefix), "--workers", str(workers), "--tokenizer-library", library,
    ]


def contest(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """All contestants on one input; returns the rows."""
    texts = corpus(int(options.megabytes * 1e6))
    tokenizer = tokenizer_for(options.tokenizer, texts, folder / "tokenizer")
    specials = tokenizer.backend.specials()
    texts = [text for text in texts if not any(name in text for name in specials)]  # as in `corpus`: text is only ever text here, not there
    whole, parts = folder / "all.jsonl", folder / "parts"
    lines = [json.dumps({"id": str(i), "text": text}, ensure_ascii=False) + "\n" for i, text in enumerate(texts)]
    whole.write_text("".join(lines), "utf-8")
    size = sum(len(text.encode()) for text in texts) / 1e6
    assert tokenizer.eos_id is not None
    end = tokenizer.special_name(tokenizer.eos_id)
    common = {"tokenizer": options.tokenizer, "vocab_size": tokenizer.vocab_size, "mb": round(size, 1), "documents": len(texts)}
    rows: list[dict[str, Any]] = [common | row | {"workers": 1, "part": "floor"} for row in floor(whole, texts, size, tokenizer)]
    for workers in options.workers:
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir()
        for i in range(workers):
            (parts / f"{i}.jsonl").write_text("".join(lines[len(lines) * i // workers : len(lines) * (i + 1) // workers]), "utf-8")
        out = folder / "out"
        at = {name: out / name.replace(" ", "_") for name in ("ours", "ours, plain library", "megatron-style", "datatrove")}
        commands = {
            "ours": ours([whole], tokenizer, at["ours"], workers, "gigatoken"), "ours, plain library": ours([whole], tokenizer, at["ours, plain library"], workers, "plain"),
            "megatron-style": [
                sys.executable, str(HERE / "peers" / "preprocess_megatron.py"), str(whole), str(tokenizer.folder / "tokenizer.json"), str(tokenizer.eos_id), str(tokenizer.vocab_size),
                str(at["megatron-style"]), str(workers),
            ],
        }
        if options.datatrove_python:
            commands["datatrove"] = [options.datatrove_python, str(HERE / "peers" / "preprocess_datatrove.py"), str(parts), str(tokenizer.folder / "tokenizer.json"), end, str(at["datatrove"]), str(workers)]
        times: dict[str, list[float]] = {name: [] for name in commands}
        peaks: dict[str, float] = dict.fromkeys(commands, 0.0)
        cpu: dict[str, float] = {}
        versions: dict[str, str] = {}
        digests: dict[str, str] = {}
        for _ in range(options.repeat):
            for name, command in commands.items():
                shutil.rmtree(out, ignore_errors=True)
                out.mkdir()
                seconds, peak, said = run(command)
                times[name].append(round(seconds, 2))
                cpu[name] = min(cpu.get(name, math.inf), said["cpu"])
                peaks[name] = max(peaks[name], peak)
                versions |= said.get("versions", {})
                made = sorted(path.with_suffix("") for path in out.rglob("*.bin"))
                digests[name] = digest(made)
        if len(set(digests.values())) != 1:
            raise SystemExit(f"the ids differ: {digests}; nothing is stored")
        best = min(times["ours"])
        for name in commands:
            ratio = min(times[name]) / best
            rows.append(common | {
                "part": "contest", "name": name, "workers": workers, "seconds": min(times[name]), "all_seconds": times[name], "mb_s": round(size / min(times[name]), 2),
                "times_ours": round(ratio, 2), "cpu_seconds": round(cpu[name], 2), "cpu_times_ours": round(cpu[name] / cpu["ours"], 2), "peak_mb": round(peaks[name]), "goal": GOALS.get(name), "ids": digests[name], "peer_versions": versions if name == "datatrove" else {},
            })
            print(line(rows[-1]), flush=True)
    return rows


def floor(path: Path, texts: list[str], size: float, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """What no way can do without, on one core."""
    found = []

    def timed(name: str, work: Any) -> None:
        seconds = []
        for _ in range(2):
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
        found.append({"name": name, "seconds": round(min(seconds), 3), "mb_s": round(size / min(seconds), 1)})
        print(f"floor: {name:<44} {found[-1]['mb_s']:8.1f} MB/s", flush=True)

    def parse() -> None:
        with open(path, "rb") as stream:
            for raw in stream:
                json.loads(raw)

    timed("read the file and parse it", parse)
    sample = texts[: max(1, len(texts) // 8)]
    part = sum(len(text.encode()) for text in sample) / 1e6
    for library in ("gigatoken", "plain"):
        tokenizer.choose_library(library)  # type: ignore[arg-type]
        began = time.perf_counter()
        of = texts if library == "gigatoken" else sample
        for i in range(0, len(of), 512):
            tokenizer.encode_arrays(of[i : i + 512])
        seconds = time.perf_counter() - began
        found.append({"name": f"tokenise alone, {tokenizer.library['library']}", "seconds": round(seconds, 3), "mb_s": round((size if library == "gigatoken" else part) / seconds, 1)})
        print(f"floor: {found[-1]['name']:<44} {found[-1]['mb_s']:8.1f} MB/s", flush=True)
    return found


def generate(path: Path, texts: list[str], size: float, seed: int) -> None:
    """`size` bytes of JSON lines as zstd: the texts again and again, twenty words nobody has seen in every document."""
    import zstandard

    draw, written = random.Random(seed), 0
    with open(path, "wb") as raw, zstandard.ZstdCompressor(3).stream_writer(raw) as stream:
        while written < size:
            for text in texts:
                new = " ".join("".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=9)) for _ in range(20))
                written += stream.write(json.dumps({"text": f"{text}\n{new}\n"}, ensure_ascii=False).encode() + b"\n")
                if written >= size:
                    break


def memory(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Peak memory of ours over growing inputs; one file a worker."""
    texts = corpus(8_000_000)
    tokenizer = tokenizer_for(options.tokenizer, texts, folder / "tokenizer")
    rows = []
    for gigabytes in options.memory:
        for workers in options.workers:
            paths = [folder / f"{i}.jsonl.zst" for i in range(workers)]
            for i, path in enumerate(paths):
                generate(path, texts, gigabytes * 1e9 / workers, i)
            out = folder / "out"
            out.mkdir()
            seconds, peak, _ = run(ours(paths, tokenizer, out / "x", workers, "gigatoken"))
            shutil.rmtree(out)
            rows.append({
                "part": "memory", "name": "ours", "tokenizer": options.tokenizer, "workers": workers, "mb": round(gigabytes * 1e3), "seconds": round(seconds, 1),
                "mb_s": round(gigabytes * 1e3 / seconds, 1), "peak_mb": round(peak), "limit_mb": 1000 + 300 * workers,
            })
            print(f"{gigabytes} GB, {workers} workers: peak {peak:.0f} MB (limit {1000 + 300 * workers}), {gigabytes * 1e3 / seconds:.1f} MB/s", flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """One row for the terminal."""
    return f"{row['workers']} workers {row['name']:<20} {row['seconds']:8.2f} s {row['mb_s']:8.2f} MB/s  {row['times_ours']:6.2f} x ours, {row['cpu_seconds']:8.2f} s of CPU ({row['cpu_times_ours']:.2f} x ours), peak {row['peak_mb']} MB"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the newest row of every case."""
    if not rows:
        return "Not run on a quiet machine yet."
    newest = {(row["part"], row["tokenizer"], row["workers"], row["name"], row["mb"] if row["part"] == "memory" else 0): row for row in rows}
    found = ["| tokenizer | workers | who | MB/s | times ours | CPU time, times ours | goal | peak MB |", "|---|---|---|---|---|---|---|---|"]
    for row in newest.values():
        goal = f"≥ {row['goal']}" if row.get("goal") else f"≤ {row['limit_mb']} MB" if "limit_mb" in row else "-"
        name = row["name"] if row["part"] == "contest" else f"floor: {row['name']}" if row["part"] == "floor" else f"ours, {row['mb'] / 1000:g} GB generated"
        found.append(f"| {row['tokenizer']} | {row['workers']} | {name} | {row['mb_s']} | {row.get('times_ours', '-')} | {row.get('cpu_times_ours', '-')} | {goal} | {row.get('peak_mb', '-')} |")
    runs = dict.fromkeys(f"{row['machine']}, {row['date']}, `{row['command']}`, load {row['load']} at the start" for row in newest.values())
    return "\n".join([*found, "", *(f"Run: {text}." for text in runs), ""])


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="trained", help="trained, smollm2, or the path of a tokenizer.json")
    parser.add_argument("--megabytes", type=float, default=64)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--datatrove-python", help="python of an environment with datatrove; without it that row is left out")
    parser.add_argument("--memory", type=float, nargs="+", help="gigabytes of generated input to measure memory over, instead of the contest")
    parser.add_argument("--scratch", help="where input and output are written; by default the system's")
    parser.add_argument("--no-store", action="store_true", help="print only")
    parser.add_argument("--write-docs", action="store_true")
    options = parser.parse_args()
    if options.write_docs:
        result_rows.write_table(RESULTS, DOCS, BEGIN, table)
        return 0
    shown = [part for part in sys.argv[1:] if not part.startswith(os.sep)]
    common = {
        "date": date.today().isoformat(), "command": "python benchmarks/bench_preprocess.py " + shlex.join(shown), "machine": machine.cpu_name(), "cores": machine.usable_cores(),
        "load": round(os.getloadavg()[0], 1), "versions": {name: metadata.version(name) for name in ("tokenizers", "gigatoken", "megatron-core", "numpy")},
    }
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        rows = [common | row for row in (memory if options.memory else contest)(options, Path(folder))]
    if not options.no_store:
        result_rows.store(rows, RESULTS, DOCS, BEGIN, table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
