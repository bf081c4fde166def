"""One process at a time in a folder."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TextIO

from megatron_r1.utils.errors import EnvironmentProblem
from megatron_r1.utils.logging import get_logger

log = get_logger("lock")


@contextmanager
def only_process(folder: Path, name: str = ".lock") -> Iterator[None]:
    """Hold the lock `folder/name`, an existing folder's, inside the block. Raises EnvironmentProblem when another process holds it.

    The system holds the lock and lets go of it when its process ends, however that ends: a lock left by a dead process is taken
    over without a race, and none is taken from a living one. The file only says whose it is: host, process and start. Between
    hosts this is true as far as the file system knows locks of other hosts (NFS does; Lustre when mounted with `flock`).
    """
    path = folder / name
    with open(path, "a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise EnvironmentProblem(
                expected=f"no other process working in {folder}", found=f"{_owner(stream) or 'a process that just started'} holds its lock",
                fix="wait for it, stop it, or use another --runs-dir",
            ) from error
        except OSError as error:
            raise EnvironmentProblem(
                expected=f"a file system that can lock {path}", found=str(error), fix="use a --runs-dir on one that can (Lustre: mounted with flock)"
            ) from error
        if left := _owner(stream):
            log.info("%s: taking over the lock that %s left when it ended", folder.name, left)
        _write(stream, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": datetime.now(timezone.utc).isoformat(timespec="seconds")}))
        try:
            yield
        finally:
            _write(stream, "")


def _write(stream: TextIO, text: str) -> None:
    stream.seek(0)
    stream.truncate()
    stream.write(text)
    stream.flush()


def _owner(stream: TextIO) -> str:
    """Whose lock it is, in words; empty when the file does not say."""
    stream.seek(0)
    text = stream.read().strip()
    try:
        record = json.loads(text)
        return f"process {int(record['pid'])} on {record['host']}, started {record['started']},"
    except (ValueError, KeyError, TypeError):
        return f"process {text}" if text.isdigit() else ""  # as older releases wrote it
