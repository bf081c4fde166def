"""Bytes of input files, decompressed as they come, and the lines in them. Nothing is loaded whole but a line itself."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from megatron_r1.corpus.files import BLOCK, Stored

ZSTD_FEED = 8 << 10
"""Compressed bytes fed to zstd at a time: it takes no limit for what comes out, and 4 bytes in may be 128 KiB out."""


class DamagedInput(Exception):
    """Compressed data that ends too early or makes no sense; never leaves the readers."""


class _Zstd:
    """One zstd frame."""

    def __init__(self) -> None:
        import zstandard

        # Dumps made with --long=31 exist; memory is what the frame's header asks for.
        self.inner = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()

    def __call__(self, data: bytes) -> tuple[bytes, bytes | None]:
        return self.inner.decompress(data), b""


class _Gzip:
    """One gzip member."""

    def __init__(self) -> None:
        self.inner = zlib.decompressobj(wbits=31)

    def __call__(self, data: bytes) -> tuple[bytes, bytes | None]:
        out = self.inner.decompress(data, BLOCK)
        return out, self.inner.unconsumed_tail or (None if len(out) == BLOCK else b"")


class _Stream:
    """One stream of bz2 or xz."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, data: bytes) -> tuple[bytes, bytes | None]:
        out = self.inner.decompress(data, BLOCK)
        return out, b"" if self.inner.eof or self.inner.needs_input else None


# Each takes compressed bytes and returns (content, bytes it has not taken; None when it has more content before it wants any).
FORMATS: dict[str, tuple[Callable[[], Any], int]] = {
    ".gz": (_Gzip, 64 << 10), ".bz2": (lambda: _Stream(bz2.BZ2Decompressor()), 64 << 10), ".xz": (lambda: _Stream(lzma.LZMADecompressor(lzma.FORMAT_XZ)), 64 << 10),
    ".zst": (_Zstd, ZSTD_FEED), ".zstd": (_Zstd, ZSTD_FEED),
}


def blocks(stream: Stored, suffix: str, skip: int = 0) -> Iterator[bytes]:
    """The content of a file from byte `skip` of it, in blocks of about a MiB. Raises DamagedInput after all that could be read, unless
    `skip` is beyond that."""
    if not suffix:
        stream.seek(skip)
        while block := stream.read(BLOCK):
            yield block
        return
    try:
        for block in _decompressed(stream, suffix):
            if skip >= len(block):
                skip -= len(block)
                continue
            yield block[skip:] if skip else block
            skip = 0
    except DamagedInput:
        if not skip:  # else whoever asks has seen the damage already: positions behind it are given to nothing else
            raise


def _decompressed(stream: Stored, suffix: str) -> Iterator[bytes]:
    """Members (gzip), streams (bz2, xz) or frames (zstd) one after the other; zeros between them are padding."""
    make, feed = FORMATS[suffix]
    data: bytes | None = b""
    begun = False
    while True:
        while not (data := (data or b"").lstrip(b"\0")):
            if not (data := stream.read(feed)):
                if not begun:
                    raise DamagedInput(f"no {suffix[1:]} data: the file is empty, as a download that failed leaves it")
                return
        begun, member = True, make()
        while not member.inner.eof:
            if data == b"" and not (data := stream.read(feed)):
                raise DamagedInput(f"the {suffix[1:]} data ends in the middle: the file was cut off")
            try:
                block, data = member(data or b"")
            except Exception as error:  # zlib.error, OSError, LZMAError, ZstdError: whatever a decompressor calls damage
                raise DamagedInput(f"damaged {suffix[1:]} data: {error}") from error
            if block:
                yield block
        data = member.inner.unused_data


def lines(content: Iterator[bytes], offset: int) -> Iterator[tuple[int, bytes, int]]:
    """(byte it begins at, line without its newline, byte after the newline) of every line of blocks that begin at byte `offset`.

    What stands behind the last newline is a line too. Linear in its length, however long. When the content turns out damaged the
    unfinished line is left out: DamagedInput is raised with `args` (reason, byte it begins at, its first bytes, byte after it).
    """
    unfinished: list[bytes] = []
    length = 0
    try:
        for block in content:
            pieces = block.split(b"\n")
            if len(pieces) > 1:
                unfinished.append(pieces[0])
                line = b"".join(unfinished)
                after = offset + len(line) + 1
                yield offset, line, after
                offset = after
                for line in pieces[1:-1]:
                    after = offset + len(line) + 1
                    yield offset, line, after
                    offset = after
                unfinished, length = [], 0
            if pieces[-1]:
                unfinished.append(pieces[-1])
                length += len(pieces[-1])
    except DamagedInput as damage:
        raise DamagedInput(damage.args[0], offset, unfinished[0] if unfinished else b"", offset + length) from damage
    if unfinished:
        yield offset, b"".join(unfinished), offset + length
