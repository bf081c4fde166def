"""Megatron's indexed dataset: `<prefix>.bin` (tokens end to end) and `<prefix>.idx`, byte for byte as megatron.core reads it.

The .idx, little-endian: b"MMIDIDX\\0\\0", uint64 version 1, uint8 dtype code, uint64 sequences, uint64 documents,
int32 lengths[sequences], int64 byte offsets[sequences], int64 document_indices[documents] with "documents" one more than there
are. Every sequence is one document here, so document_indices is 0 ... sequences.

Beside every data file lies `<file>.crc`: uint32 CRC-32 of each block of BLOCK bytes. Blocks are checked when first read, so
a flipped bit is found where it is used, at the cost of one pass over what is used.
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from types import TracebackType

import numpy as np

from megatron_r1.utils.errors import DataError
from megatron_r1.utils.io import disk_errors

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES: dict[int, type[np.integer]] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
"""Integer codes of megatron.core's DType; the codes 6 and 7 are floats and hold no tokens."""
CODES = {np.dtype(kind): code for code, kind in DTYPES.items()}
HEADER = struct.Struct("<9sQBQQ")
BLOCK = 1 << 20
AGAIN = "delete the folder of this artifact and run the same command again; raw files and other artifacts are untouched"


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 while every id fits (megatron.core's own rule: vocabulary below 65500), else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class BlockWriter:
    """Appends bytes to a file and writes the CRC-32 of every block beside it. Raises EnvironmentProblem when the disk is full."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._crcs: list[int] = []
        self._crc, self._filled, self.bytes = 0, 0, 0
        with disk_errors(path):
            self._stream = open(path, "wb")  # noqa: SIM115 - closed by close()

    def write(self, data: bytes | memoryview) -> None:
        """Append."""
        view = memoryview(data).cast("B")
        with disk_errors(self.path):
            self._stream.write(view)
        self.bytes += len(view)
        while len(view):
            part = view[: BLOCK - self._filled]
            self._crc = zlib.crc32(part, self._crc)
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == BLOCK:
                self._crcs.append(self._crc)
                self._crc, self._filled = 0, 0

    def close(self) -> None:
        """Flush to disk and write `<file>.crc`."""
        if self._filled:
            self._crcs.append(self._crc)
        with disk_errors(self.path):
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            crc_path(self.path).write_bytes(np.asarray(self._crcs, "<u4").tobytes())

    def abandon(self) -> None:
        """Close without a checksum file: the data stays recognisably incomplete."""
        self._stream.close()


def crc_path(path: Path) -> Path:
    """Where the block checksums of a data file are."""
    return path.with_name(path.name + ".crc")


class BlockReader:
    """A memory map whose blocks are checked against their CRC-32 when first touched.

    size: bytes the file must have. Raises DataError when the file or its checksums are missing, short, or differ.
    """

    def __init__(self, path: Path, size: int, check: bool = True) -> None:
        self.path, self.size = path, size
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            raise DataError(
                expected=f"{path} with {size} bytes", found="no such file" if found is None else f"{found} bytes ({'truncated' if found < size else 'too long'})",
                fix=AGAIN,
            )
        self.data = np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)
        blocks = -(-size // BLOCK)
        self._crcs: np.ndarray | None = None
        if check:
            crcs = crc_path(path)
            have = crcs.stat().st_size if crcs.is_file() else None
            if have != 4 * blocks:
                raise DataError(
                    expected=f"{crcs} with {blocks} checksums", found="no such file" if have is None else f"{have} bytes", fix=AGAIN
                )
            self._crcs = np.fromfile(crcs, "<u4")
        self._good = np.zeros(blocks, bool)

    def bytes(self, start: int, stop: int) -> np.ndarray:
        """uint8[stop - start], checked."""
        if self._crcs is not None and stop > start:
            first, last = start // BLOCK, (stop - 1) // BLOCK
            if not self._good[first : last + 1].all():
                for block in range(first, last + 1):
                    if not self._good[block]:
                        self._check(block)
        return self.data[start:stop]

    def verify(self) -> None:
        """Check every block now."""
        for block in np.flatnonzero(~self._good):
            if self._crcs is not None:
                self._check(int(block))

    def _check(self, block: int) -> None:
        assert self._crcs is not None
        crc = zlib.crc32(self.data[block * BLOCK : (block + 1) * BLOCK])
        if crc != int(self._crcs[block]):
            raise DataError(
                expected=f"CRC-32 {int(self._crcs[block]):08x} of bytes {block * BLOCK} to {min((block + 1) * BLOCK, self.size)} of {self.path}",
                found=f"{crc:08x}: the content was changed after it was written (a flipped bit or an edit)", fix=AGAIN,
            )
        self._good[block] = True


class IndexedWriter:
    """Writes `<prefix>.bin` and `<prefix>.idx`; the .idx, and with it the dataset, appears only at `close`."""

    def __init__(self, prefix: Path, dtype: np.dtype, masked: bool = False) -> None:
        self.prefix, self.dtype = Path(prefix), np.dtype(dtype)
        # An index of an earlier run must not be found beside this run's data.
        suffixed(self.prefix, ".idx").unlink(missing_ok=True)
        self._bin = BlockWriter(suffixed(self.prefix, ".bin"))
        self._mask = BlockWriter(suffixed(self.prefix, ".mask")) if masked else None
        self.lengths: list[int] = []

    def add(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Append one document: tokens int[n], mask 0/1[n] when the dataset has masks."""
        tokens = np.asarray(tokens)
        limits = np.iinfo(self.dtype)
        if len(tokens) and (tokens.min() < limits.min or tokens.max() > limits.max):
            raise DataError(
                expected=f"token ids that fit {self.dtype} ({limits.min} to {limits.max})", found=f"ids from {tokens.min()} to {tokens.max()}",
                fix="write with the dtype of the tokenizer's vocabulary",
            )
        self._bin.write(np.ascontiguousarray(tokens, self.dtype).tobytes())
        self.lengths.append(len(tokens))
        if self._mask is not None:
            if mask is None or len(mask) != len(tokens):
                raise DataError(expected=f"a mask of {len(tokens)} flags", found="none" if mask is None else f"{len(mask)} flags", fix="give one flag per token")
            self._mask.write(np.ascontiguousarray(mask, np.uint8).tobytes())

    def close(self) -> None:
        """Finish both files."""
        self._bin.close()
        if self._mask is not None:
            self._mask.close()
        lengths = np.asarray(self.lengths, np.int64)
        if len(lengths) and lengths.max() > np.iinfo(np.int32).max:
            raise DataError(expected="documents of fewer than 2^31 tokens", found=f"one of {lengths.max()}", fix="cut it into several documents")
        ends = np.cumsum(lengths) * self.dtype.itemsize
        content = HEADER.pack(MAGIC, VERSION, CODES[self.dtype], len(lengths), len(lengths) + 1)
        content += lengths.astype("<i4").tobytes() + (ends - lengths * self.dtype.itemsize).astype("<i8").tobytes()
        content += np.arange(len(lengths) + 1, dtype="<i8").tobytes()
        path = suffixed(self.prefix, ".idx")
        with disk_errors(path), open(path, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._bin.abandon()
            if self._mask is not None:
                self._mask.abandon()


def suffixed(prefix: Path, suffix: str) -> Path:
    """`prefix` may contain dots: append, never replace."""
    return prefix.with_name(prefix.name + suffix)


def read_index(path: Path) -> tuple[np.ndarray, np.dtype]:
    """Lengths int64[documents] and token dtype of an .idx written by this module or by Megatron. Raises DataError when damaged."""
    try:
        raw = Path(path).read_bytes()
    except FileNotFoundError:
        raise DataError(expected=f"an index file {path}", found="no such file", fix=AGAIN) from None
    if len(raw) < HEADER.size or not raw.startswith(MAGIC):
        raise DataError(expected=f"a Megatron index (it begins with {MAGIC[:7]!r}) in {path}", found=f"{raw[:9]!r}", fix=AGAIN)
    _, version, code, n, documents = HEADER.unpack_from(raw)
    if version != VERSION or code not in DTYPES:
        raise DataError(expected=f"version {VERSION} and an integer dtype in {path}", found=f"version {version}, dtype code {code}", fix=AGAIN)
    size = HEADER.size + 12 * n + 8 * documents
    if len(raw) < size:
        raise DataError(expected=f"{path} with at least {size} bytes for {n} documents", found=f"{len(raw)} bytes (truncated)", fix=AGAIN)
    return np.frombuffer(raw, "<i4", n, HEADER.size).astype(np.int64), np.dtype(DTYPES[code])
