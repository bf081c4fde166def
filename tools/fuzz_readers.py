"""Feed damaged files to the readers of .idx, the sidecar, sources.json, manifests, tokenizer records and recipes.

    python tools/fuzz_readers.py --seconds 60                    # every target, mutations of good files
    python tools/fuzz_readers.py --targets index --atheris       # guided by coverage (pip install atheris)

Whatever a file holds, a reader may only work or raise an R1Error, in little time and memory. Anything else is written to
tests/data/fuzz_corpus/<target>/, which the tests replay for ever.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

if "--atheris" in sys.argv:  # coverage is counted in what is imported below
    import atheris

    with atheris.instrument_imports(include=["megatron_r1.data", "megatron_r1.config", "megatron_r1.artifacts", "megatron_r1.pipeline", "yaml"]):
        import megatron_r1.artifacts.base
        import megatron_r1.data.shard_checks
        import megatron_r1.data.shard_stats
        import megatron_r1.pipeline.recipe  # noqa: F401

import yaml

from megatron_r1.artifacts.base import open_artifact, open_workspace
from megatron_r1.data.bpe import train_bpe
from megatron_r1.data.documents import Documents, write_documents
from megatron_r1.data.indexed import BlockReader, Index, checksum_file, crc_path
from megatron_r1.data.shard_checks import verify
from megatron_r1.data.shard_stats import shards_of, statistics
from megatron_r1.data.shards import SOURCES_FILE, Shard, ShardSet, ShardWriter, SourceRecord
from megatron_r1.data.tokenizer import INFO_FILE, Tokenizer
from megatron_r1.pipeline.recipe import load_recipe
from megatron_r1.utils.errors import R1Error
from megatron_r1.utils.io import atomic_write_json

CORPUS = Path(__file__).resolve().parents[1] / "tests" / "data" / "fuzz_corpus"
SLOW = 5.0
"""Seconds of processor time after which a reader counts as hung."""
RECIPE = """
name: own
steps:
  corpus:
    stage: corpus
    sources:
      notes: {kind: jsonl, path: "notes/*.jsonl", domain: web, text_field: "${FIELD:-text}"}
    tokenizer: {kind: train_bpe, vocab_size: 4096}
  mix:
    stage: mixture
    inputs: {shards: corpus}
    method: natural
