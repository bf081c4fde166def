"""Parquet files: one document a row. Row groups are read in batches of the needed columns; offsets are row numbers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megatron_r1.corpus import fields
from megatron_r1.corpus.config import SourceConfig
from megatron_r1.corpus.files import BLOCK, Stored
from megatron_r1.corpus.items import Bad, Item
from megatron_r1.corpus.partitions import Partition
from megatron_r1.utils.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

BATCH = 32 << 20
"""Bytes of rows decoded at a time, about; a row is never cut."""


def items(source: SourceConfig, partition: Partition, stream: Stored, resume: int | None) -> Iterator[Item]:
    """Rows of the row groups that begin in the partition, from row `resume`. Raises DataError when the file has other columns than the source wants."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file, done = partition.file, resume or 0
    try:
        table = pq.ParquetFile(stream, buffer_size=BLOCK, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        if partition.start == 0 and resume is None:
            yield Bad(file, 0, f"not a whole Parquet file: {_line(error)}"), 0, 1
        return
    columns, binary = _columns(source, partition, table.schema_arrow)
    position, stored = 0, stream.seek(0, os.SEEK_END)
    for number in range(table.num_row_groups):
        group = table.metadata.row_group(number)
        row, position = position, position + group.num_rows
        # A group belongs to where its first byte lies; one that claims to lie outside the file belongs to an end of it.
        if not partition.start <= min(_begin(group), stored - 1) < partition.end or position <= done:
            continue
        size, bytes_per_row = _row_bytes(group, columns), group.total_byte_size // max(1, group.num_rows)
        try:
            for batch in table.iter_batches(batch_size=max(1, min(8192, BATCH // size)), row_groups=[number], columns=columns, use_threads=False):
                skip = min(batch.num_rows, max(0, done - row))
                row += skip
                for record in _rows(batch.slice(skip), binary):
                    row += 1
                    made = record if isinstance(record, str) else fields.make(partition.source, source, record, file, row - 1)
                    yield (Bad(file, row - 1, made) if isinstance(made, str) else made), bytes_per_row, row
        except (pa.ArrowException, OSError) as error:
            row = max(row, done)
            yield Bad(file, row, f"damaged Parquet data: {_line(error)}; rows {row} to {position - 1} are lost"), (position - row) * bytes_per_row, position


def _columns(source: SourceConfig, partition: Partition, schema: pa.Schema) -> tuple[list[str], set[str]]:
    """The columns to read, and which of them are bytes that may be text."""
    import pyarrow.types as types

    def plain(kind: Any) -> Any:
        return kind.value_type if types.is_dictionary(kind) else kind

    named = fields.wanted_fields(source)
    columns = [column for column in schema.names if column in named]
    fix = f"name the right fields in sources.{partition.source}, or take the file out of its path"
    if named.difference(columns):
        raise DataError(expected=f"columns {', '.join(sorted(named))} in {partition.file}", found=f"columns {', '.join(schema.names)}", fix=fix)
    binary = {column for column in columns if types.is_binary(kind := plain(schema.field(column).type)) or types.is_large_binary(kind)}
    if source.format != "chat" and source.template is None and source.text_field not in binary:
        kind = plain(schema.field(source.text_field).type)
        if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind)):
            raise DataError(expected=f"text in column {source.text_field} of {partition.file}", found=f"the type {kind}", fix=fix)
    return columns, binary


def _begin(group: pq.RowGroupMetaData) -> int:
    """Byte a row group begins at."""
    chunks = [group.column(i) for i in range(group.num_columns)]
    return max(0, min((chunk.dictionary_page_offset or chunk.data_page_offset for chunk in chunks), default=0))


def _row_bytes(group: pq.RowGroupMetaData, columns: list[str]) -> int:
    """Bytes of the needed columns a row may have, at least 1: the average, or all of the dictionary where there is one (a row may hold
    its longest entry, and so may the next)."""
    size = 1
    for chunk in (group.column(i) for i in range(group.num_columns)):
        if chunk.path_in_schema.split(".")[0] in columns:
            size += chunk.total_uncompressed_size // max(1, group.num_rows)
            if chunk.dictionary_page_offset:
                size += max(0, chunk.data_page_offset - chunk.dictionary_page_offset) * chunk.total_uncompressed_size // max(1, chunk.total_compressed_size)
    return size


def _rows(batch: pa.RecordBatch, binary: set[str]) -> Iterator[dict[str, Any] | str]:
    """Rows as Python values, or why one is bad."""
    try:
        rows: list[Any] = batch.to_pylist()
    except UnicodeDecodeError:
        rows = [_row(batch, i) for i in range(batch.num_rows)]
    for row in rows:
        try:
            if not isinstance(row, str):
                row |= {name: row[name].decode("utf-8") for name in binary if row[name] is not None}
            yield row
        except UnicodeDecodeError as error:
            yield f"invalid UTF-8 at byte {error.start} of a field"


def _row(batch: pa.RecordBatch, i: int) -> dict[str, Any] | str:
    try:
        return batch.slice(i, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        return f"invalid UTF-8 at byte {error.start} of a field"


def _line(error: Exception) -> str:
    return str(error).split("\n")[0]
