"""Files that are either whole or absent: atomic writes, checksums, append-only journals."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_r1.utils.errors import ArtifactError, EnvironmentProblem

CHUNK = 1 << 20


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn "no space left" and "read-only" into an error that says where and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise EnvironmentProblem(
                expected=f"room to write {path}",
                found=f"the disk is full ({error.strerror})",
                fix="free space or choose another --runs-dir, then run the same command again; complete artifacts are kept",
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise EnvironmentProblem(
                expected=f"permission to write {path}",
                found=f"the system refused ({error.strerror})",
                fix="choose a folder you may write to (--runs-dir), then run the same command again",
            ) from error
        raise


def fsync_directory(path: Path) -> None:
    """Make renames inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write_bytes(path: Path | str, data: bytes) -> None:
    """Write `data` under a temporary name in the same folder, fsync, rename. Raises EnvironmentProblem when the disk is full."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
            fsync_directory(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def atomic_write_text(path: Path | str, text: str) -> None:
    """`atomic_write_bytes` of UTF-8 text."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: Path | str, obj: Any) -> None:
    """`atomic_write_bytes` of indented JSON. NaN is refused: JSON has none."""
    atomic_write_text(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path | str) -> Any:
    """Read a JSON file; ArtifactError when it is missing or not JSON."""
    path = Path(path)
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ArtifactError(
            expected=f"a file {path}", found="no such file", fix="run the stage that writes it, or check the path"
        ) from None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, a number of thousands of digits, thousands of brackets
        raise ArtifactError(
            expected=f"JSON in {path}",
            found=f"damaged content ({error})",
            fix="delete the artifact folder it belongs to and run the same command again",
        ) from error


def sha256_file(path: Path | str, start: int = 0, length: int | None = None) -> str:
    """Hex SHA-256 of a file, or of the `length` bytes of it from `start` (fewer where it ends), read in 1 MiB pieces into the same memory.

    Python's lock is free while it reads and computes: several threads are as many times faster.
    """
    digest, room = hashlib.sha256(), memoryview(bytearray(CHUNK))
    with open(path, "rb", buffering=0) as stream:
        stream.seek(start)
        left = sys.maxsize if length is None else length
        while left > 0 and (count := stream.readinto(room[: min(left, CHUNK)])):
            digest.update(room[:count])
            left -= count
    return digest.hexdigest()


def sha256_files(paths: Sequence[Path]) -> list[str]:
    """`sha256_file` of each, several at a time: a core hashes more slowly than a good disk reads."""
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        return list(pool.map(sha256_file, paths))


def append_jsonl(path: Path | str, record: dict[str, Any]) -> None:
    """Append one JSON line (not fsynced: journals are rebuilt to the last checkpoint on resume)."""
    path = Path(path)
    with disk_errors(path), open(path, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_jsonl(path: Path | str) -> list[dict[str, Any]]:
    """Read a JSON-lines journal; a torn last line (a process killed while writing) is dropped."""
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_text("utf-8", errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ArtifactError(
                expected=f"one JSON object per line in {path}",
                found=f"line {number} is damaged ({error})",
                fix="delete the artifact folder it belongs to and run the same command again",
            ) from error
    return records


def write_jsonl(path: Path | str, records: Iterable[dict[str, Any]]) -> None:
    """Replace a JSON-lines file atomically."""
    atomic_write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def require_free_space(path: Path | str, nbytes: int, what: str = "") -> None:
    """Raise EnvironmentProblem unless the disk under `path` has `nbytes` bytes free; `what` says what they are made of."""
    path = Path(path)
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < nbytes:
        raise EnvironmentProblem(
            expected=f"{nbytes / 2**30:.2f} GiB free under {existing}{f' ({what})' if what else ''}",
            found=f"{free / 2**30:.2f} GiB free",
            fix="free space or choose another --runs-dir, then run the same command again; complete artifacts are kept",
        )
