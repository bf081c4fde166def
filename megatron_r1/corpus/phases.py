"""The corpus stage as tasks: pure functions of their inputs, done or not done.

    extract    a unit of input     read, filtered, split -> parts                                           extract.py
    ids, equal, near   a bucket    which documents repeat earlier ones, over all parts                      duplicates.py
    decide     a source            what stays; its bad input listed, too much of it an error                decide.py
    tokenizer  one                 trained on a sample drawn by hashes of ids, or imported                  tokenizers.py
    tokenise   a part              -> a piece                                                               tokenise.py
    measure    a shard             shuffled corpora: how long the stretches of the shuffled order are       assemble.py
    assemble   a range of a shard  pieces -> tokens in their place in the shard                             assemble.py
    finish     a shard             checksums, index, documents' rows                                        assemble.py

A phase's tasks read what earlier phases left, in any order, by any number of processes and machines that share the job's
folder. A task is done when its record exists, which is written last; a task that is done twice writes the same bytes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.artifacts.base import open_artifact
from megatron_r1.corpus import assemble, decide, duplicates, tokenizers
from megatron_r1.corpus.assemble import Layout
from megatron_r1.corpus.config import CorpusConfig
from megatron_r1.corpus.extract import extract
from megatron_r1.corpus.plan import Job, Unit
from megatron_r1.corpus.scratch import documents
from megatron_r1.corpus.tokenise import piece, tokenise
from megatron_r1.data.long_text import PIECE, pieces
from megatron_r1.data.shards import SPLITS
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.utils.errors import DataError
from megatron_r1.utils.io import atomic_write_json, disk_errors, read_json
from megatron_r1.utils.logging import get_logger

log = get_logger("corpus")
PHASES = ("extract", *duplicates.SEARCHES, "decide", "tokenizer", "tokenise", "measure", "assemble", "finish")
def phases(config: CorpusConfig) -> list[str]:
    """Those that these settings need, in order."""
    needless = {
        "ids": not any(source.given_ids for source in config.sources.values()), "near": config.near_duplicates is None, "measure": not config.shuffle,
    }
    return [phase for phase in PHASES if not needless.get(phase)]


SHORT = 4096
"""Characters of the pieces that long texts are cut into for training a tokenizer."""


@dataclass(frozen=True)
class Task:
    """One of a phase's. bytes: text (or tokens) it works on, about."""

    phase: str
    name: str
    record: Path
    bytes: int


