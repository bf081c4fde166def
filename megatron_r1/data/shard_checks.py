"""Whether shards are what was written: any flipped bit, missing, shortened or lengthened file is found, and named.

An artifact is a chain: the manifest has its own checksum and the SHA-256 of sources.json, which has the CRC-32 of every .crc
file, which has the CRC-32 of every MiB of the tokens, indexes, masks and document tables. Files outside the chain (the tokenizer,
quarantined lines) are compared with the manifest's SHA-256. So every byte is read once, most of them at the speed of CRC-32.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from megatron_r1.artifacts.base import MANIFEST, Artifact, open_artifact
from megatron_r1.data.indexed import AGAIN, suffixed
from megatron_r1.data.shards import SOURCES_FILE, Shard, ShardSet
from megatron_r1.utils.errors import ArtifactError, DataError, R1Error
from megatron_r1.utils.io import sha256_file


@dataclass
class Verdict:
    """What was read, and what is wrong with it."""

    files: int = 0
    bytes: int = 0
    damaged: list[R1Error] = field(default_factory=list)
    """One error a damaged file, which its text names."""
    unprotected: list[str] = field(default_factory=list)
    """Files without checksums: only contradictions could be found."""


def verify(path: Path | str) -> Verdict:
    """Check every byte of a shards artifact (its folder), or of the dataset `<path>.bin`, `.idx`. Raises nothing for damage: see Verdict."""
    path, verdict = Path(path), Verdict()
    try:
        if path.is_dir():
            _artifact(path, verdict)
        else:
            _prefix(path, verdict)
    except R1Error as error:
        verdict.damaged.append(error)
    return verdict


def _prefix(path: Path, verdict: Verdict) -> None:
    shard = Shard.at(path)
    _shard(shard, verdict)
    verdict.unprotected = [str(suffixed(shard.prefix, suffix)) for suffix, (_, crc) in shard.record.files.items() if crc < 0]


def _shard(shard: Shard, verdict: Verdict) -> None:
    verdict.damaged += shard.damaged()
    sizes = [size for size, _ in shard.record.files.values()]
    verdict.files, verdict.bytes = verdict.files + 2 * len(sizes), verdict.bytes + sum(sizes)


def _artifact(path: Path, verdict: Verdict) -> None:
    artifact = open_artifact(path, "shards", verify="none")
    text = (path / MANIFEST).read_bytes()
    if not artifact.manifest.checksum:
        verdict.unprotected.append(str(path / MANIFEST))
    # The checksum is of what the record says; its spelling can have changed without that.
    elif text != (json.dumps(json.loads(text), indent=2, ensure_ascii=False) + "\n").encode("utf-8"):
        verdict.damaged.append(ArtifactError(expected=f"{path / MANIFEST} as it was written", found="other white space or spelling", fix=AGAIN))
    chained: dict[str, Shard | R1Error] = {}
    _file(artifact, SOURCES_FILE, verdict)
    if not verdict.damaged:
        shards = ShardSet(path)
        for source, record in shards.sources.items():
            for split, entry in record.splits.items():
                if entry.documents:
                    shard = _open(shards, source, split)
                    chained |= {f"sources/{source}/{split}{suffix}{more}": shard for suffix in entry.files for more in ("", ".crc")}
    for relative in artifact.manifest.files:
        if relative != SOURCES_FILE and relative not in chained:
            _file(artifact, relative, verdict)
    for shard in dict.fromkeys(chained.values()):
        if isinstance(shard, R1Error):
            verdict.damaged.append(shard)
        else:
            _shard(shard, verdict)


def _open(shards: ShardSet, source: str, split: str) -> Shard | R1Error:
    try:
        return shards.split(source, split)
    except R1Error as error:
        return error


def _file(artifact: Artifact, relative: str, verdict: Verdict) -> None:
    """Compare one file with the manifest."""
    record, path = artifact.manifest.files.get(relative), artifact.path / relative
    if record is None:
        raise DataError(expected=f"{relative} in the manifest of {artifact.path}", found="no entry", fix=AGAIN)
    size = path.stat().st_size if path.is_file() else None
    found = "no such file" if size is None else f"{size} bytes" if size != record.bytes else f"SHA-256 {digest[:16]}..." if (digest := sha256_file(path)) != record.sha256 else None
    if found:
        verdict.damaged.append(ArtifactError(expected=f"{path} with {record.bytes} bytes and SHA-256 {record.sha256[:16]}...", found=found, fix=AGAIN))
    verdict.files, verdict.bytes = verdict.files + 1, verdict.bytes + record.bytes
