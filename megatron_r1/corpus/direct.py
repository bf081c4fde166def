"""Input straight to one .bin/.idx, for tools/preprocess_data.py: no splits, no filters, nothing kept for a relaunch.

The input is cut into partitions; a process reads, parses and tokenises one into scratch files, in bounded memory; they are joined
in the order of the input. So the result is the same for any number of processes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.corpus.config import SourceConfig
from megatron_r1.corpus.files import InputFile
from megatron_r1.corpus.partitions import Partition, plan_partitions
from megatron_r1.corpus.readers import Bad, read_partition
from megatron_r1.corpus.tokenise import use_threads
from megatron_r1.corpus.workers import end_with
from megatron_r1.data.indexed import IndexedWriter, token_dtype
from megatron_r1.data.shard_rewrite import placed
from megatron_r1.data.tokenizer import IdsDiffer, Library, Tokenizer
from megatron_r1.utils.errors import DataError, EnvironmentProblem
from megatron_r1.utils.io import disk_errors
from megatron_r1.utils.logging import get_logger

log = get_logger("corpus.direct")
PARTITION_BYTES = 16 << 20
BATCH_BYTES = 1 << 20
"""Input that is read before it is tokenised together."""
BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class Order:
    """What to do with every partition. `tokenizer`: its folder; `end`: ids after every document."""

    source: SourceConfig
    files: Sequence[InputFile]
    tokenizer: Path
    library: Library
    end: tuple[int, ...]
    scratch: Path


@dataclass(frozen=True)
class Done:
    """Counts of a partition, or of all. bytes: of input."""

    documents: int = 0
    tokens: int = 0
    bad: int = 0
    bytes: int = 0
    library: str = ""

    def __add__(self, other: Done) -> Done:
        used = self.library if other.library in self.library else " and ".join(filter(None, (self.library, other.library)))
        return Done(self.documents + other.documents, self.tokens + other.tokens, self.bad + other.bad, self.bytes + other.bytes, used)


def write_dataset(prefix: Path, source: SourceConfig, files: Sequence[InputFile], tokenizer: Path, library: Library, append_eod: bool, workers: int, max_bad_ratio: float) -> Iterator[Done]:
    """Write `<prefix>.bin`, `.idx` and their checksums, and `<prefix>.bad.jsonl` when input is bad; yields the counts so far.

    A dataset of that name is replaced when the new one is whole. Raises DataError, with nothing changed but the list of bad input, when more than
    `max_bad_ratio` of the input is bad.
    """
    opened = Tokenizer.load(tokenizer)
    if library == "gigatoken":
        opened.choose_library(library)  # where it can not be used, that is said before any process starts
    quarantine = prefix.with_name(prefix.name + ".bad.jsonl")
    with disk_errors(prefix):
        prefix.parent.mkdir(parents=True, exist_ok=True)
        quarantine.unlink(missing_ok=True)
    end = (opened.eos_id,) if append_eod and opened.eos_id is not None else ()
    done = Done()
    with placed([prefix], force=True) as folder:
        scratch = folder / "scratch"
        order = Order(source, files, tokenizer.resolve(), library, end, scratch)
        with disk_errors(scratch):
            scratch.mkdir()
        with IndexedWriter(folder / prefix.name, token_dtype(opened.vocab_size)) as writer:
            for number, part in _parts(order, plan_partitions("input", source, files, PARTITION_BYTES), workers):
                _join(_scratch(scratch, number), writer, quarantine)
                done += part
                yield done
            if done.bad > max_bad_ratio * (done.bad + done.documents):
                with open(quarantine, encoding="utf-8") as lines:
                    first = json.loads(lines.readline())
                raise DataError(
                    expected=f"at most {max_bad_ratio:.2%} bad lines",
                    found=f"{done.bad} of {done.bad + done.documents}, listed in {quarantine}; the first: {first['file']}, byte {first['offset']}: {first['reason']}",
                    fix="mend them, or raise --max-bad-ratio",
                )
        with disk_errors(scratch):
            shutil.rmtree(scratch)


def _parts(order: Order, plan: Sequence[Partition], workers: int) -> Iterator[tuple[int, Done]]:
    """Number and counts of every partition, in order, when its scratch files are there."""
    workers = min(workers, len(plan))
    if workers <= 1:
        use_threads(1)
        opened = _open(order)
        yield from ((partition.number, _extract(order, partition, opened)) for partition in plan)
        return
    waiting: deque[tuple[int, Future[Done]]] = deque()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin, (order, os.getpid())) as pool:
        try:
            for partition in plan:
                waiting.append((partition.number, pool.submit(_work, partition)))
                if len(waiting) >= 2 * workers:  # so many lie on the disk at most
                    yield _next(waiting)
            while waiting:
                yield _next(waiting)
        except BrokenProcessPool as error:
            raise EnvironmentProblem(
                expected="processes that live until the work is done", found="one was ended from outside (when memory is short, the system kills the largest)",
                fix="use fewer --workers; each needs about 0.3 GB, and several times the longest document",
            ) from error
        finally:
            for _, future in waiting:
                future.cancel()


def _next(waiting: deque[tuple[int, Future[Done]]]) -> tuple[int, Done]:
    number, future = waiting.popleft()
    return number, future.result()


_state: tuple[Order, Tokenizer] | None = None
"""Of a worker process."""


def _begin(order: Order, parent: int) -> None:
    global _state
    # The pool's own processes wait for ever for one that was killed.
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    os.environ["RAYON_NUM_THREADS"] = "1"
    use_threads(1)
    _state = (order, _open(order))


def _work(partition: Partition) -> Done:
    assert _state is not None
    return _extract(_state[0], partition, _state[1])


def _open(order: Order) -> Tokenizer:
    tokenizer = Tokenizer.load(order.tokenizer)
    tokenizer.choose_library(order.library)
    return tokenizer


def _scratch(folder: Path, number: int) -> tuple[Path, Path, Path]:
    """Tokens, lengths and bad input of a partition."""
    return folder / f"{number}.tokens", folder / f"{number}.lengths", folder / f"{number}.bad"


def _extract(order: Order, partition: Partition, tokenizer: Tokenizer) -> Done:
    """Write a partition's scratch files; again, by the plain library, where the fast one proves wrong."""
    try:
        return _write(order, partition, tokenizer)
    except IdsDiffer as error:
        log.error("partition %d is tokenised again, by %s\n%s", partition.number, tokenizer.library["library"], error)
        return _write(order, partition, tokenizer)