"""


@dataclass
class Target:
    """A reader: `read` takes the whole content of one file; `seeds` are contents it accepts."""

    seeds: list[bytes]
    read: Callable[[bytes], Any]
    text: bool = False


class Targets:
    """All readers, each with a folder of good files around the one that is damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        work = open_workspace(folder / "set", "corpus", "shards", {"a": 1})
        tokenizer = train_bpe(["a few words to train on", "and some more words"] * 3, 300, work.path / "tokenizer")
        prefix = work.path / "sources" / "news" / "train"
        prefix.parent.mkdir(parents=True)
        writer = ShardWriter(prefix, 300, True, tokenizer.sha256)
        for i in range(5):
            writer.add(np.arange(i), 2 * i, f"id{i}", f"g{i % 2}", np.ones(i), f"f{i}", i)
        record = SourceRecord(name="news", domain="web", format="chat", splits={"train": writer.close()})
        atomic_write_json(work.path / SOURCES_FILE, {
            "schema_version": 2, "tokenizer": {"sha256": tokenizer.sha256, "vocab_size": 300}, "sources": {"news": record.plain()}, "missing": [{"name": "x", "reason": "y"}],
            "control_groups": ["c"], "decontaminated": [],
        })
        self.artifact = work.complete({"n": 1}).path
        self.prefix = self.artifact / "sources" / "news" / "train"
        (folder / "one").mkdir()
        self.targets = {
            "index": Target([self._good("train.idx"), self._many()], self._index),
            "summed_index": Target([self._good("train.idx"), self._many()], self._summed_index),
            "documents": Target([self._good("train.docs.parquet")], self._documents),
            "sums": Target([self._good("train.bin.crc")], self._beside(self.prefix.with_name("train.bin.crc"))),
            "sources": Target([(self.artifact / SOURCES_FILE).read_bytes()], self._beside(self.artifact / SOURCES_FILE), text=True),
            "manifest": Target([(self.artifact / "manifest.json").read_bytes()], self._beside(self.artifact / "manifest.json"), text=True),
            "tokenizer": Target([(self.artifact / "tokenizer" / INFO_FILE).read_bytes()], self._beside(self.artifact / "tokenizer" / INFO_FILE), text=True),
            "recipe": Target([RECIPE.encode(), b"extends: quickstart\nsteps: {pretrain1: {seed: 3}}\n", b"extends: [quickstart_ci]\n"], self._recipe, text=True),
            "override": Target([b"steps.corpus.seed=3", b"steps.mix={method: natural}", b"seed=1e-3"], self._override, text=True),
        }

    def _good(self, name: str) -> bytes:
        return self.prefix.with_name(name).read_bytes()

    def _many(self) -> bytes:
        path = self.folder / "many.docs.parquet"
        write_documents(path, [(f"i{i}", "", 1, 1, "", 0) for i in range(9)])
        writer = ShardWriter(self.folder / "many", 70000)
        for i in range(40):
            writer.add(np.arange(i % 7), 1, f"i{i}")
        writer.close()
        return (self.folder / "many.idx").read_bytes()

    def _index(self, data: bytes) -> None:
        path = self.folder / "one" / "a.idx"
        path.write_bytes(data)
        crc_path(path).unlink(missing_ok=True)
        self._use_index(Index(path))
        (self.folder / "one" / "a.bin").write_bytes(bytes(20))
        crc_path(self.folder / "one" / "a.bin").unlink(missing_ok=True)
        self._use(Shard.at(path))

    def _summed_index(self, data: bytes) -> None:
        """Somebody's tool wrote nonsense and its checksums: what is read later must hold too."""
        path = self.folder / "one" / "b.idx"
        path.write_bytes(data)
        checksum_file(path)
        (self.folder / "one" / "b.bin").write_bytes(bytes(20))
        checksum_file(self.folder / "one" / "b.bin")
        index = Index(path)
        for use in (lambda: self._use_index(index), lambda: self._use(Shard.at(path)), index.verify):
            with contextlib.suppress(R1Error):
                use()

    def _use_index(self, index: Index) -> None:
        n = len(index)
        assert len(index.lengths) == n
        index.edges(0, n)
        for token in {0, index.tokens // 2, index.tokens - 1}:
            index.find(token)

    def _use(self, shard: Shard) -> None:
        for i in range(min(len(shard), 8)):
            shard.tokens(i)
            shard.mask(i)
        statistics({("a", ""): shard}, content=True)

    def _documents(self, data: bytes) -> None:
        path = self.folder / "one" / "a.docs.parquet"
        path.write_bytes(data)
        checksum_file(path)
        documents = Documents(BlockReader(path))
        if len(documents):
            documents.row(len(documents) - 1)
        list(documents.column("id"))
        documents.column("n_bytes").numbers()
        assert isinstance(documents.tokenizer, str)
        documents.verify()

    def _beside(self, path: Path) -> Callable[[bytes], None]:
        """One file of the artifact replaced, then all of it read."""
        good = path.read_bytes()

        def read(data: bytes) -> None:
            path.write_bytes(data)
            try:
                verdict = verify(self.artifact)
                # Without its checksum a manifest is one of an earlier release, and `verify` says that it can not vouch for it.
                assert data == good or verdict.damaged or verdict.unprotected, "a changed file that `verify` does not find"
                for act in (lambda: open_artifact(self.artifact, "shards", "full"), lambda: Tokenizer.load(self.artifact / "tokenizer").decode([1, 2])):
                    with contextlib.suppress(R1Error):
                        act()
                shards = ShardSet.open(self.artifact)
                statistics(shards_of(shards), content=True)
                for name in shards.sources:
                    self._use(shards.split(name))
                    list(shards.split(name).ids)
            finally:
                path.write_bytes(good)

        return read

    def _recipe(self, data: bytes) -> None:
        path = self.folder / "one" / "recipe.yaml"
        path.write_bytes(data)
        load_recipe(path)

    def _override(self, data: bytes) -> None:
        path = self.folder / "one" / "base.yaml"
        path.write_text(RECIPE)
        load_recipe(path, [data.decode("utf-8", "surrogateescape")])


STRANGE: list[Any] = [
    None, True, 0, -1, 1 << 31, 1 << 63, 1 << 70, -(1 << 70), 10**400, 1.5, 1e308, float("inf"), float("nan"), "", "\0", "a\0b", "../../x", "/", "é" * 50, "\ud800", "x" * 5000, [], [[]], {}, {"": None},
    [1, 2], [-1, -1], {"a": {"b": []}}, "${NOPE}", "${", "1e999", "0x10", "12 PB", "-5B",
]  # fmt: skip


def mutated(data: bytes, draw: random.Random, target: Target) -> bytes:
    """A damaged copy: bytes or numbers changed, parts cut, doubled and moved; of JSON and YAML also values and keys exchanged."""
    if target.text and draw.random() < 0.6:
        try:
            value = yaml.safe_load(data) if not data.startswith(b"{") else json.loads(data)
        except Exception:  # any: the library is not what is tested
            value = None
        if isinstance(value, dict):
            for _ in range(draw.choice((1, 1, 1, 2, 4))):
                value = _changed(value, draw)
            return json.dumps(value).encode("utf-8", "surrogatepass")
    raw = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4, 8))):
        at = draw.randrange(len(raw) + 1)
        kind = draw.randrange(7)
        if kind == 0 and at < len(raw):
            raw[at] ^= 1 << draw.randrange(8)
        elif kind == 1 and at < len(raw):
            raw[at] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
        elif kind == 2:
            width = draw.choice((1, 2, 4, 8))
            raw[at : at + width] = (draw.choice((0, 1, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1, draw.getrandbits(64))) % (1 << 8 * width)).to_bytes(width, "little")
        elif kind == 3:
            del raw[at : at + draw.choice((1, 4, 8, 64, 4096))]
        elif kind == 4:
            raw[at:at] = bytes(draw.randrange(256) for _ in range(draw.choice((1, 4, 8, 32))))
        elif kind == 5:
            raw[at:at] = raw[at : at + draw.randrange(64)] * draw.choice((1, 2, 50))
        elif kind == 6 and target.text:
            raw[at:at] = draw.choice((b"[" * 3000, b"{", b"}", b"- " * 2000, b"&a [*a]", b"*a", b"!!python/object:os.system x", b"<<: ", b"\xff\xfe", b"\t", b"? ", b"| ", b"2001-99-99", b"0o9", b"9" * 5000, b"!!int x", b"!!timestamp x", b"!!float ", b": "))
    return bytes(raw)


