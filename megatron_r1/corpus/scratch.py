"""Scratch files of the corpus stage: written under another name, flushed, renamed, so that a file is whole or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_r1.utils.io import disk_errors


@contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """Write a file that appears, complete, when the block ends; a process that is killed leaves at most a *.tmp behind."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def save(path: Path, array: np.ndarray) -> None:
    """An array as .npy."""
    with whole(path) as stream:
        np.save(stream, array)


class Spool:
    """Documents on their way to be tokenised: JSON lines, compressed a little."""

    def __init__(self, stream: IO[bytes]) -> None:
        import zstandard

        self._sink = zstandard.ZstdCompressor(level=1).stream_writer(stream, closefd=False)

    def add(self, line: dict[str, Any]) -> None:
        """Append one."""
        self._sink.write(json.dumps(line, ensure_ascii=False).encode("utf-8") + b"\n")

    def close(self) -> None:
        """End the frame."""
        self._sink.close()


def documents(path: Path, wanted: Callable[[int], bool] = lambda number: True) -> Iterator[dict[str, Any]]:
    """The documents of a spool whose number is wanted: id, group, file, offset, and text or messages."""
    import io

    import zstandard

    with open(path, "rb") as stream, zstandard.ZstdDecompressor().stream_reader(stream) as reader:
        for number, line in enumerate(io.BufferedReader(reader, 1 << 20)):
            if wanted(number):
                yield json.loads(line)
