"""Second half of the stage: spooled documents become shards, one source at a time."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.corpus.collect import Plan, Spool
from megatron_r1.data.chat import render, require_chat
from megatron_r1.data.shards import SPLITS, ShardWriter, SourceRecord, SplitRecord
from megatron_r1.data.tokenizer import IdsDiffer, Tokenizer
from megatron_r1.utils.errors import ConfigError
from megatron_r1.utils.io import atomic_write_json, disk_errors, read_json
from megatron_r1.utils.logging import Bar, get_logger
from megatron_r1.utils.machine import usable_cores

log = get_logger("corpus.write")
BATCH_BYTES = 4 << 20
BATCH_DOCUMENTS = 2048


def use_threads(workers: int | None) -> int:
    """Threads of the tokenizer library, set before its first use in the process (later calls change nothing)."""
    count = workers or usable_cores()
    os.environ.setdefault("RAYON_NUM_THREADS", str(count))
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if count > 1 else "false"
    return count


def frame(tokenizer: Tokenizer, append_eos: bool, prepend_bos: bool) -> tuple[list[int], list[int]]:
    """Ids put before and after every text document. Raises ConfigError when the tokenizer has no such token."""
    for wanted, token, key, what in ((prepend_bos, tokenizer.bos_id, "prepend_bos", "begins"), (append_eos, tokenizer.eos_id, "append_eos", "ends")):
        if wanted and token is None:
            raise ConfigError(
                expected=f"a token that {what} a text, because {key} is true", found=f"the tokenizer has none among the usual names ({tokenizer.vocab_size} ids)",
                fix=f"name it in tokenizer.{key[-3:]}_token, or set {key}: false",
            )
    return [tokenizer.bos_id] * prepend_bos, [tokenizer.eos_id] * append_eos  # type: ignore[list-item]


def _batches(spool: Spool) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    size = 0
    for document in spool.documents():
        batch.append(document)
        size += document["bytes"]
        if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def write_source(
    item: Plan, spool: Spool, collected: dict[str, Any], tokenizer: Tokenizer, append_eos: bool, prepend_bos: bool, folder: Path, scratch: Path, bar: Bar,
) -> tuple[SourceRecord, float]:
    """Tokenise one source into `folder`; returns its record and the seconds it took (0 when it was done before).

    Everything is written under `scratch`, moved when whole, and only then recorded: a source without a record is written again,
    into the same bytes. Where the fast tokenizer library proves wrong, the source is written again with the plain one.
    """
    done = scratch / f"{item.name}.json"
    if done.is_file() and folder.is_dir():
        bar.advance(collected["bytes"])
        return SourceRecord.model_validate(read_json(done)), 0.0
    try:
        return _write(item, spool, collected, tokenizer, append_eos, prepend_bos, folder, scratch, bar)
    except IdsDiffer as error:
        log.error("%s is tokenised again, by %s\n%s", item.name, tokenizer.library["library"], error)
        return _write(item, spool, collected, tokenizer, append_eos, prepend_bos, folder, scratch, bar)


def _write(
    item: Plan, spool: Spool, collected: dict[str, Any], tokenizer: Tokenizer, append_eos: bool, prepend_bos: bool, folder: Path, scratch: Path, bar: Bar,
) -> tuple[SourceRecord, float]:
    done = scratch / f"{item.name}.json"
    began = time.monotonic()
    before, after = (np.asarray(ids, np.int32) for ids in frame(tokenizer, append_eos, prepend_bos))
    if item.format == "chat":
        require_chat(tokenizer)
    part = scratch / item.name
    for stale in (part, folder):
        shutil.rmtree(stale, ignore_errors=True)
    with disk_errors(part):
        part.mkdir(parents=True)
    writers: dict[str, ShardWriter] = {}
    for batch in _batches(spool):
        rendered: list[tuple[Any, Any]]
        if item.format == "chat":
            rendered = [render(document["messages"], tokenizer) for document in batch]
        else:
            encoded = tokenizer.encode_arrays([document["text"] for document in batch])
            rendered = [(np.concatenate([before, ids, after]), None) for ids in encoded]
        for document, (ids, mask) in zip(batch, rendered, strict=True):
            split = document["split"]
            if split not in writers:
                writers[split] = ShardWriter(part / split, tokenizer.vocab_size, masked=item.format == "chat", tokenizer=tokenizer.sha256)
            writers[split].add(np.asarray(ids, np.int32), document["bytes"], document["id"], document["group"], mask)
        bar.advance(sum(document["bytes"] for document in batch))
    splits = {split: writers[split].close() if split in writers else SplitRecord(documents=0, tokens=0, bytes=0) for split in SPLITS}
    record = SourceRecord(
        name=item.name, domain=item.domain, distractor=item.distractor, format=item.format, origin=collected["origin"], splits=splits,  # type: ignore[arg-type]
        dropped=collected["dropped"], quarantined=collected["quarantined"],
    )
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, folder)
    atomic_write_json(done, record.plain())
    if not splits["train"].documents:
        log.warning("%s: no training documents (%s)", item.name, ", ".join(f"{name} {entry.documents}" for name, entry in splits.items()))
    return record, time.monotonic() - began
