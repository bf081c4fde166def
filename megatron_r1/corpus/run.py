"""Corpus stage: raw text -> shards, as tasks that any number of processes share (phases.py)."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from typing import Any

from megatron_r1.artifacts.base import Artifact, Workspace
from megatron_r1.corpus import assemble
from megatron_r1.corpus.config import CorpusConfig
from megatron_r1.corpus.phases import Desk, Task, phases
from megatron_r1.corpus.plan import Job
from megatron_r1.corpus.tokenise import use_threads
from megatron_r1.corpus.workers import Workers
from megatron_r1.data.indexed import token_dtype
from megatron_r1.data.shards import SCHEMA_VERSION, SOURCES_FILE, SPLITS, SourceRecord
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.utils.io import atomic_write_json, disk_errors, require_free_space
from megatron_r1.utils.lock import only_process
from megatron_r1.utils.logging import get_logger, progress
from megatron_r1.utils.machine import usable_cores

log = get_logger("corpus")
SMALL = 256 << 20
"""Bytes of input below which threads of one process are faster than starting others."""
MENTIONED = 64
"""Bytes, or tasks of unknown size, below which a phase passes in silence."""
SPOOLED, TOKENS = 0.6, 0.4
"""Room that is asked for: bytes of spool, and tokens, for a byte of text."""
UNPACKED = 4
"""Bytes of text in a byte of compressed input, about."""
Inputs = Mapping[str, Artifact | list[Artifact] | None]


def run(config: CorpusConfig, inputs: Inputs, work: Workspace) -> Artifact:
    """Make a ShardSet. Raises DataError for input that is too bad, EnvironmentProblem for what can not be had, ConfigError for wrong names."""
    if (sealed := work.sealed()) is not None:
        return sealed
    given = inputs.get("tokenizer")
    job = Job(config, work.tmp, given.path if isinstance(given, Artifact) else None)
    desk = Desk(job)
    seconds: dict[str, float] = {}
    with only_process(work.tmp, "lock"):
        size = sum(unit.bytes for unit in job.units)
        count = config.workers or (usable_cores() if size >= SMALL else 1)
        threads = 1 if config.workers or count > 1 else usable_cores()
        use_threads(threads)
        with Workers(job, desk, count) as workers:
            for phase in phases(config):
                began = time.monotonic()
                desk.turn()
                if phase != "extract":
                    _forget_other_input(job)
                tasks = desk.tasks(phase)
                _require_room(desk, phase, tasks)
                total = sum(task.bytes for task in tasks)
                with progress(phase, total, "bytes" if total > len(tasks) else "tasks", enabled=total > MENTIONED) as bar:
                    workers.run(tasks, bar)
                seconds[phase] = time.monotonic() - began
        summary = _publish(desk, work)
    text = sum(entry["bytes"] for entry in summary["splits"].values())
    summary["seconds"] = {phase: round(value, 2) for phase, value in seconds.items()}
    summary["tokenise_mb_per_second"] = round(text / 1e6 / seconds["tokenise"], 2) if seconds["tokenise"] > 0.01 else None
    summary["workers"], summary["threads"] = count, threads
    _say(summary)
    return work.complete(summary)


def _forget_other_input(job: Job) -> None:
    """Remove what earlier attempts made of files that have changed since."""
    mine = {job.folder / unit.folder for unit in job.units} | {job.made}
    for path in (*job.folder.glob("extract/*/*"), *job.folder.glob("made-*")):
        if path not in mine:
            shutil.rmtree(path, ignore_errors=True)


def _require_room(desk: Desk, phase: str, tasks: list[Task]) -> None:
    """Raise EnvironmentProblem unless the disk has room for what this phase, and at the beginning all of them, will write."""
    pending = [task for task in tasks if not desk.done(task)]
    size = sum(task.bytes for task in pending)
    if phase == "extract":
        packed = {str(unit.folder): UNPACKED if any(file.suffix for file in unit.files) else 1 for unit in desk.job.units}
        size = sum(task.bytes * packed[task.name] for task in pending)
        need = size * (SPOOLED + 2 * 2 * TOKENS)
    elif phase == "tokenise":
        need = 2 * size * TOKENS * token_dtype(Tokenizer.load(desk.job.made / "tokenizer").vocab_size).itemsize
    elif phase == "assemble":
        need = size * 1.1
    else:
        return
    if need >= SMALL:
        log.info("%s: about %.1f GB will be written for %.1f GB", phase, need / 1e9, size / 1e9)
    require_free_space(desk.job.folder, int(need))


def _publish(desk: Desk, work: Workspace) -> dict[str, Any]:
    """Move what was made into the artifact and describe it; returns the counts for the manifest."""
    job = desk.job
    records = {source: _source(desk, source) for source in job.present}
    tokenizer = desk.record("tokenizer", "tokenizer")
    with disk_errors(work.path):
        shutil.rmtree(work.path / "tokenizer", ignore_errors=True)
        shutil.copytree(job.made / "tokenizer", work.path / "tokenizer")
        # Not there: an attempt that was killed between here and the end has moved it.
        if (job.made / "sources").is_dir():
            shutil.rmtree(work.path / "sources", ignore_errors=True)
            os.replace(job.made / "sources", work.path / "sources")
    vocabulary = Tokenizer.load(work.path / "tokenizer").vocab_size
    pieces = list(desk.layout.records.values())
    libraries = {record["library"]["library"]: record["library"] for record in pieces}
    atomic_write_json(work.path / SOURCES_FILE, {
        "schema_version": SCHEMA_VERSION,
        "tokenizer": {
            "sha256": tokenizer["sha256"], "vocab_size": vocabulary, "inexact_cuts": sum(record["inexact_cuts"] for record in pieces),
            **libraries.pop(min(libraries)), **({"also": list(libraries.values())} if libraries else {}),
        },
        "sources": {name: record.plain() for name, record in records.items()},
        "missing": job.missing,
        "control_groups": sorted(job.rules.splitter.control),
        "decontaminated": job.rules.loaded,
    })
    return _summary(records, job.missing, vocabulary)


def _source(desk: Desk, source: str) -> SourceRecord:
    item, decided = desk.job.plans[source], desk.record("decide", source)
    shards = set(desk.layout.shards())
    splits = {split: desk.record("finish", f"{source}/{split}") if (source, split) in shards else assemble.empty().plain() for split in SPLITS}
    if not splits["train"]["documents"]:
        log.warning("%s: no training documents (%s)", source, ", ".join(f"{name} {entry['documents']}" for name, entry in splits.items()))
    return SourceRecord.model_validate({
        "name": source, "domain": item.domain, "distractor": item.distractor, "format": item.format, "origin": decided["origin"], "splits": splits,
        "dropped": decided["dropped"], "quarantined": decided["quarantined"],
    })


def _summary(records: Mapping[str, SourceRecord], missing: list[dict[str, str]], vocabulary: int) -> dict[str, Any]:
    """Counts for the manifest."""
    def totals(split: str) -> dict[str, int]:
        entries = [record.splits[split] for record in records.values()]
        return {key: sum(getattr(entry, key) for entry in entries) for key in ("documents", "tokens", "bytes")}

    return {
        "sources": {
            name: {split: {"documents": entry.documents, "tokens": entry.tokens, "bytes": entry.bytes} for split, entry in record.splits.items()}
            for name, record in records.items()
        },
        "splits": {split: totals(split) for split in SPLITS},
        "dropped": {name: record.dropped for name, record in records.items() if record.dropped},
        "quarantined": {name: record.quarantined for name, record in records.items() if record.quarantined},
        "missing": missing,
        "vocab_size": vocabulary,
    }


def _say(summary: dict[str, Any]) -> None:
    for name, splits in summary["sources"].items():
        train, held = splits["train"], sum(entry["tokens"] for split, entry in splits.items() if split != "train")
        log.info("%-16s %6d documents %9d tokens to train on, %8d held out", name, train["documents"], train["tokens"], held)
    train = summary["splits"]["train"]
    log.info("%-16s %6d documents %9d tokens to train on, %.3g bytes per token", "all", train["documents"], train["tokens"], train["bytes"] / max(1, train["tokens"]))
