"""First half of the stage: every source becomes one file of kept documents with their splits ("spool"), and a record.

A source is one partition of the work: its record is written last, so a source with a record is done and any other is done again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.corpus import embedded
from megatron_r1.corpus.config import SourceConfig
from megatron_r1.corpus.control import Control
from megatron_r1.corpus.decontaminate import Overlap
from megatron_r1.corpus.embedded import Context
from megatron_r1.corpus.files import InputFile, find_files, sha256
from megatron_r1.corpus.filters import MIN_CHARS, Filters, content_key, group_of
from megatron_r1.corpus.readers import Bad, read
from megatron_r1.corpus.splits import Splitter
from megatron_r1.data.document import Document
from megatron_r1.utils.errors import DataError
from megatron_r1.utils.io import atomic_write_json, disk_errors, read_json
from megatron_r1.utils.logging import Bar, get_logger, progress

log = get_logger("corpus.collect")
CONTROL_DOMAINS = ("knowledge", "web")
LISTED = 20


@dataclass(frozen=True)
class Rules:
    """What applies to every source."""

    splitter: Splitter
    overlap: Overlap
    control: Control | None
    max_bad_ratio: float


@dataclass(frozen=True)
class Plan:
    """One source with every default filled in."""

    name: str
    source: SourceConfig
    domain: str
    format: str
    distractor: bool
    min_chars: int
    max_bytes: int | None
    corpus: embedded.Corpus | None


def plan(name: str, source: SourceConfig) -> Plan:
    """Fill in what the source leaves to its corpus. Raises ConfigError for an unknown embedded corpus or one of another format."""
    known = embedded.corpus(source.corpus or name) if source.kind == "embedded" else None
    form = source.format or (known.format if known else "text")
    if known and form != known.format:
        raise DataError(expected=f"format {known.format} for the embedded corpus {known.name}", found=form, fix=f"remove sources.{name}.format")
    limit = source.max_bytes if source.max_bytes is not None else known.max_bytes if known else None
    least = source.min_chars if source.min_chars is not None else known.min_chars if known and known.min_chars is not None else MIN_CHARS[form]
    noise = source.distractor if source.distractor is not None else bool(known and known.distractor)
    return Plan(name, source, source.domain or (known.domain if known else "web"), form, noise, least, None if limit is None else int(limit), known)


class Spool:
    """Where a source's kept documents wait to be tokenised: JSON lines in `folder`, and a record beside them."""

    def __init__(self, folder: Path, name: str) -> None:
        self.lines, self.record_path = folder / f"{name}.jsonl", folder / f"{name}.json"

    def record(self) -> dict[str, Any] | None:
        """What was written, or None when the source is not done."""
        return read_json(self.record_path) if self.record_path.is_file() and self.lines.is_file() else None

    def documents(self) -> Iterator[dict[str, Any]]:
        """The kept documents: id, group, split, bytes and text or messages."""
        with open(self.lines, encoding="utf-8") as stream:
            for line in stream:
                yield json.loads(line)


def collect(item: Plan, rules: Rules, context: Context, spool: Spool, quarantine: Path) -> dict[str, Any]:
    """Read, filter and split one source; returns its record. Raises DataError when too much of it is bad (the quarantine is
    written first) or nothing is left; EnvironmentProblem when it can not be had or the disk is full."""
    files = [] if item.corpus else find_files(item.name, item.source)
    state = {file.path: [file.size, file.stamp] for file in files}
    done = spool.record()
    if done is not None and done["state"] == state:
        log.info("%s: read already", item.name)
        return done
    filters = Filters(item.min_chars, item.source.deduplicate)
    counts: Counter[str] = Counter()
    matches: list[dict[str, str]] = []
    total = sum(file.size for file in files) or (item.max_bytes or 0)
    quarantine.unlink(missing_ok=True)
    with disk_errors(spool.lines):
        spool.lines.parent.mkdir(parents=True, exist_ok=True)
        with open(spool.lines, "w", encoding="utf-8") as out, progress(f"read {item.name}", total, "bytes") as bar:
            for document in _good(item, files, context, quarantine, counts, bar):
                line = _kept(document, item, rules, filters, matches)
                if line is None:
                    continue
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
                counts["documents"] += 1
                counts["bytes"] += line["bytes"]
                counts[f"train_bytes:{line['split']}"] += line["bytes"]
                if item.corpus:
                    bar.advance(line["bytes"])
                if item.max_bytes is not None and counts["bytes"] >= item.max_bytes:
                    break
    _check(item, rules, counts, filters, quarantine)
    record = {
        "state": state, "documents": counts["documents"], "bytes": counts["bytes"], "train_bytes": counts["train_bytes:train"],
        "dropped": dict(sorted(filters.dropped.items())), "quarantined": counts["bad"], "origin": _origin(item, files, matches),
    }
    atomic_write_json(spool.record_path, record)
    return record


