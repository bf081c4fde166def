"""How fast input files become documents, and what other parsers and decompressors would change.

    python benchmarks/bench_read.py --megabytes 200 --folder scratch

Prints one JSON line a case: MB/s of content on one core (CPU seconds, best of three) and documents. The files are generated, the same
in every run. orjson and isal are measured where they are installed; the readers use neither.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import json
import lzma
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from megatron_r1.corpus import fields, streams
from megatron_r1.corpus.config import SourceConfig
from megatron_r1.corpus.files import Stored, describe
from megatron_r1.corpus.readers import read


def generate(folder: Path, megabytes: int) -> dict[str, Path]:
    """The same documents in every format: words with log-normally many in a document, some with letters beyond ASCII."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(5000)]
    words[::50] = [f"{word}é" for word in words[::50]]
    texts, size = [], 0
    while size < megabytes << 20:
        texts.append(" ".join(draw.choices(words, k=int(draw.lognormvariate(5.5, 1)))) + '\n"quoted"')
        size += len(texts[-1])
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": text, "id": f"doc-{i}", "url": f"https://example.org/{i}", "score": i / 7, "meta": {"lang": "en"}}) + "\n" for i, text in enumerate(texts)).encode()
    packed = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lambda data: lzma.compress(data, preset=1), ".zst": zstandard.ZstdCompressor().compress}
    files = {}
    for suffix, compress in packed.items():
        files[f"jsonl{suffix}"] = folder / f"a.jsonl{suffix}"
        files[f"jsonl{suffix}"].write_bytes(compress(lines))
    code = 'def f(x):\n    """doc\t\\"""\n    return {"a": [x, 1]}\n' * 60
    files["jsonl of code"] = folder / "code.jsonl"
    files["jsonl of code"].write_text("".join(json.dumps({"text": code, "id": i}) + "\n" for i in range((megabytes << 20) // len(code))))
    files["parquet"] = folder / "a.parquet"
    pq.write_table(pa.table({"text": texts, "url": [f"https://example.org/{i}" for i in range(len(texts))]}), files["parquet"], compression="zstd", row_group_size=10_000)
    return files


def measure(case: str, content: int, work: Callable[[], int]) -> None:
    """One line: MB of content a CPU second, the best of three."""
    seconds = []
    for _ in range(3):
        began = time.process_time()
        made = work()
        seconds.append(time.process_time() - began)
    print(json.dumps({"case": case, "mb_per_second": round(content / 1e6 / min(seconds), 1), "made": made}), flush=True)


def count(kind: str, path: Path) -> int:
    """Documents of a file."""
    return sum(1 for _ in read("s", SourceConfig(kind=kind, path="x", domain="web"), describe([path])))  # type: ignore[arg-type]


def one_line(folder: Path, megabytes: int) -> None:
    """A file of a single line, in this process: its memory and time."""
    path = folder / "line.jsonl"
    with open(path, "wb") as out:
        out.write(b'{"text": "')
        for _ in range(megabytes):
            out.write("Größe und Maß. word ".encode() * 45_000)
        out.write(b'"}\n')
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    assert count("jsonl", path) == 1
    size, more = path.stat().st_size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"case": f"one line of {size / 1e6:.0f} MB", "mb_per_second": round(size / 1e6 / (time.process_time() - began), 1), "memory_times_its_size": round(more * 1024 / size, 2)}), flush=True)
    path.unlink()


def main() -> None:
    """Generate, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--folder", type=Path, required=True, help="for the generated files")
    parser.add_argument("--one-line", type=int, default=0, help="only this: a single line of so many MB")
    args = parser.parse_args()
    if args.one_line:
        args.folder.mkdir(parents=True, exist_ok=True)
        one_line(args.folder, args.one_line)
        return
    files = generate(args.folder, args.megabytes)
    lines = files["jsonl"].read_bytes().splitlines()
    size = files["jsonl"].stat().st_size
    sizes = {"jsonl of code": files["jsonl of code"].stat().st_size}
    for name, path in files.items():
        measure(f"read {name}", sizes.get(name, size), lambda name=name, path=path: count("parquet" if name == "parquet" else "jsonl", path))
    with Stored(describe([files["jsonl"]])[0]) as stream:
        measure("only split into lines", size, lambda: sum(1 for _ in streams.lines(streams.blocks(stream, ""), 0)))
    measure("only json.loads", size, lambda: sum(len(json.loads(line)) for line in lines))
    packed = files["jsonl.gz"].read_bytes()
    measure("only gzip", size, lambda: len(gzip.decompress(packed)))
    try:
        import orjson

        measure("only orjson.loads", size, lambda: sum(len(orjson.loads(line)) for line in lines))
        parse = fields.parse
        fields.parse = lambda line, _offset: orjson.loads(line)
        for name in ("jsonl", "jsonl of code"):
            measure(f"read {name} with orjson", sizes.get(name, size), lambda name=name: count("jsonl", files[name]))
        fields.parse = parse
    except ImportError:
        print(json.dumps({"case": "only orjson.loads", "missing": "pip install orjson"}))
    try:
        from isal import igzip

        measure("only isal", size, lambda: len(igzip.decompress(packed)))
    except ImportError:
        print(json.dumps({"case": "only isal", "missing": "pip install isal"}))
    for megabytes in (64, 256):
        subprocess.run([sys.executable, __file__, "--folder", str(args.folder), "--one-line", str(megabytes)], check=True)


if __name__ == "__main__":
    main()
