"""`<prefix>.docs.parquet`: one row a document, written and read by row groups.

    id        unique within its source       n_tokens  tokens, those around the text included
    group     never straddles splits         n_bytes   UTF-8 bytes of the text
    file      where the document came from   offset    its first byte there, decompressed (Parquet: row); -1 unknown

The file's own metadata holds the SHA-256 of the tokenizer, where it is known.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np

from megatron_r1.data.indexed import BlockReader, checksum_file, crc_path, suffixed
from megatron_r1.utils.errors import DataError
from megatron_r1.utils.io import disk_errors

COLUMNS = ("id", "group", "n_tokens", "n_bytes", "file", "offset")
NUMBERS = ("n_tokens", "n_bytes", "offset")
ROWS = 1 << 15
"""Rows of a row group: what a writer holds, and what a reader reads for one document."""
TOKENIZER = b"tokenizer_sha256"
CACHED = 4
"""Row groups of one column that a reader remembers."""


def _schema(tokenizer: str) -> Any:
    import pyarrow as pa

    kinds = {"id": pa.string(), "group": pa.string(), "n_tokens": pa.int64(), "n_bytes": pa.int64(), "file": pa.dictionary(pa.int32(), pa.string()), "offset": pa.int64()}
    return pa.schema([(name, kinds[name]) for name in COLUMNS], metadata={TOKENIZER: tokenizer.encode()} if tokenizer else None)


class DocumentsWriter:
    """Appends rows; every ROWS of them are written and forgotten, so equal rows give equal bytes however they arrive.

    The file appears at `close`, with its checksums; until then it is `<path>.part`. tokenizer: its SHA-256.
    """

    def __init__(self, path: Path, tokenizer: str = "") -> None:
        import pyarrow.parquet as pq

        self.path, self.documents, self.bytes = Path(path), 0, 0
        self._schema = _schema(tokenizer)
        self._rows: list[list[Any]] = [[] for _ in COLUMNS]
        self._part = suffixed(self.path, ".part")
        with disk_errors(self.path):
            for stale in (self.path, crc_path(self.path)):
                stale.unlink(missing_ok=True)
            self._writer = pq.ParquetWriter(self._part, self._schema, compression="zstd", write_statistics=False)

    def add(self, id: str, group: str, n_tokens: int, n_bytes: int, file: str = "", offset: int = -1) -> None:
        """Append the row of one document."""
        for column, value in zip(self._rows, (id, group, n_tokens, n_bytes, file, offset), strict=True):
            column.append(value)
        self.documents, self.bytes = self.documents + 1, self.bytes + n_bytes
        if len(self._rows[0]) == ROWS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if not self._rows[0]:
            return
        try:
            columns = [pa.array(values, field.type.value_type).dictionary_encode() if pa.types.is_dictionary(field.type) else pa.array(values, field.type) for values, field in zip(self._rows, self._schema, strict=True)]
        except (UnicodeError, pa.ArrowException, OverflowError, TypeError) as error:
            raise DataError(
                expected=f"rows of {', '.join(COLUMNS)} for {self.path}, their text valid Unicode", found=f"{type(error).__name__}: {error}", fix="mend the ids, groups and file names of the documents"
            ) from error
        with disk_errors(self.path):
            self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema), row_group_size=ROWS)
        self._rows = [[] for _ in COLUMNS]

    def close(self) -> None:
        """Write what is left, check-sum, and give the file its name."""
        self._flush()
        with disk_errors(self.path):
            self._writer.close()
            with open(self._part, "rb") as stream:
                os.fsync(stream.fileno())
            checksum_file(self._part, self.path)
            os.replace(self._part, self.path)

    def abandon(self) -> None:
        """Close and remove what there is."""
        with suppress(Exception):  # whatever went wrong while writing goes wrong again
            self._writer.close()
        self._part.unlink(missing_ok=True)


def write_documents(path: Path, rows: Iterable[tuple[str, str, int, int, str, int]], tokenizer: str = "") -> tuple[int, int]:
    """Write a docs.parquet and its checksums from rows in the order of COLUMNS; returns documents and bytes of text."""
    writer = DocumentsWriter(path, tokenizer)
    try:
        for row in rows:
            writer.add(*row)
        writer.close()
    except BaseException:
        writer.abandon()
        raise
    return writer.documents, writer.bytes


class Documents:
    """The rows of a docs.parquet; a row group is read, and its blocks are checked, when one of its rows is asked for.

    Raises DataError when the file is damaged or has other columns or another number of rows.
    """

    def __init__(self, reader: BlockReader, documents: int | None = None) -> None:
        self._reader, self._expected = reader, documents

    @cached_property
    def _file(self) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with self._parquet():
            file = pq.ParquetFile(pa.PythonFile(_Checked(self._reader), mode="r"), pre_buffer=False)
            found = file.schema_arrow
        missing = [name for name in COLUMNS if name not in found.names]
        if missing:
            self._wrong(f"the columns {', '.join(COLUMNS)}", f"no column {', '.join(missing)}")
        kinds = [found.field(name).type for name in COLUMNS]
        if [pa.types.is_integer(kind) for kind in kinds] != [name in NUMBERS for name in COLUMNS]:
            self._wrong(f"text and whole numbers in the columns {', '.join(COLUMNS)}", ", ".join(map(str, kinds)))
        if self._expected not in (None, file.metadata.num_rows):
            self._wrong(f"{self._expected} rows", f"{file.metadata.num_rows}")
        return file

    @contextmanager
    def _parquet(self) -> Iterator[None]:
        import pyarrow as pa

        try:
            yield
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            raise DataError(expected=f"a readable Parquet file {self._reader.path}", found=f"{type(error).__name__}: {str(error)[:200]}", fix=self._reader.fix) from error

    def _wrong(self, expected: str, found: str) -> None:
        raise DataError(expected=f"{expected} in {self._reader.path}", found=found, fix=self._reader.fix)

    def __len__(self) -> int:
        return self._file.metadata.num_rows

    @property
    def tokenizer(self) -> str:
        """SHA-256 of the tokenizer, empty when not recorded."""
        return ((self._file.schema_arrow.metadata or {}).get(TOKENIZER, b"")).decode("ascii", "replace")

    @cached_property
    def starts(self) -> np.ndarray:
        """First row of every row group, and the end: int64[row groups + 1]."""
        metadata = self._file.metadata
        return np.cumsum([0, *(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))])

    def group(self, number: int, columns: Sequence[str] = COLUMNS) -> list[np.ndarray | list[str]]:
        """Columns of one row group: text as lists, numbers as int64."""
        with self._parquet():
            table = self._file.read_row_group(number, list(columns), use_threads=False)
            if any(column.null_count for column in table.columns):
                self._wrong("a value in every row", "rows without one")
            return [table[name].to_numpy().astype(np.int64) if name in NUMBERS else table[name].to_pylist() for name in columns]

    def column(self, name: str) -> Column:
        """One column as a sequence."""
        return Column(self, name)

    def rows(self, first: int, last: int) -> Iterator[tuple[Any, ...]]:
        """Rows first ... last - 1, each in the order of COLUMNS."""
        number = int(np.searchsorted(self.starts, first, side="right")) - 1
        while first < last:
            begin, end = int(self.starts[number]), int(self.starts[number + 1])
            stop = min(last, end)
            if stop > first:
                columns = [column[first - begin : stop - begin] for column in self.group(number)]
                yield from zip(*(column if isinstance(column, list) else column.tolist() for column in columns), strict=True)
            first, number = stop, number + 1

    def row(self, i: int) -> dict[str, Any]:
        """Row i by column name."""
        return dict(zip(COLUMNS, next(self.rows(i, i + 1)), strict=True))

    def verify(self) -> None:
        """Check every block and decode every row."""
        self._reader.verify()
        for number in range(len(self.starts) - 1):
            self.group(number)


class Column(Sequence[Any]):
    """A column that is read where it is looked at."""

    def __init__(self, documents: Documents, name: str) -> None:
        self._documents, self._name = documents, name
        self._groups: dict[int, list[Any]] = {}

    def __len__(self) -> int:
        return len(self._documents)

    def _read(self, number: int) -> list[Any]:
        (found,) = self._documents.group(number, [self._name])
        return found if isinstance(found, list) else found.tolist()

    def _values(self, number: int) -> list[Any]:
        if number not in self._groups:
            while len(self._groups) >= CACHED:
                del self._groups[next(iter(self._groups))]
            self._groups[number] = self._read(number)
        return self._groups[number]

    @overload
    def __getitem__(self, i: int) -> Any: ...

    @overload
    def __getitem__(self, i: slice) -> list[Any]: ...

    def __getitem__(self, i: int | slice) -> Any:
        if isinstance(i, slice):
            return self.take(range(*i.indices(len(self))))
        i = int(i)
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        number = int(np.searchsorted(self._documents.starts, i, side="right")) - 1
        return self._values(number)[i - int(self._documents.starts[number])]

    def __iter__(self) -> Iterator[Any]:
        for number in range(len(self._documents.starts) - 1):
            yield from self._read(number)

    def take(self, rows: Iterable[int]) -> list[Any]:
        """The values of many rows, in the order asked; each row group is read once."""
        wanted = np.asarray(list(rows), np.int64)
        found: list[Any] = [None] * len(wanted)
        for at in np.argsort(wanted, kind="stable"):
            found[at] = self[int(wanted[at])]
        return found

    def numbers(self) -> np.ndarray:
        """A column of numbers: int64[documents]."""
        parts = [self._documents.group(number, [self._name])[0] for number in range(len(self._documents.starts) - 1)]
        return np.concatenate([np.zeros(0, np.int64), *parts])


class _Checked(io.RawIOBase):
    """The file of a BlockReader, for libraries that read files."""

    def __init__(self, reader: BlockReader) -> None:
        self._reader, self._at = reader, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._reader.size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, n: int = -1) -> bytes:
        stop = self._reader.size if n is None or n < 0 else min(self._at + n, self._reader.size)
        found = self._reader.bytes(self._at, max(self._at, stop)).tobytes() if self._at <= self._reader.size else b""
        self._at += len(found)
        return found
