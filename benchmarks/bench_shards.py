"""What shards cost: opening, finding documents, ids, checking and merging, by CPU time of the process on one core.

    python benchmarks/bench_shards.py                      100 million documents in the index, 1 GB of tokens: 3 GB of disk, a minute or two
    python benchmarks/bench_shards.py --documents 5000000 --megabytes 128 --rows 100000

Rows are appended to benchmarks/results/shards.jsonl with date, command, machine and versions.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from megatron_r1.data.indexed import BLOCK, write_index, write_sums
from megatron_r1.data.shard_rewrite import merge_datasets
from megatron_r1.data.shards import Shard, ShardWriter, SplitRecord
from megatron_r1.utils import machine

RESULTS = Path(__file__).resolve().parent / "results" / "shards.jsonl"
Row = dict[str, Any]


def seconds(act: Callable[[], Any]) -> float:
    """CPU seconds of one call."""
    began = time.process_time()
    act()
    return time.process_time() - began


def resident() -> float:
    """MB of memory of this process that no file backs."""
    memory = psutil.Process().memory_info()
    return (memory.rss - memory.shared) / 1e6


def index_rows(folder: Path, documents: int) -> list[Row]:
    """An index of many documents over a .bin of holes."""
    draw = np.random.default_rng(0)
    prefix = folder / "many"
    tokens = 0

    def lengths() -> Any:
        for first in range(0, documents, 1 << 20):
            yield draw.integers(1, 2000, min(1 << 20, documents - first))

    def write() -> None:
        nonlocal tokens
        _, tokens = write_index(prefix.with_name("many.idx"), lengths(), np.dtype(np.uint16))

    rows = [{"what": f"write the index of {documents:,} documents", "value": seconds(write), "unit": "s"}]
    size = 2 * tokens
    with open(prefix.with_name("many.bin"), "wb") as stream:
        stream.truncate(size)
    sums = np.full(-(-size // BLOCK), zlib.crc32(bytes(BLOCK)), np.uint32)
    sums[-1] = zlib.crc32(bytes(size - (len(sums) - 1) * BLOCK))
    write_sums(prefix.with_name("many.bin"), sums)
    before = resident()
    shards: list[Shard] = []
    rows.append({"what": f"open it ({documents:,} documents, {tokens / 1e9:.1f} G tokens) and read the last document", "value": 1e3 * seconds(lambda: shards.append(Shard.at(prefix)) or shards[0].tokens(documents - 1)), "unit": "ms"})
    rows.append({"what": "memory for that", "value": resident() - before, "unit": "MB"})
    rows.append({"what": "first `find` (all offsets are checked)", "value": seconds(lambda: shards[0].find(tokens // 2)), "unit": "s"})
    places = draw.integers(0, tokens, 100_000).tolist()
    rows.append({"what": "`find` a document by token, in random order", "value": len(places) / seconds(lambda: [shards[0].find(place) for place in places]), "unit": "a second"})
    rows.append({"what": "memory after that", "value": resident() - before, "unit": "MB"})
    return rows


def content_rows(folder: Path, megabytes: int, documents: int) -> list[Row]:
    """A shard with sidecar: writing rows, ids, checking every byte, merging."""
    draw = np.random.default_rng(1)
    each = megabytes * 500_000 // documents
    block = draw.integers(0, 60_000, each).astype(np.uint16)
    writer = ShardWriter(folder / "full", 60_000)

    def write() -> None:
        for i in range(documents):
            writer.add(block, 4 * each, f"source-{i:012d}", f"group-{i:012d}", file=f"part-{i // 1000}.jsonl", offset=4 * each * i)
        records.append(writer.close())

    records: list[SplitRecord] = []
    rows = [{"what": f"write {documents:,} documents of {each} tokens with sidecar", "value": megabytes / seconds(write), "unit": "MB/s"}]
    shard = Shard(folder / "full", records[0])
    rows.append({"what": "open a shard and read the row of one document", "value": 1e3 * seconds(lambda: [Shard(folder / "full", records[0]).documents.row(i) for i in draw.integers(0, documents, 20).tolist()]) / 20, "unit": "ms"})
    rows.append({"what": "check every byte (`verify`)", "value": megabytes / seconds(shard.verify), "unit": "MB/s"})
    rows.append({"what": "merge two of these, checked, ids compared", "value": 2 * megabytes / seconds(lambda: merge_datasets([folder / "full", folder / "full"], folder / "both")), "unit": "MB/s"})
    return rows


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100_000_000, help="in the large index")
    parser.add_argument("--megabytes", type=int, default=1024, help="of tokens in the shard that is checked and merged")
    parser.add_argument("--rows", type=int, default=1_000_000, help="documents in that shard")
    parser.add_argument("--no-store", action="store_true", help="only print")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        rows = index_rows(Path(name), args.documents)
    with tempfile.TemporaryDirectory() as name:
        rows += content_rows(Path(name), args.megabytes, args.rows)
    for row in rows:
        print(f"{row['what']:90s} {row['value']:>14,.2f} {row['unit']}")
    if not args.no_store:
        RESULTS.parent.mkdir(exist_ok=True)
        record = {"date": date.today().isoformat(), "command": "python " + shlex.join(["benchmarks/bench_shards.py", *sys.argv[1:]]), "machine": machine.describe(), "versions": machine.versions(), "rows": rows}
        with open(RESULTS, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
