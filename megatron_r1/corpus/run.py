"""Corpus stage: raw text -> shards.

    read      each source: read, filter, remove evaluation items, decide splits -> a spool file (per source, resumable)
    tokenizer train or import, once
    write     each source: tokenise -> .bin/.idx with checksums (per source, resumable)
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_r1.artifacts.base import Artifact, Workspace
from megatron_r1.corpus import decontaminate, tokenizers
from megatron_r1.corpus.collect import Plan, Rules, Spool, collect, plan
from megatron_r1.corpus.config import CorpusConfig
from megatron_r1.corpus.control import Control
from megatron_r1.corpus.embedded import Context
from megatron_r1.corpus.splits import Splitter
from megatron_r1.corpus.write import use_threads, write_source
from megatron_r1.data.long_text import PIECE, pieces
from megatron_r1.data.shards import SCHEMA_VERSION, SOURCES_FILE, SPLITS, SourceRecord
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.utils.errors import DataError, EnvironmentProblem
from megatron_r1.utils.io import atomic_write_json, disk_errors, require_free_space
from megatron_r1.utils.logging import get_logger, progress

log = get_logger("corpus")
SHORT = 4096
"""Characters of the pieces that long texts are cut into for training a tokenizer."""
Inputs = Mapping[str, Artifact | list[Artifact] | None]


def run(config: CorpusConfig, inputs: Inputs, work: Workspace) -> Artifact:
    """Make a ShardSet. Raises DataError for input that is too bad, EnvironmentProblem for what can not be had, ConfigError for wrong names."""
    began = time.monotonic()
    threads = use_threads(config.workers)
    plans = {name: plan(name, source) for name, source in config.sources.items()}
    missing: list[dict[str, str]] = []
    rules, decontaminated = _rules(config, plans, missing)
    derived = {base for item in plans.values() if item.corpus for base in item.corpus.derived_from}
    context = Context(config.seed or 0, rules.splitter, frozenset(derived))
    spools = {name: Spool(work.tmp / "spool", name) for name in plans}
    collected = _collect(config, plans, rules, context, spools, work.path / "quarantine", missing)
    context.cache.clear()
    read_seconds = time.monotonic() - began

    given = inputs.get("tokenizer")
    tokenizer = _tokenizer(config, given if isinstance(given, Artifact) else None, {name: (spools[name], record) for name, record in collected.items()}, work)
    tokenizer.choose_library(config.tokenizer.library)
    tokenizer_seconds = time.monotonic() - began - read_seconds

    size = sum(record["bytes"] for record in collected.values())
    require_free_space(work.path, size)
    records: dict[str, SourceRecord] = {}
    seconds = 0.0
    with progress("tokenise", size, "bytes") as bar:
        for name, record in collected.items():
            bar.note(source=name)
            records[name], took = write_source(
                plans[name], spools[name], record, tokenizer, config.append_eos, config.prepend_bos, work.path / "sources" / name, work.tmp / "shards", bar
            )
            seconds += took
    atomic_write_json(work.path / SOURCES_FILE, {
        "schema_version": SCHEMA_VERSION,
        "tokenizer": {"sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size, "inexact_cuts": tokenizer.inexact_cuts, **tokenizer.library},
        "sources": {name: record.plain() for name, record in records.items()},
        "missing": missing,
        "control_groups": sorted(rules.splitter.control),
        "decontaminated": decontaminated,
    })
    summary = _summary(records, missing, tokenizer)
    summary["seconds"] = {"read": round(read_seconds, 2), "tokenizer": round(tokenizer_seconds, 2), "tokenise": round(seconds, 2)}
    summary["tokenise_mb_per_second"] = round(size / 1e6 / seconds, 2) if seconds > 0.01 else None
    summary["threads"] = threads
    _say(summary)
    return work.complete(summary)


def _rules(config: CorpusConfig, plans: Mapping[str, Plan], missing: list[dict[str, str]]) -> tuple[Rules, list[dict[str, Any]]]:
    """What applies to every source, and what was loaded for it; what can not be had is recorded, never silently left out."""
    control = None
    if config.splits.control_countries and any(item.corpus and item.domain in ("knowledge", "web") for item in plans.values()):
        try:
            control = Control(config.splits.control_countries)
        except EnvironmentProblem as problem:
            _miss(missing, "control countries", problem)
    wanted = config.decontaminate
    overlap, loaded = decontaminate.Overlap(wanted.ngram if wanted else 13), []
    for name in wanted.against if wanted else ():
        try:
            loaded.append(decontaminate.load(name, overlap))
        except EnvironmentProblem as problem:
            _miss(missing, name, problem)
    splitter = Splitter(config.splits, control.groups if control else ())
    return Rules(splitter, overlap, control, config.max_bad_ratio), loaded


def _miss(missing: list[dict[str, str]], name: str, problem: EnvironmentProblem) -> None:
    log.warning("MISSING %s, going on without it\n%s", name, problem)
    missing.append({"name": name, "reason": problem.found, "fix": problem.fix})


def _collect(
    config: CorpusConfig, plans: Mapping[str, Plan], rules: Rules, context: Context, spools: Mapping[str, Spool], quarantine: Path, missing: list[dict[str, str]],
) -> dict[str, dict[str, Any]]:
    """Read every source that can be had."""
    collected = {}
    for name, item in plans.items():
        try:
            collected[name] = collect(item, rules, context, spools[name], quarantine / f"{name}.jsonl")
        except EnvironmentProblem as problem:
            # A full disk is no missing corpus, and a corpus asked for by name is no option.
            if item.corpus is None or item.source.required or isinstance(problem.__cause__, OSError):
                raise
            _miss(missing, name, problem)
    if not collected:
        raise DataError(
            expected="at least one source that can be had", found=f"none of {', '.join(plans)} ({missing[-1]['reason']})", fix="check the network or fill the cache, or add files of your own"
        )
    return collected


def _sample(config: CorpusConfig, spools: Mapping[str, tuple[Spool, dict[str, Any]]]) -> Iterator[str]:
    """Training text for the tokenizer: the same number of bytes of every source where it has them, chosen by the hash of ids."""
    share = int(config.tokenizer.sample) / len(spools)
    for name, (spool, record) in spools.items():
        part, left = share / max(1, record["train_bytes"]), share
        for document in spool.documents():
            if document["split"] != "train":
                continue
            place = int.from_bytes(hashlib.sha256(f"{name}/{document['id']}".encode()).digest()[:8], "big") / 2**64
            if place < part:
                texts = [document["text"]] if "text" in document else [message["content"] for message in document["messages"]]
                for text in texts:
                    # Training time grows with the longest word: a megabyte without a space would take hours.
                    for piece in (piece for piece, _ in pieces(text, None, SHORT)) if len(text) > PIECE else [text]:
                        # Chance may choose one document that is larger than the whole share.
                        if left > 0:
                            left -= len(piece)
                            yield piece


def _tokenizer(config: CorpusConfig, given: Artifact | None, spools: Mapping[str, tuple[Spool, dict[str, Any]]], work: Workspace) -> Tokenizer:
    """The tokenizer folder of the artifact, made once."""
    folder = work.path / "tokenizer"
    if folder.is_dir():
        return Tokenizer.load(folder)
    log.info("tokenizer: %s", f"that of {given.name}" if given is not None else config.tokenizer.kind)
    part = work.tmp / "tokenizer"
    tokenizers.make(config, given, _sample(config, spools), part)
    with disk_errors(folder):
        os.replace(part, folder)
    return Tokenizer.load(folder)


def _summary(records: Mapping[str, SourceRecord], missing: list[dict[str, str]], tokenizer: Tokenizer) -> dict[str, Any]:
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
        "vocab_size": tokenizer.vocab_size,
    }


def _say(summary: dict[str, Any]) -> None:
    for name, splits in summary["sources"].items():
        train, held = splits["train"], sum(entry["tokens"] for split, entry in splits.items() if split != "train")
        log.info("%-16s %6d documents %9d tokens to train on, %8d held out", name, train["documents"], train["tokens"], held)
    train = summary["splits"]["train"]
    log.info("%-16s %6d documents %9d tokens to train on, %.3g bytes per token", "all", train["documents"], train["tokens"], train["bytes"] / max(1, train["tokens"]))