def _good(item: Plan, files: list[InputFile], context: Context, quarantine: Path, counts: Counter[str], bar: Bar) -> Iterator[Document]:
    """Documents of a source; bad input goes to the quarantine file and is counted."""
    if item.corpus:
        counts["read"] = 0
        for document in context.ordered(item.corpus.name):
            counts["read"] += 1
            yield document
        return
    identities: set[str] = set()
    sink = None
    try:
        for made, size in read(item.name, item.source, files):
            bar.advance(size)
            counts["read"] += 1
            if isinstance(made, Document):
                if made.id not in identities:
                    identities.add(made.id)
                    yield made
                    continue
                made = Bad(made.file, made.offset, f"the id {made.id!r} was used before")
            counts["bad"] += 1
            with disk_errors(quarantine):
                if sink is None:
                    quarantine.parent.mkdir(parents=True, exist_ok=True)
                    sink = open(quarantine, "w", encoding="utf-8")  # noqa: SIM115 - closed below, opened only when needed
                sink.write(json.dumps(made.record(), ensure_ascii=False) + "\n")
    finally:
        if sink is not None:
            with disk_errors(quarantine):
                sink.close()


def _kept(document: Document, item: Plan, rules: Rules, filters: Filters, matches: list[dict[str, str]]) -> dict[str, Any] | None:
    """The spool line of a document that passes every rule, or None."""
    text = document.text
    if text is not None and rules.control is not None and item.corpus and item.domain in CONTROL_DOMAINS and document.group not in rules.splitter.control:
        text, removed = rules.control.strip(text)
        filters.dropped.update({"control_lines": removed} if removed else {})
        document = Document(document.id, document.source, text=text, group=document.group)
    key = content_key(document)
    if not filters.keep(document, key):
        return None
    found = rules.overlap.name(document.content())
    if found is not None:
        filters.dropped["contaminated"] += 1
        matches.append({"id": document.id, "item": found})
        return None
    group = group_of(document, key)
    line: dict[str, Any] = {"id": document.id, "group": group, "split": rules.splitter(group)}
    if document.messages is not None:
        return line | {"bytes": sum(len(message["content"].strip().encode("utf-8")) for message in document.messages), "messages": list(document.messages)}
    return line | {"bytes": len((text or "").encode("utf-8")), "text": text}


def _check(item: Plan, rules: Rules, counts: Counter[str], filters: Filters, quarantine: Path) -> None:
    bad, seen = counts["bad"], counts["read"]
    if bad:
        log.warning("%s: %d of %d inputs are bad, set aside in %s", item.name, bad, seen, quarantine)
    if bad > rules.max_bad_ratio * seen:
        first = json.loads(quarantine.open(encoding="utf-8").readline())
        raise DataError(
            expected=f"at most {rules.max_bad_ratio:.2%} bad input in source {item.name!r}",
            found=f"{bad} of {seen} ({bad / seen:.2%}); the first: {first['file']}, byte {first['offset']}: {first['reason']}",
            fix=f"mend the input (all of it is listed in {quarantine}) or raise max_bad_ratio, then run the same command again",
        )
    if not counts["documents"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in filters.dropped.items()) or "nothing was read"
        raise DataError(
            expected=f"documents in source {item.name!r}", found=f"none left of {seen} ({reasons})", fix="lower min_chars, correct the fields or the path, or remove the source"
        )


def _origin(item: Plan, files: list[InputFile], matches: list[dict[str, str]]) -> dict[str, Any]:
    origin = {"kind": item.source.kind, **(item.corpus.origin() if item.corpus else {})}
    if item.corpus:
        origin["corpus"] = item.corpus.name
    else:
        origin["files"] = [{"name": file.name, "bytes": file.size, "sha256": sha256(file)} for file in files]
    if matches:
        origin["contaminated"] = matches[:LISTED]
    return origin


