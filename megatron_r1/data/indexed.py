"""Megatron's indexed dataset: `<prefix>.bin` (tokens end to end) and `<prefix>.idx`, byte for byte as megatron.core reads it.

The .idx, little-endian: b"MMIDIDX\\0\\0", uint64 version 1, uint8 dtype code, uint64 sequences, uint64 documents,
int32 lengths[sequences], int64 byte offsets[sequences], int64 document_indices[documents] with "documents" one more than there
are. Every sequence is one document here, so document_indices is 0 ... sequences.

Beside every file lies `<file>.crc`: uint32 CRC-32 of each block of BLOCK bytes. Blocks are checked when first read, so
a flipped bit is found where it is used, at the cost of one pass over what is used.

Nothing here holds a dataset in memory: writers spill what they must remember, readers map.
"""

from __future__ import annotations

import os
import stat
import struct
import zlib
from array import array
from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from types import TracebackType

import numpy as np

from megatron_r1.utils.errors import DataError
from megatron_r1.utils.io import atomic_write_bytes, disk_errors

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES: dict[int, type[np.integer]] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
"""Integer codes of megatron.core's DType; the codes 6 and 7 are floats and hold no tokens."""
CODES = {np.dtype(kind): code for code, kind in DTYPES.items()}
HEADER = struct.Struct("<9sQBQQ")
BLOCK = 1 << 20
CHUNK = 1 << 18
"""Entries of an index handled at once."""
STRIDE = 1024
"""Every how many documents `Index.find` remembers an offset."""
SMALL = 1 << 16
"""Files up to this size are read instead of mapped: a process may have only so many maps, and a corpus many small sources."""
AGAIN = "delete the folder of this artifact and run the same command again; raw files and other artifacts are untouched"


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 while every id fits (megatron.core's own rule: vocabulary below 65500), else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def suffixed(prefix: Path, suffix: str) -> Path:
    """`prefix` may contain dots: append, never replace."""
    return prefix.with_name(prefix.name + suffix)


def crc_path(path: Path) -> Path:
    """Where the block checksums of a file are."""
    return path.with_name(path.name + ".crc")


def file_size(path: Path) -> int | None:
    """Bytes of a file; None when there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


class BlockSums:
    """CRC-32 of every block of a stream of bytes that begins at a multiple of BLOCK."""

    def __init__(self) -> None:
        self._done = array("I")
        self._crc, self._filled = 0, 0

    def update(self, data: bytes | memoryview | np.ndarray) -> None:
        """Go on with `data`."""
        view = memoryview(data).cast("B")
        while len(view):
            part = view[: BLOCK - self._filled]
            self._crc = zlib.crc32(part, self._crc)
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == BLOCK:
                self._done.append(self._crc)
                self._crc, self._filled = 0, 0

    def finish(self) -> np.ndarray:
        """uint32[blocks], the last of which may be short."""
        if self._filled:
            self._done.append(self._crc)
            self._crc, self._filled = 0, 0
        return np.frombuffer(self._done, np.uint32).copy() if self._done else np.zeros(0, np.uint32)


def write_sums(path: Path, sums: np.ndarray) -> None:
    """Write `<path>.crc` from the checksums of the blocks of `path`, in order: those of adjoining ranges may be concatenated."""
    atomic_write_bytes(crc_path(path), np.asarray(sums, "<u4").tobytes())


def checksum_file(path: Path, beside: Path | None = None) -> None:
    """Read `path` and write its block checksums beside it (or beside `beside`, the name it will have)."""
    sums = BlockSums()
    with open(path, "rb") as stream:
        while data := stream.read(BLOCK):
            sums.update(data)
    write_sums(beside or path, sums.finish())


class BlockWriter:
    """Appends bytes to a file and writes the CRC-32 of every block beside it. Raises EnvironmentProblem when the disk is full."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sums = BlockSums()
        self.bytes = 0
        with disk_errors(path):
            crc_path(path).unlink(missing_ok=True)
            self._stream = open(path, "wb")  # noqa: SIM115 - closed by close()

    def write(self, data: bytes | memoryview) -> None:
        """Append."""
        with disk_errors(self.path):
            self._stream.write(data)
        self.bytes += memoryview(data).nbytes
        self._sums.update(data)

    def close(self) -> None:
        """Flush to disk and write `<file>.crc`."""
        with disk_errors(self.path):
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
        write_sums(self.path, self._sums.finish())

    def abandon(self) -> None:
        """Close without a checksum file: the data stays recognisably incomplete."""
        with suppress(OSError):  # a full disk refuses the last buffer again
            self._stream.close()


class BlockReader:
    """A memory map whose blocks are checked against their CRC-32 when first touched.

    size: bytes the file must have; None takes those it has. check: None checks when there is a `.crc` file. crc: what the
    CRC-32 of the `.crc` file must be. Raises DataError when the file or its checksums are missing, short, or differ.
    """

    def __init__(self, path: Path, size: int | None = None, check: bool | None = True, crc: int | None = None, fix: str = AGAIN) -> None:
        self.path, self._crc, self.fix = Path(path), crc, fix
        found = file_size(self.path)
        if found is None or size not in (None, found):
            raise DataError(
                expected=str(path) if size is None else f"{path} with {size} bytes",
                found="no such file" if found is None else f"{found} bytes ({'truncated' if found < (size or 0) else 'too long'})", fix=fix,
            )
        self.size = found
        self.blocks = -(-found // BLOCK)
        self.checked = crc_path(self.path).is_file() if check is None else check
        if self.checked:
            sums = crc_path(self.path)
            have = file_size(sums)
            if have != 4 * self.blocks:
                raise DataError(expected=f"{sums} with {4 * self.blocks} bytes, a checksum for each block", found="no such file" if have is None else f"{have} bytes", fix=fix)
        self._good = bytearray(self.blocks)

    @cached_property
    def data(self) -> np.ndarray:
        """uint8[size], unchecked."""
        # The base class: slicing numpy.memmap itself costs several times as much.
        return np.fromfile(self.path, np.uint8) if self.size <= SMALL else np.asarray(np.memmap(self.path, np.uint8, "r", shape=(self.size,)))

    @cached_property
    def _sums(self) -> np.ndarray:
        raw = crc_path(self.path).read_bytes()
        if self._crc is not None and zlib.crc32(raw) != self._crc:
            raise DataError(
                expected=f"CRC-32 {self._crc:08x} of {crc_path(self.path)}", found=f"{zlib.crc32(raw):08x}: the file was changed after it was written (a flipped bit or an edit)",
                fix=self.fix,
            )
        return np.frombuffer(raw, "<u4")

    def bytes(self, start: int, stop: int) -> np.ndarray:
        """uint8[stop - start], checked. Raises DataError for a range outside the file."""
        if not 0 <= start <= stop <= self.size:
            raise DataError(expected=f"a range inside the {self.size} bytes of {self.path}", found=f"bytes {start} to {stop}", fix=self.fix)
        if self.checked and stop > start:
            for block in range(start // BLOCK, (stop - 1) // BLOCK + 1):
                if not self._good[block]:
                    self._check(block)
        return self.data[start:stop]

    def windows(self, starts: np.ndarray, n: int, dtype: np.dtype) -> np.ndarray:
        """Copies [k, n] of the file's numbers of type `dtype` from number starts[k], checked."""
        width = dtype.itemsize
        if n < 1 or starts.min() < 0 or (starts.max() + n) * width > self.size:
            raise DataError(expected=f"ranges inside the {self.size // width} numbers of {self.path}", found=f"{starts.min()} to {starts.max() + n}", fix=self.fix)
        if self.checked:
            good = np.frombuffer(self._good, np.uint8)
            block, last = starts * width // BLOCK, ((starts + n) * width - 1) // BLOCK
            while True:
                if not good[block].all():
                    for bad in np.unique(block[good[block] == 0]):
                        self._check(int(bad))
                if (block == last).all():
                    break
                block = np.minimum(block + 1, last)
        numbers = self.data[: self.size // width * width].view(dtype)
        # Every window is a row of this view, so picking rows copies whole windows, without an index for every token.
        return np.ndarray((len(numbers) - n + 1, n), dtype, numbers, 0, (width, width))[starts]

    def verify(self) -> None:
        """Check every block now."""
        self.bytes(0, self.size)

    def _check(self, block: int) -> None:
        crc, wanted = zlib.crc32(self.data[block * BLOCK : (block + 1) * BLOCK]), int(self._sums[block])
        if crc != wanted:
            raise DataError(
                expected=f"CRC-32 {wanted:08x} of bytes {block * BLOCK} to {min((block + 1) * BLOCK, self.size)} of {self.path}",
                found=f"{crc:08x}: the content was changed after it was written (a flipped bit or an edit)", fix=self.fix,
            )
        self._good[block] = 1


class IndexWriter:
    """Writes an .idx from the lengths of the documents, which wait on disk: memory does not grow with their number.

    The file appears at `close`, with its checksums; until then it is `<path>.part`.
    """

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.path, self.dtype = Path(path), np.dtype(dtype)
        self.documents = self.tokens = 0
        self._waiting = array("i")
        self._part = suffixed(self.path, ".part")
        with disk_errors(self.path):
            # An index of an earlier run must not be found beside this run's data.
            for stale in (self.path, crc_path(self.path)):
                stale.unlink(missing_ok=True)
            self._stream = open(self._part, "w+b")  # noqa: SIM115 - closed by close()
            self._stream.write(bytes(HEADER.size))

    def add(self, length: int) -> None:
        """The next document has `length` tokens. Raises DataError for a negative length and for 2^31 and more."""
        if not 0 <= length <= np.iinfo(np.int32).max:
            raise DataError(expected="documents of fewer than 2^31 tokens", found=f"one of {length}", fix="cut it into several documents")
        self._waiting.append(length)
        self.documents, self.tokens = self.documents + 1, self.tokens + length
        if len(self._waiting) >= CHUNK:
            self._spill()

    def extend(self, lengths: np.ndarray) -> None:
        """`add` for an array of lengths."""
        lengths = np.asarray(lengths, np.int64)
        if len(lengths) == 0:
            return
        if lengths.min() < 0 or lengths.max() > np.iinfo(np.int32).max:
            raise DataError(expected="documents of 0 to 2^31 - 1 tokens", found=f"one of {lengths.min() if lengths.min() < 0 else lengths.max()}", fix="cut it into several documents")
        self._spill()
        with disk_errors(self.path):
            self._stream.write(lengths.astype("<i4").tobytes())
        self.documents, self.tokens = self.documents + len(lengths), self.tokens + int(lengths.sum())

    def _spill(self) -> None:
        with disk_errors(self.path):
            self._stream.write(np.asarray(self._waiting, "<i4").tobytes())
        self._waiting = array("i")

    def close(self) -> None:
        """Write the byte offsets after the lengths, check-sum, and give the file its name."""
        self._spill()
        with disk_errors(self.path):
            stream, at = self._stream, 0
            stream.flush()
            for first in range(0, self.documents, CHUNK):
                n = min(CHUNK, self.documents - first)
                lengths = np.frombuffer(os.pread(stream.fileno(), 4 * n, HEADER.size + 4 * first), "<i4").astype(np.int64) * self.dtype.itemsize
                ends = at + np.cumsum(lengths)
                stream.write((ends - lengths).astype("<i8").tobytes())
                at = int(ends[-1])
            for first in range(0, self.documents + 1, CHUNK):
                stream.write(np.arange(first, min(first + CHUNK, self.documents + 1), dtype="<i8").tobytes())
            stream.seek(0)
            stream.write(HEADER.pack(MAGIC, VERSION, CODES[self.dtype], self.documents, self.documents + 1))
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()
            checksum_file(self._part, self.path)
            os.replace(self._part, self.path)

    def abandon(self) -> None:
        """Close and remove what there is."""
        with suppress(OSError):
            self._stream.close()
        self._part.unlink(missing_ok=True)


def write_index(path: Path, lengths: Iterable[np.ndarray], dtype: np.dtype) -> tuple[int, int]:
    """Write an .idx and its checksums from arrays of document lengths; returns documents and tokens."""
    writer = IndexWriter(path, dtype)
    try:
        for part in lengths:
            writer.extend(part)
        writer.close()
    except BaseException:
        writer.abandon()
        raise
    return writer.documents, writer.tokens


class IndexedWriter:
    """Writes `<prefix>.bin` and `<prefix>.idx`; the .idx, and with it the dataset, appears only at `close`."""

    def __init__(self, prefix: Path, dtype: np.dtype, masked: bool = False) -> None:
        self.prefix, self.dtype = Path(prefix), np.dtype(dtype)
        self._index = IndexWriter(suffixed(self.prefix, ".idx"), self.dtype)
        self._bin = BlockWriter(suffixed(self.prefix, ".bin"))
        self._mask = BlockWriter(suffixed(self.prefix, ".mask")) if masked else None

    @property
    def documents(self) -> int:
        """Documents so far."""
        return self._index.documents

    @property
    def tokens(self) -> int:
        """Tokens so far."""
        return self._index.tokens

    def add(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Append one document: tokens int[n], mask 0/1[n] when the dataset has masks."""
        tokens = np.asarray(tokens)
        limits = np.iinfo(self.dtype)
        if len(tokens) and (tokens.min() < limits.min or tokens.max() > limits.max):
            raise DataError(
                expected=f"token ids that fit {self.dtype} ({limits.min} to {limits.max})", found=f"ids from {tokens.min()} to {tokens.max()}",
                fix="write with the dtype of the tokenizer's vocabulary",
            )
        if self._mask is not None and (mask is None or len(mask) != len(tokens)):
            raise DataError(expected=f"a mask of {len(tokens)} flags", found="none" if mask is None else f"{len(mask)} flags", fix="give one flag per token")
        self._index.add(len(tokens))
        self._bin.write(np.ascontiguousarray(tokens, self.dtype).tobytes())
        if self._mask is not None:
            self._mask.write(np.ascontiguousarray(mask, np.uint8).tobytes())

    def extend(self, lengths: np.ndarray) -> None:
        """Append many documents without masks: lengths int[n]. Their tokens follow, by `fill`."""
        self._index.extend(lengths)

    def fill(self, content: bytes) -> None:
        """Tokens of documents that `extend` announced, as they stand in the file."""
        self._bin.write(content)

    def close(self) -> None:
        """Finish both files."""
        self._bin.close()
        if self._mask is not None:
            self._mask.close()
        self._index.close()

    def abandon(self) -> None:
        """Stop: no index appears."""
        self._bin.abandon()
        if self._mask is not None:
            self._mask.abandon()
        self._index.abandon()

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


class Index:
    """An .idx of this module or of Megatron, mapped.

    Opening reads its header and its end, whatever its length. Raises DataError when damaged. An index without checksums (not
    written by this project) is read through once and checked for consistency.
    """

    def __init__(self, path: Path | BlockReader, fix: str = AGAIN) -> None:
        reader = self._reader = path if isinstance(path, BlockReader) else BlockReader(Path(path), check=None, fix=fix)
        self.path = path = reader.path
        fix = reader.fix
        raw = reader.bytes(0, min(HEADER.size, reader.size)).tobytes()
        if len(raw) < HEADER.size or not raw.startswith(MAGIC):
            raise DataError(expected=f"a Megatron index (it begins with {MAGIC[:7]!r}) in {path}", found=f"{raw[:9]!r}", fix=fix)
        _, version, code, self.documents, boundaries = HEADER.unpack(raw)
        if version != VERSION or code not in DTYPES:
            raise DataError(expected=f"version {VERSION} and an integer dtype in {path}", found=f"version {version}, dtype code {code}", fix=fix)
        size = HEADER.size + 12 * self.documents + 8 * boundaries
        if reader.size != size:
            found = f"{reader.size} bytes ({'truncated' if reader.size < size else 'too long'})"
            raise DataError(expected=f"{path} with {size} bytes for {self.documents} documents", found=found, fix=fix)
        self.dtype = np.dtype(DTYPES[code])
        self._boundaries = boundaries
        self.tokens = self._end()
        if not reader.checked:
            self.verify()

    def __len__(self) -> int:
        """Documents."""
        return self.documents

    def _array(self, dtype: str, first: int, last: int, base: int) -> np.ndarray:
        width = np.dtype(dtype).itemsize
        return self._reader.bytes(base + width * first, base + width * last).view(dtype)

    def _starts(self, first: int, last: int) -> np.ndarray:
        """Byte offsets of documents first ... last - 1."""
        return self._array("<i8", first, last, HEADER.size + 4 * self.documents)

    def _end(self) -> int:
        """Tokens of all documents, from the last one."""
        if not self.documents:
            return 0
        n = self.documents
        start, length = int(self._starts(n - 1, n)[0]), int(self._array("<i4", n - 1, n, HEADER.size)[0])
        if start < 0 or length < 0:
            self._wrong("an offset and a length that are not negative", f"{start} and {length} for the last document")
        return start // self.dtype.itemsize + length

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of every document: int32[documents], mapped (its blocks are checked at the first use)."""
        return self._array("<i4", 0, self.documents, HEADER.size)

    def edges(self, first: int, last: int) -> np.ndarray:
        """First token of documents first ... last - 1 in the dataset, and the end of the last: int64[last - first + 1]."""
        if not 0 <= first <= last <= self.documents:
            raise DataError(expected=f"documents within the {self.documents} of {self.path}", found=f"{first} to {last}", fix="count documents with len()")
        found = np.empty(last - first + 1, np.int64)
        known = min(last + 1, self.documents) - first
        np.floor_divide(self._starts(first, first + known), self.dtype.itemsize, out=found[:known])
        found[known:] = self.tokens
        return found

    @cached_property
    def _coarse(self) -> np.ndarray:
        return self._starts(0, self.documents)[::STRIDE] // self.dtype.itemsize

    def find(self, token: int) -> int:
        """The document token number `token` belongs to (the last that begins at or before it); 8 bytes of memory for 1024 documents."""
        if not 0 <= token < self.tokens:
            raise DataError(expected=f"a token within the {self.tokens} of {self.path}", found=str(token), fix="count tokens with .tokens")
        first = max(0, int(np.searchsorted(self._coarse, token, side="right")) - 1) * STRIDE
        starts = self.edges(first, min(first + STRIDE, self.documents))[:STRIDE]
        return first + max(0, int(np.searchsorted(starts, token, side="right")) - 1)

    def verify(self) -> None:
        """Check every block, and that lengths, offsets and document boundaries agree. Raises DataError."""
        at = 0
        for first in range(0, self.documents, CHUNK):
            last = min(first + CHUNK, self.documents)
            lengths = self._array("<i4", first, last, HEADER.size).astype(np.int64)
            if lengths.min() < 0:
                self._wrong("lengths that are not negative", f"{lengths.min()} for document {first + int(lengths.argmin())}")
            ends = at + np.cumsum(lengths) * self.dtype.itemsize
            wrong = np.flatnonzero(self._starts(first, last) != ends - lengths * self.dtype.itemsize)
            if len(wrong):
                self._wrong("offsets that are the sums of the lengths before them", f"another one for document {first + int(wrong[0])}")
            at = int(ends[-1])
        previous = 0
        for first in range(0, self._boundaries, CHUNK):
            part = self._array("<i8", first, min(first + CHUNK, self._boundaries), HEADER.size + 12 * self.documents)
            if (np.diff(part, prepend=previous) < 0).any() or part[-1] > self.documents or (first == 0 and part[0] != 0):
                self._wrong(f"document boundaries that rise from 0 to {self.documents}", f"others after number {first}")
            previous = int(part[-1])
        if previous != self.documents:
            self._wrong(f"document boundaries that end at {self.documents}", str(previous))

    def _wrong(self, expected: str, found: str) -> None:
        raise DataError(expected=f"{expected} in {self.path}", found=found, fix=self._reader.fix)


def read_index(path: Path) -> tuple[np.ndarray, np.dtype]:
    """Lengths int32[documents] (mapped) and token dtype of an .idx written by this module or by Megatron. Raises DataError when damaged."""
    index = Index(path)
    return index.lengths, index.dtype