def _changed(value: Any, draw: random.Random) -> Any:
    """One place in nested data made strange."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        kind = draw.randrange(8)
        if kind == 0:
            return {name: item for name, item in value.items() if name != key}
        if kind == 1:
            return {(draw.choice(("", "\0", "../x", "é", "a/b", "x" * 300)) if name == key else name): item for name, item in value.items()}
        if kind == 2:
            return {**value, draw.choice(("more", *value)): draw.choice(list(value.values()))}
        return {**value, key: _changed(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.7:
        at = draw.randrange(len(value))
        return draw.choice(([*value[:at], _changed(value[at], draw), *value[at + 1 :]], value[:at], value * 2))
    if isinstance(value, int) and not isinstance(value, bool) and draw.random() < 0.5:
        return draw.choice((value + 1, value - 1, -value, value * 2**32, 0.5, str(value)[:100]))
    return draw.choice(STRANGE)


def offence(target: Target, data: bytes) -> str | None:
    """What a reader did with `data` that it may not, or None."""
    began = time.process_time()  # not the wall's: a busy machine is no fault of the reader
    try:
        target.read(data)
    except R1Error:
        pass
    except Exception:
        return traceback.format_exc(limit=-6)
    seconds = time.process_time() - began
    return f"{seconds:.1f} s" if seconds > SLOW else None


def inputs(target: Target, draw: random.Random) -> Iterator[bytes]:
    """Damaged contents without end."""
    while True:
        data = draw.choice(target.seeds)
        for _ in range(draw.choice((1, 1, 2))):
            data = mutated(data, draw, target)
        yield data


def keep(name: str, data: bytes) -> Path:
    """File an offending input for the tests."""
    path = CORPUS / name / hashlib.sha256(data).hexdigest()[:12]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def hunt(name: str, target: Target, seconds: float, seed: int) -> tuple[int, int]:
    """Mutate for so long; returns inputs tried and different offences (by the line that raised)."""
    draw, until, tried, seen = random.Random(f"{seed}/{name}"), time.monotonic() + seconds, 0, set()
    for data in inputs(target, draw):
        if time.monotonic() > until:
            break
        tried += 1
        said = offence(target, data)
        where = said and "\n".join(line for line in said.splitlines() if line.strip().startswith("File"))
        if said and where not in seen:
            seen.add(where)
            print(f"--- {name}: kept {keep(name, data)}\n{said}")
    return tried, len(seen)


def guided(name: str, target: Target, seconds: float, seed: int) -> None:
    """The same with atheris, which follows coverage. Ends the process at the first offence (its input is in the working directory)."""
    def one(data: bytes) -> None:
        said = offence(target, data)
        if said:
            print(f"--- {name}: kept {keep(name, data)}")
            raise AssertionError(said)

    def mutator(data: bytes, largest: int, number: int) -> bytes:
        draw = random.Random(number)
        return mutated(data, draw, target)[:largest] if draw.random() < 0.5 else atheris.Mutate(data, largest)

    with tempfile.TemporaryDirectory() as folder:
        for number, data in enumerate(target.seeds):
            (Path(folder) / str(number)).write_bytes(data)
        atheris.Setup([sys.argv[0], folder, f"-max_total_time={int(seconds)}", f"-seed={seed + 1}", "-max_len=20000", "-print_final_stats=1"], one, custom_mutator=mutator)
        atheris.Fuzz()


def main(argv: list[str] | None = None) -> int:
    """Entry point; 1 when a reader did what it may not."""
    parser = argparse.ArgumentParser(prog="fuzz_readers.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", help="by default all")
    parser.add_argument("--seconds", type=float, default=60, help="for each target")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations")
    parser.add_argument("--atheris", action="store_true", help="coverage-guided; one target")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        targets = Targets(Path(folder)).targets
        unknown = set(args.targets or ()) - set(targets)
        if unknown or (args.atheris and len(args.targets or ()) != 1):
            parser.error(f"targets are {', '.join(targets)}; one of them with --atheris")
        if args.atheris:
            guided(args.targets[0], targets[args.targets[0]], args.seconds, args.seed)
            return 0
        worst = 0
        for name in args.targets or targets:
            tried, found = hunt(name, targets[name], args.seconds, args.seed)
            print(f"{name}: {tried} inputs, {found} offences", flush=True)
            worst = max(worst, found)
        return min(worst, 1)


if __name__ == "__main__":
    sys.exit(main())
