"""Shards to shards: several into one, one into several. Streamed, checked on the way, whole or absent.

The documents are copied as they are, with ids, groups and origins; nothing is tokenised again. The same input and settings give
the same bytes.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from megatron_r1.artifacts.base import MANIFEST, Artifact, Workspace, open_artifact, step_fingerprint
from megatron_r1.data.documents import ROWS, DocumentsWriter
from megatron_r1.data.indexed import BlockWriter, IndexWriter, crc_path, suffixed
from megatron_r1.data.shards import (
    SOURCES_FILE,
    SUFFIXES,
    Contents,
    Shard,
    ShardSet,
    SourceRecord,
    SplitRecord,
    TokenizerReference,
    describe,
    prefix_of,
)
from megatron_r1.utils.errors import ConfigError, DataError
from megatron_r1.utils.io import atomic_write_json, disk_errors, fsync_directory, require_free_space

SPAN = 1 << 22
"""Tokens copied at once."""
COLLISIONS_FILE = "collisions.jsonl"
LISTED = 10_000
"""Colliding ids that are listed; all are counted."""
LISTED_DOCUMENTS = 100


class Copier:
    """Writes the files of a split from documents of other shards, with the sidecar and masks these have."""

    def __init__(self, prefix: Path, like: Shard) -> None:
        self.prefix, self.like = prefix, like
        with disk_errors(prefix):
            prefix.parent.mkdir(parents=True, exist_ok=True)
        self._index = IndexWriter(suffixed(prefix, ".idx"), like.dtype)
        self._bin = BlockWriter(suffixed(prefix, ".bin"))
        self._mask = BlockWriter(suffixed(prefix, ".mask")) if like.masked else None
        self._documents = DocumentsWriter(suffixed(prefix, ".docs.parquet"), like.documents.tokenizer) if like.documented else None

    def copy(self, shard: Shard, first: int, last: int, rows: Iterable[tuple[Any, ...]]) -> None:
        """Append documents first ... last - 1 of `shard`; rows: those of its docs.parquet, when there is one."""
        if first == last:
            return
        self._index.extend(shard.lengths[first:last])
        start, end = int(shard.edges(first, first + 1)[0]), int(shard.edges(last - 1, last)[1])
        for at in range(start, end, SPAN):
            self._bin.write(np.ascontiguousarray(shard.read(at, min(SPAN, end - at))).view(np.uint8).data)
            if self._mask is not None:
                self._mask.write(shard.read_mask(at, min(SPAN, end - at)).data)
        if self._documents is not None:
            for row in rows:
                self._documents.add(*row)

    def close(self) -> SplitRecord:
        """Finish the files and describe them."""
        self._bin.close()
        if self._mask is not None:
            self._mask.close()
        n_bytes = 0
        if self._documents is not None:
            self._documents.close()
            n_bytes = self._documents.bytes
        self._index.close()
        return describe(self.prefix, n_bytes)

    def abandon(self) -> None:
        """Stop: no index appears."""
        for writer in (self._bin, self._mask, self._documents, self._index):
            if writer is not None:
                writer.abandon()


def _require_alike(shards: Sequence[Shard]) -> None:
    """Raise DataError unless these may become one: tokenizer (where known), type of token, masks and sidecars."""
    first = shards[0]
    for shard in shards[1:]:
        for what, one, other in (
            ("type of token", first.dtype, shard.dtype), ("loss masks", first.masked, shard.masked), ("docs.parquet", first.documented, shard.documented),
            ("tokenizer (SHA-256)", *(item.documents.tokenizer if item.documented else "" for item in (first, shard))),
        ):
            if one != other:
                raise DataError(expected=f"{shard.prefix} with the {what} of {first.prefix}: {one or 'none'}", found=str(other or "none"), fix="put together only what was tokenised alike")


@contextmanager
def placed(prefixes: Sequence[Path], force: bool) -> Iterator[Path]:
    """A folder to write datasets named like `prefixes` into; they take their places when the block ends without an error, or none does."""
    taken = [str(suffixed(prefix, ".idx")) for prefix in prefixes if suffixed(prefix, ".idx").exists() or suffixed(prefix, ".bin").exists()]
    if taken and not force:
        raise ConfigError(expected="an output that does not exist yet", found=taken[0], fix="choose another name, or allow it to be replaced (--force)")
    home = prefixes[0].parent
    begin = f".{prefixes[0].name}.{socket.gethostname()}."
    folder = home / f"{begin}{os.getpid()}.tmp"
    for left in home.glob(f"{glob.escape(begin)}*.tmp"):
        # Of a process that was killed: it may be as large as the output. (Numbers of processes come again, in containers mostly.)
        if (pid := left.name[len(begin) : -len(".tmp")]).isdecimal() and (left == folder or not psutil.pid_exists(int(pid))):
            shutil.rmtree(left, ignore_errors=True)
    try:
        with disk_errors(folder):
            folder.mkdir(parents=True)
        yield folder
        with disk_errors(home):
            for prefix in prefixes:
                for path in (*(suffixed(prefix, suffix) for suffix in SUFFIXES), *(crc_path(suffixed(prefix, suffix)) for suffix in SUFFIXES)):
                    path.unlink(missing_ok=True)
            # The indexes last: without one there is no dataset.
            for path in sorted(folder.iterdir(), key=lambda item: item.suffix == ".idx"):
                os.replace(path, home / path.name)
            fsync_directory(home)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def merge_datasets(inputs: Sequence[Path], output: Path, force: bool = False) -> tuple[SplitRecord, list[dict[str, Any]], int]:
    """Several `.bin`/`.idx` into `<output>.bin`, `.idx`, in the order given; returns the record, colliding ids (at most LISTED) and their number.

    Raises DataError for damaged input and for different tokenizers, ConfigError when the output exists, EnvironmentProblem when it can not be written.
    """
    shards, output = [Shard.at(path) for path in inputs], prefix_of(output)
    _require_alike(shards)
    with placed([output], force) as folder:
        require_free_space(folder, _size(shards))
        record = _join(shards, folder / output.name)
    found, count = collisions([(str(shard.prefix), "", shard) for shard in shards]) if shards[0].documented else ([], 0)
    return record, found, count


def _join(shards: Sequence[Shard], prefix: Path) -> SplitRecord:
    copier = Copier(prefix, shards[0])
    try:
        for shard in shards:
            copier.copy(shard, 0, len(shard), shard.documents.rows(0, len(shard)) if shard.documented else ())
        return copier.close()
    except BaseException:
        copier.abandon()
        raise


def _size(shards: Iterable[Shard]) -> int:
    return sum(size for shard in shards for size, _ in shard.record.files.values())


def collisions(shards: Sequence[tuple[str, str, Shard]]) -> tuple[list[dict[str, Any]], int]:
    """Ids that several documents of (place, split, shard) have, and how many such ids there are.

    [{"id", "documents": [[place, split, number], ...]}], at most LISTED, each with at most LISTED_DOCUMENTS. Memory: 8 bytes a
    document (a hash of its id) while they are sorted, and what is listed.
    """
    hashes = [np.fromiter((_hash(identity) for identity in shard.ids), np.uint64, len(shard)) for _, _, shard in shards]
    values, counts = np.unique(np.concatenate([np.zeros(0, np.uint64), *hashes]), return_counts=True)
    repeated = values[counts > 1]
    places: dict[str, list[list[Any]]] = {}
    for (place, split, shard), own in zip(shards, hashes, strict=True):
        for number in np.flatnonzero(np.isin(own, repeated[:LISTED])):
            where = places.setdefault(shard.ids[int(number)], [])
            if len(where) < LISTED_DOCUMENTS:
                where.append([place, split, int(number)])
    return [{"id": identity, "documents": where} for identity, where in sorted(places.items()) if len(where) > 1], len(repeated)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


def merge_artifacts(inputs: Sequence[Path], output: Path, force: bool = False) -> Artifact:
    """Several shards artifacts into one at `output`. Sources of the same name become one, their documents in the order of the inputs.

    Ids are kept; those that several documents of a source have, over all its splits, are in collisions.jsonl. Raises DataError for
    damaged input, different tokenizers, and sources of one name that differ in kind; ConfigError when the output exists.
    """
    artifacts = [open_artifact(path, "shards") for path in inputs]
    sets = [ShardSet.open(artifact) for artifact in artifacts]
    for other in sets[1:]:
        sets[0].require_tokenizer(other.tokenizer.sha256, str(other.path))
    grouped: dict[str, list[ShardSet]] = {}
    for item in sets:
        for name in item.sources:
            grouped.setdefault(name, []).append(item)
    for name, owners in grouped.items():
        kinds = {(owner.sources[name].domain, owner.sources[name].format, owner.sources[name].distractor) for owner in owners}
        if len(kinds) > 1:
            raise DataError(
                expected=f"sources named {name} of one domain and format", found="; ".join(f"{domain} {format}" for domain, format, _ in sorted(kinds)), fix="give one of them another name in its recipe"
            )
    with _artifact_at(output, {"inputs": len(artifacts)}, artifacts, force) as (work, done):
        require_free_space(work.path, sum(file.bytes for artifact in artifacts for file in artifact.manifest.files.values()))
        with disk_errors(work.path):
            shutil.copytree(sets[0].path / "tokenizer", work.path / "tokenizer")
        records, count, listed = {}, 0, []
        for name, owners in grouped.items():
            records[name], found, number = _merge_source(name, owners, work.path)
            count, listed = count + number, [*listed, *({"source": name, **entry} for entry in found)]
        with disk_errors(work.path), open(work.path / COLLISIONS_FILE, "w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in listed)
        tokenizer = sets[0].tokenizer
        atomic_write_json(work.path / SOURCES_FILE, Contents(
            tokenizer=sets[0].contents.tokenizer or TokenizerReference(sha256=tokenizer.sha256, vocab_size=tokenizer.vocab_size), sources=records,
            missing=_distinct(entry for item in sets for entry in item.missing if entry.get("name") not in records),
            control_groups=sorted({group for item in sets for group in item.control_groups}),
            decontaminated=_distinct(entry for item in sets for entry in item.contents.decontaminated),
        ).plain())
        done({
            "sources": {name: {split: {"documents": entry.documents, "tokens": entry.tokens, "bytes": entry.bytes} for split, entry in record.splits.items()} for name, record in records.items()},
            "colliding_ids": count,
        })
    return open_artifact(output, "shards")


def _distinct(entries: Iterable[Any]) -> list[Any]:
    return [json.loads(text) for text in dict.fromkeys(json.dumps(entry, sort_keys=True) for entry in entries)]


def _merge_source(name: str, owners: Sequence[ShardSet], folder: Path) -> tuple[SourceRecord, list[dict[str, Any]], int]:
    splits: dict[str, SplitRecord] = {}
    places: list[tuple[str, str, Shard]] = []
    for split in dict.fromkeys(split for owner in owners for split in owner.sources[name].splits):
        filled = [(str(owner.path), split, shard) for owner in owners if len(shard := owner.split(name, split))]
        places += filled
        if filled:
            _require_alike([shard for _, _, shard in filled])
            splits[split] = _join([shard for _, _, shard in filled], folder / "sources" / name / split)
        else:
            splits[split] = SplitRecord(documents=0, tokens=0, bytes=0)
    bad = [owner.path / "quarantine" / f"{name}.jsonl" for owner in owners]
    for path in [path for path in bad if path.is_file()]:
        with disk_errors(folder):
            (folder / "quarantine").mkdir(exist_ok=True)
            with open(path, "rb") as source, open(folder / "quarantine" / path.name, "ab") as sink:
                shutil.copyfileobj(source, sink)
    own = [owner.sources[name] for owner in owners]
    dropped = {reason: sum(record.dropped.get(reason, 0) for record in own) for reason in dict.fromkeys(reason for record in own for reason in record.dropped)}
    origin = own[0].origin if len(own) == 1 else {"merged": [record.origin for record in own]}
    record = own[0].model_copy(update={"splits": splits, "dropped": dropped, "quarantined": sum(record.quarantined for record in own), "origin": origin})
    return record, *collisions(places)


@contextmanager
def _artifact_at(output: Path, config: dict[str, Any], parents: Sequence[Artifact], force: bool) -> Iterator[Any]:
    """A workspace whose artifact takes its place at the end, or leaves nothing."""
    if output.exists() and not force:
        raise ConfigError(expected="an output that does not exist yet", found=str(output), fix="choose another name, or allow it to be replaced (--force)")
    if output.exists() and not (output / MANIFEST).is_file():
        raise ConfigError(expected=f"an artifact to replace at {output}", found="something else", fix="choose another name")
    roles: dict[str, Any] = {"shards": list(parents)}
    with disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    work = Workspace(output, output.name, "shards", step_fingerprint("shards", config, roles), config, roles, "merge")
    shutil.rmtree(work.path)  # an earlier attempt: nothing of it is taken up
    with disk_errors(work.path):
        work.path.mkdir()

    def done(summary: dict[str, Any]) -> None:
        old = output.with_name(f".{output.name}.{os.getpid()}.old")
        if output.exists():
            os.rename(output, old)
        try:
            work.complete(summary)
        except BaseException:
            if old.exists() and not output.exists():
                os.rename(old, output)
            raise
        shutil.rmtree(old, ignore_errors=True)

    try:
        yield work, done
    except BaseException:
        shutil.rmtree(work.path, ignore_errors=True)
        raise


def split_parts(shard: Shard, parts: int) -> np.ndarray:
    """Cut into `parts` runs of neighbours of about equal tokens: the part of every document, int32[documents]."""
    if not 1 <= parts <= max(1, len(shard)):
        raise ConfigError(expected=f"1 to {len(shard)} parts of {shard.label}", found=str(parts), fix="correct --parts")
    owner, edge = np.zeros(len(shard), np.int32), 0
    for part in range(1, parts):
        goal = part * shard.n_tokens // parts
        near = shard.find(goal) if goal < shard.n_tokens else len(shard)
        # Every part keeps at least one document, however uneven they are.
        edge = min(max(near, edge + 1), len(shard) - (parts - part))
        owner[edge:] = part
    return owner


def split_documents(shard: Shard, each: int) -> np.ndarray:
    """Cut into runs of `each` neighbouring documents (the last may be shorter): the part of every document, int32[documents]."""
    if each < 1:
        raise ConfigError(expected="at least 1 document a part", found=str(each), fix="correct --documents")
    return (np.arange(len(shard)) // each).astype(np.int32)


def split_fractions(shard: Shard, fractions: Sequence[float], seed: int = 0) -> np.ndarray:
    """Draw a part for every document by a hash of seed and group (id without one; number without a sidecar): int32[documents].

    A document's part depends on nothing else: not on its neighbours, its place or the number of documents. The shares must add up to 1.
    """
    if not fractions or not min(fractions) > 0 or not abs(sum(fractions) - 1) < 1e-6:
        raise ConfigError(expected="positive fractions that add up to 1", found=" ".join(map(str, fractions)), fix="correct --fractions")
    keys: Iterable[str] = (group or identity for group, identity in zip(shard.groups, shard.ids, strict=True)) if shard.documented else map(str, range(len(shard)))
    draws = np.fromiter((_hash(f"{seed}/{key}") / 2**64 for key in keys), np.float64, len(shard))
    return np.searchsorted(np.cumsum(fractions)[:-1], draws, side="right").astype(np.int32)


def split_dataset(shard: Shard, owner: np.ndarray, parts: int, output: Path, force: bool = False) -> list[SplitRecord]:
    """Write document i into `<output>-<owner[i]>-of-<parts>.bin`, `.idx`, with sidecar and mask, the order kept.

    One pass over the shard; files of a part are open from its first document to its last. Raises what `merge_datasets` raises.
    """
    if len(shard) == 0:
        raise DataError(expected=f"documents in {shard.label}", found="none", fix="name a split that has some")
    names = [suffixed(output, f"-{number:05d}-of-{parts:05d}") for number in range(parts)]
    final = np.full(parts, -1, np.int64)
    final[owner] = np.arange(len(shard))
    records: dict[int, SplitRecord] = {}
    with placed(names, force) as folder:
        require_free_space(folder, _size([shard]))
        copiers: dict[int, Copier] = {}
        try:
            for number in np.flatnonzero(final < 0).tolist():
                records[number] = Copier(folder / names[number].name, shard).close()
            for first, last, rows in _groups(shard):
                changes = np.flatnonzero(np.diff(owner[first:last], prepend=-1)).tolist()
                for begin, end in itertools.pairwise([*changes, last - first]):
                    number = int(owner[first + begin])
                    if number not in copiers:
                        copiers[number] = Copier(folder / names[number].name, shard)
                    copiers[number].copy(shard, first + begin, first + end, rows[begin:end])
                    if first + end > final[number]:
                        records[number] = copiers.pop(number).close()
        except BaseException:
            for copier in copiers.values():
                copier.abandon()
            raise
    return [records[number] for number in range(parts)]


def _groups(shard: Shard) -> Iterator[tuple[int, int, list[tuple[Any, ...]]]]:
    """Neighbouring documents first ... last - 1 with their rows, as many as are read together."""
    starts = shard.documents.starts.tolist() if shard.documented else [*range(0, len(shard), ROWS), len(shard)]
    for first, last in itertools.pairwise(starts):
        yield first, last, list(shard.documents.rows(first, last)) if shard.documented else []