def _write(order: Order, partition: Partition, tokenizer: Tokenizer) -> Done:
    dtype, end = token_dtype(tokenizer.vocab_size), np.asarray(order.end, np.int32)
    documents = tokens = bad = size = 0
    paths = _scratch(order.scratch, partition.number)
    with disk_errors(order.scratch), open(paths[0], "wb") as content, open(paths[1], "wb") as lengths, open(paths[2], "w", encoding="utf-8") as sink:
        for texts, wrong, read in _batches(order, partition):
            encoded = [np.concatenate([ids, end]) if len(end) else ids for ids in tokenizer.encode_arrays(texts)]
            counts = np.fromiter(map(len, encoded), np.int64, len(encoded))
            for ids in encoded:
                content.write(ids.astype(dtype).data)
            lengths.write(counts.data)
            sink.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in wrong)
            documents, tokens, bad, size = documents + len(texts), tokens + int(counts.sum()), bad + len(wrong), size + read
    return Done(documents, tokens, bad, size, tokenizer.library["library"])


def _batches(order: Order, partition: Partition) -> Iterator[tuple[list[str], list[dict[str, Any]], int]]:
    """Texts, bad input and bytes of about BATCH_BYTES of input at a time."""
    texts: list[str] = []
    wrong: list[dict[str, Any]] = []
    size = 0
    for made, length, _ in read_partition(order.source, partition, order.files):
        size += length
        if isinstance(made, Bad):
            wrong.append(made.record())
        else:
            texts.append(made.text or "")
        if size >= BATCH_BYTES:
            yield texts, wrong, size
            texts, wrong, size = [], [], 0
    yield texts, wrong, size


def _join(paths: tuple[Path, Path, Path], writer: IndexedWriter, quarantine: Path) -> None:
    """Append a partition's scratch files to the dataset, and remove them."""
    tokens, lengths, bad = paths
    with disk_errors(quarantine):
        with open(lengths, "rb") as stream:
            while block := stream.read(BLOCK_BYTES):
                writer.extend(np.frombuffer(block, np.int64))
        with open(tokens, "rb") as stream:
            while block := stream.read(BLOCK_BYTES):
                writer.fill(block)
        if bad.stat().st_size:
            with open(quarantine, "ab") as sink, open(bad, "rb") as stream:
                shutil.copyfileobj(stream, sink)
        for path in paths:
            path.unlink()
