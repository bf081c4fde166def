"""First task: a unit of input is read, filtered and split, and becomes parts.

A part is at most about `Sizes.part` of input. Its files appear whole, its record last, so a killed extraction goes on after
its last part. Files of part n:

    part-n.spool     kept documents, compressed JSON lines
    part-n.docs.npy  for every document: split, bytes of text, a hash of its id (for drawing and shuffling)
    part-n.keys.npy  uint64[3, documents], sorted: 128-bit key of the text, and which document has it
    part-n.ids.npy   the same of the ids, where the user's own field holds them
    part-n.near.npy, part-n.sketch.npy   bands and signatures, when near-duplicates are looked for
    part-n.bad.jsonl bad input
    part-n.json      counts, and where in the input the next part begins
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.corpus import near
from megatron_r1.corpus.files import InputFile, Stored, sha256
from megatron_r1.corpus.filters import content_key, group_of, repeated_lines, symbols
from megatron_r1.corpus.plan import Job, Plan, Unit, lacking
from megatron_r1.corpus.readers import Bad, read_partition
from megatron_r1.corpus.scratch import Spool, save, whole
from megatron_r1.data.document import Document
from megatron_r1.data.shards import SPLITS
from megatron_r1.utils.errors import EnvironmentProblem
from megatron_r1.utils.io import atomic_write_json, read_json

CONTROL_DOMAINS = ("knowledge", "web")
LISTED = 20
HASHED_WHOLE = 1 << 30
ENDS = 16 << 20
DOCS = np.dtype([("split", "<u1"), ("bytes", "<i8"), ("place", "<u8")])
"""Row of docs.npy."""


def extract(job: Job, unit: Unit) -> dict[str, Any]:
    """Make the parts of a unit that are not there yet; returns their records. Raises DataError when a file changes meanwhile,
    EnvironmentProblem when the source can not be had or the disk is full."""
    folder, item = job.folder / unit.folder, unit.plan
    parts: list[dict[str, Any]] = []
    while (path := folder / f"part-{len(parts):05d}.json").is_file():
        parts.append(read_json(path))
    # How much may still be kept depends on what was, and whether a text is new: the only state between parts.
    left, seen = item.max_bytes, _seen(folder, len(parts)) if item.max_bytes is not None and item.source.deduplicate else None
    if left is not None:
        left -= sum(record["bytes"] for record in parts)
    at = parts[-1]["next"] if parts else [0, None]
    try:
        items = _items(job, unit, at) if at else iter(())
        while at:
            record = _part(job, item, items, folder / f"part-{len(parts):05d}", left, seen)
            parts.append(record)
            at = record["next"]
            left = None if left is None else left - record["bytes"]
    except EnvironmentProblem as problem:
        # A full disk is no missing corpus, and a corpus asked for by name is no option.
        if item.corpus is None or item.source.required or isinstance(problem.__cause__, OSError):
            raise
        return {"missing": lacking(item.name, problem), "parts": [], "files": []}
    return {"missing": None, "parts": parts, "files": [_file(file) for file in unit.files if any(p.file == file.name and p.start == 0 for p in unit.partitions)]}


def _seen(folder: Path, parts: int) -> set[int]:
    return {int(low) for number in range(parts) for low in np.load(folder / f"part-{number:05d}.keys.npy")[1]}


Place = list[Any]
"""[number of the partition in its unit, where to go on in it]"""


def _items(job: Job, unit: Unit, at: Place) -> Iterator[tuple[Document | Bad, int, Place]]:
    """Everything from `at` on: (document or bad input, bytes of input, what comes after it)."""
    if unit.plan.corpus:
        first = at[1] or 0
        for number, document in enumerate(islice(job.context.ordered(unit.plan.corpus.name), first, None), first + 1):
            yield document, len(document.content()), [0, number]
        return
    first, resume = at
    for number in range(first, len(unit.partitions)):
        for made, size, after in read_partition(unit.plan.source, unit.partitions[number], unit.files, resume if number == first else None):
            yield made, size, [number, after]


def _part(job: Job, item: Plan, items: Iterator[tuple[Document | Bad, int, Place]], path: Path, left: int | None, seen: set[int] | None) -> dict[str, Any]:
    """One part, from `items` until it is full, the source has given its max_bytes, or nothing is left."""
    counts: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    matches: list[dict[str, str]] = []
    rows: list[tuple[int, int, int]] = []
    keys: list[bytes] = []
    ids: list[bytes] = []
    sketches: list[np.ndarray] = []
    bad: list[str] = []
    after: Place | None = None
    size = 0
    with whole(path.with_name(f"{path.name}.spool")) as stream:
        spool = Spool(stream)
        for made, taken, after in items:
            size += taken
            counts["read"] += 1
            if isinstance(made, Bad):
                bad.append(json.dumps(made.record(), ensure_ascii=False))
            elif (kept := _kept(job, item, made, seen, dropped, matches)) is not None:
                split, line, key, length = kept
                spool.add(line)
                place = int.from_bytes(hashlib.sha256(f"{item.name}/{made.id}".encode()).digest()[:8], "big")
                rows.append((SPLITS.index(split), length, place))
                keys.append(bytes.fromhex(key))
                if item.source.given_ids:
                    ids.append(hashlib.sha256(made.id.encode()).digest()[:16])
                if job.config.near_duplicates is not None:
                    sketches.append(near.sketch(made.content(), job.config.near_duplicates.ngram))
                counts["bytes"] += length
                size = max(size, counts["bytes"])
                if left is not None and counts["bytes"] >= left:
                    after = None
                    break
            if size >= job.sizes.part:
                break
        else:
            after = None
        spool.close()
    docs = np.array(rows, DOCS)
    save(path.with_name(f"{path.name}.docs.npy"), docs)
    save(path.with_name(f"{path.name}.keys.npy"), sorted_keys(keys))
    if item.source.given_ids:
        save(path.with_name(f"{path.name}.ids.npy"), sorted_keys(ids))
    if job.config.near_duplicates is not None:
        bands, signatures = near.bands(sketches, job.config.near_duplicates.threshold)
        save(path.with_name(f"{path.name}.near.npy"), bands)
        save(path.with_name(f"{path.name}.sketch.npy"), signatures)
    if bad:
        with whole(path.with_name(f"{path.name}.bad.jsonl")) as stream:
            stream.write("".join(line + "\n" for line in bad).encode("utf-8"))
    record = {
        "documents": len(rows), "bytes": counts["bytes"], "read": counts["read"], "bad": len(bad), "dropped": dict(sorted(dropped.items())),
        "matches": matches[:LISTED], "next": after,
    }
    atomic_write_json(path.with_name(f"{path.name}.json"), record)
    return record


def sorted_keys(keys: list[bytes]) -> np.ndarray:
    """uint64[3, n]: 16-byte keys as two numbers and their place in the list, in ascending order, the first place first."""
    pairs = np.frombuffer(b"".join(keys), ">u8").reshape(-1, 2).astype("<u8")
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    return np.stack([pairs[order, 0], pairs[order, 1], order.astype("<u8")])


def _kept(
    job: Job, item: Plan, document: Document, seen: set[int] | None, dropped: Counter[str], matches: list[dict[str, str]],
) -> tuple[str, dict[str, Any], str, int] | None:
    """(split, spool line, content key, bytes of text) of a document that passes every rule, or None."""
    rules, text = job.rules, document.text
    if text is not None and rules.control is not None and item.corpus and item.domain in CONTROL_DOMAINS and document.group not in rules.splitter.control:
        text, removed = rules.control.strip(text)
        if removed:
            dropped["control_lines"] += removed
            document = Document(document.id, document.source, text=text, group=document.group, file=document.file, offset=document.offset)
    content = document.content()
    if (reason := _unfit(item, content)) is not None:
        dropped[reason] += 1
        return None
    key = content_key(document)
    if seen is not None and (low := int(key[16:], 16)) in seen:
        dropped["duplicate"] += 1
        return None
    found = rules.overlap.name(content)
    if found is not None:
        dropped["contaminated"] += 1
        matches.append({"id": document.id, "item": found})
        return None
    if seen is not None:
        seen.add(low)
    group = group_of(document, key)
    line: dict[str, Any] = {"id": document.id, "group": group, "file": document.file, "offset": document.offset}
    if document.messages is not None:
        length = sum(len(message["content"].strip().encode("utf-8")) for message in document.messages)
        return rules.splitter(group), line | {"messages": list(document.messages)}, key, length
    return rules.splitter(group), line | {"text": text}, key, len((text or "").encode("utf-8"))


def _unfit(item: Plan, content: str) -> str | None:
    """Why a text does not pass the filters of its source, or None."""
    source = item.source
    if len(content) < item.min_chars:
        return "short"
    if source.max_chars is not None and len(content) > source.max_chars:
        return "long"
    if source.max_repeated_lines is not None and repeated_lines(content) > source.max_repeated_lines:
        return "repeated_lines"
    if source.max_symbols is not None and symbols(content) > source.max_symbols:
        return "symbols"
    return None


def _file(file: InputFile) -> dict[str, Any]:
    """Provenance of an input file: its SHA-256, or for a large one that of its two ends (all of it would be read once more)."""
    record: dict[str, Any] = {"name": file.name, "bytes": file.size}
    if file.size <= HASHED_WHOLE:
        return record | {"sha256": sha256(file)}
    with Stored(file) as stream:
        head = stream.read(ENDS)
        stream.seek(file.size - ENDS)
        return record | {"sha256_of_first_and_last_16_mib": hashlib.sha256(head + stream.read(ENDS)).hexdigest()}