class Desk:
    """A job being worked at in one process: finds the tasks of a phase and does them."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def turn(self) -> None:
        """An earlier phase has ended: look at its records anew."""
        self.job.forget()
        for name in ("tokenizer", "layout", "_units"):
            self.__dict__.pop(name, None)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, made, with the library that works here."""
        tokenizer = Tokenizer.load(self.job.made / "tokenizer")
        tokenizer.choose_library(self.job.config.tokenizer.library)
        return tokenizer

    @cached_property
    def layout(self) -> Layout:
        """How pieces make shards."""
        return Layout(self.job, {(part.source, part.number): read_json(piece(self.job, part).with_suffix(".json")) for part in self.job.parts})

    @cached_property
    def _units(self) -> dict[str, Unit]:
        return {str(unit.folder): unit for unit in self.job.units}

    def tasks(self, phase: str) -> list[Task]:
        """All tasks of a phase; those before it must be done."""
        if phase == "extract":
            return [Task(phase, name, self.job.folder / unit.folder / "done.json", unit.bytes) for name, unit in self._units.items()]
        return [Task(phase, name, self._record(phase, name), size) for name, size in self._names(phase)]

    def _names(self, phase: str) -> Iterator[tuple[str, int]]:
        job = self.job
        if phase in duplicates.SEARCHES:
            yield from ((bucket, 1) for bucket in duplicates.buckets(job, phase))
        elif phase == "decide":
            yield from ((source, 1) for source in job.present)
        elif phase == "tokenizer":
            yield "tokenizer", 1
        elif phase == "tokenise":
            yield from ((f"{part.source}/{part.number}", part.record["bytes"]) for part in job.parts)
        else:
            for source, split in self.layout.shards():
                if phase == "assemble":
                    for number in range(assemble.ranges(self.layout, source, split)):
                        left = self.layout.shapes[source, split].tokens - number * job.sizes.range
                        yield f"{source}/{split}/{number}", min(left, job.sizes.range) * self.layout.shapes[source, split].dtype.itemsize
                elif phase == "finish" or job.config.shuffle:
                    yield f"{source}/{split}", 1

    def _record(self, phase: str, name: str) -> Path:
        if phase == "tokenise":
            source, number = name.split("/")
            return self.job.made / "pieces" / source / f"{int(number):06d}.json"
        return self.job.made / "records" / phase / (name.replace("/", "-") + ".json")

    def done(self, task: Task) -> bool:
        """Whether the task was done; a source that could not be had may be there now."""
        return task.record.is_file() and not (task.phase == "extract" and read_json(task.record)["missing"])

    def perform(self, task: Task) -> None:
        """Do one task, unless it was done."""
        if not self.done(task):
            atomic_write_json(task.record, self._perform(task))

    def _perform(self, task: Task) -> dict[str, Any]:
        job, names = self.job, task.name.split("/")
        if task.phase == "extract":
            if task.name not in self._units:
                raise DataError(expected="input that stays as it was when the run began", found=f"other files, or of other sizes, than those of {task.name}", fix="run the same command again")
            return extract(job, self._units[task.name])
        if task.phase in duplicates.SEARCHES:
            return duplicates.look(job, task.phase, task.name)
        if task.phase == "decide":
            return decide.decide(job, task.name)
        if task.phase == "tokenizer":
            return self._make_tokenizer()
        if task.phase == "tokenise":
            return tokenise(job, job.parts_of(names[0])[int(names[1])], self.tokenizer)
        if task.phase == "measure":
            return assemble.measure(self.layout, names[0], names[1])
        if task.phase == "assemble":
            return assemble.write_range(self.layout, names[0], names[1], int(names[2]))
        records = [read_json(self._record("assemble", f"{task.name}/{number}")) for number in range(assemble.ranges(self.layout, names[0], names[1]))]
        return assemble.finish(self.layout, names[0], names[1], records, self.tokenizer.sha256)

    def record(self, phase: str, name: str) -> dict[str, Any]:
        """What a task that is done has left."""
        return read_json(self._record(phase, name))

    def _make_tokenizer(self) -> dict[str, Any]:
        job, folder = self.job, self.job.made / "tokenizer"
        given = None if job.given is None else open_artifact(job.given, verify="none")
        log.info("tokenizer: %s", f"that of {given.name}" if given is not None else job.config.tokenizer.kind)
        part = folder.with_name(f"tokenizer.{os.getpid()}.part")
        tokenizers.make(job.config, given, self._sample(), part)
        with disk_errors(folder):
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(part, folder)
        return {"sha256": Tokenizer.load(folder).sha256}

    def _sample(self) -> Iterator[str]:
        """Training text for the tokenizer: the same number of bytes of every source where it has them, chosen by the hash of ids."""
        job = self.job
        share = int(job.config.tokenizer.sample) / len(job.present)
        for source in job.present:
            wanted, left = share / max(1, self.record("decide", source)["train_bytes"]), share
            for part in job.parts_of(source):
                rows, codes = np.load(part.file("docs.npy")), decide.codes_of(job, part)
                chosen = (rows["place"] / 2**64 < wanted) & (codes == 0) & (rows["split"] == SPLITS.index("train"))
                if left <= 0 or not chosen.any():
                    continue
                for document in documents(part.file("spool"), lambda number, chosen=chosen: bool(chosen[number])):
                    for text in [document["text"]] if "text" in document else [message["content"] for message in document["messages"]]:
                        # Training time grows with the longest word: a megabyte without a space would take hours.
                        for stretch in (stretch for stretch, _ in pieces(text, None, SHORT)) if len(text) > PIECE else [text]:
                            # Chance may choose one document that is larger than the whole share.
                            if left > 0:
                                left -= len(stretch)
                                yield stretch
