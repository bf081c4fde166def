"""Third task: what stays of a source. Its bad input is listed, and too much of it is an error."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.corpus.duplicates import REASONS, reasons
from megatron_r1.corpus.plan import Job, Part, Plan
from megatron_r1.corpus.readers import Bad
from megatron_r1.corpus.scratch import documents, save, whole
from megatron_r1.data.shards import SPLITS
from megatron_r1.utils.errors import DataError
from megatron_r1.utils.logging import get_logger

log = get_logger("corpus.decide")
REPEATED = REASONS.index("repeated id")


def folder(job: Job, source: str) -> Path:
    """Where the decisions about a source are."""
    return job.made / "decided" / source


def codes_of(job: Job, part: Part) -> np.ndarray:
    """uint8[documents]: 0 where a document of the part stays."""
    return np.load(folder(job, part.source) / f"{part.number:06d}.npy")


def decide(job: Job, source: str) -> dict[str, Any]:
    """Decide about one source; returns its counts. Raises DataError when too much of it is bad (the quarantine is written first)
    or nothing is left."""
    item, parts = job.plans[source], job.parts_of(source)
    counts: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    matches: list[dict[str, str]] = []
    quarantine = job.quarantine / f"{source}.jsonl"
    quarantine.unlink(missing_ok=True)
    first = ""
    with whole(folder(job, source) / "bad.jsonl") as sink:
        for part, codes in zip(parts, reasons(job, parts), strict=True):
            save(folder(job, source) / f"{part.number:06d}.npy", codes)
            rows = np.load(part.file("docs.npy"), mmap_mode="r")
            counts["documents"] += int((codes == 0).sum())
            counts["bytes"] += int(rows["bytes"][codes == 0].sum())
            counts["train_bytes"] += int(rows["bytes"][(codes == 0) & (rows["split"] == SPLITS.index("train"))].sum())
            counts["read"] += part.record["read"]
            dropped.update(part.record["dropped"])
            dropped.update({name: count for code, name in enumerate(REASONS) if code > REPEATED and (count := int((codes == code).sum()))})
            matches += part.record["matches"]
            lines = part.file("bad.jsonl").read_bytes() if part.record["bad"] else b""
            if (codes == REPEATED).any():
                lines += b"".join(_repeated(part, codes))
            counts["bad"] += lines.count(b"\n")
            first = first or lines[: lines.find(b"\n")].decode("utf-8")
            sink.write(lines)
    if counts["bad"]:
        with whole(quarantine) as out, open(folder(job, source) / "bad.jsonl", "rb") as lines_:
            while chunk := lines_.read(1 << 20):
                out.write(chunk)
    _check(job, item, counts, dropped, quarantine, first)
    files = [file for record in job.extracted[source] for file in record["files"]]
    return {
        "documents": counts["documents"], "bytes": counts["bytes"], "train_bytes": counts["train_bytes"], "dropped": dict(sorted(dropped.items())),
        "quarantined": counts["bad"], "origin": _origin(item, files, matches[:20]),
    }


def _repeated(part: Part, codes: np.ndarray) -> list[bytes]:
    found = []
    for line in documents(part.file("spool"), lambda number: codes[number] == REPEATED):
        bad = Bad(line["file"], line["offset"], f"the id {line['id']!r} was used before")
        found.append(json.dumps(bad.record(), ensure_ascii=False).encode("utf-8") + b"\n")
    return found


def _check(job: Job, item: Plan, counts: Counter[str], dropped: Counter[str], quarantine: Path, first: str) -> None:
    bad, seen = counts["bad"], counts["read"]
    if bad:
        log.warning("%s: %d of %d inputs are bad, set aside in %s", item.name, bad, seen, quarantine)
    if bad > job.config.max_bad_ratio * seen:
        said = json.loads(first)
        raise DataError(
            expected=f"at most {job.config.max_bad_ratio:.2%} bad input in source {item.name!r}",
            found=f"{bad} of {seen} ({bad / seen:.2%}); the first: {said['file']}, byte {said['offset']}: {said['reason']}",
            fix=f"mend the input (all of it is listed in {quarantine}) or raise max_bad_ratio, then run the same command again",
        )
    if not counts["documents"]:
        why = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "nothing was read"
        raise DataError(
            expected=f"documents in source {item.name!r}", found=f"none left of {seen} ({why})", fix="lower min_chars, correct the fields or the path, or remove the source"
        )


def _origin(item: Plan, files: list[dict[str, Any]], matches: list[dict[str, str]]) -> dict[str, Any]:
    origin = {"kind": item.source.kind, **(item.corpus.origin() if item.corpus else {})}
    if item.corpus:
        origin["corpus"] = item.corpus.name
    else:
        origin["files"] = files
    if matches:
        origin["contaminated"] = matches
    return origin
