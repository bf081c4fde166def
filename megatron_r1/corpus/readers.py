"""Your own files as documents: JSON lines, plain text, Parquet, WARC. Bad input is an item like a document, never an exception.

Offsets count bytes of the decompressed file, or rows of a Parquet file. A line may be as long as memory allows.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import replace

from megatron_r1.corpus import fields, parquet, streams, warc
from megatron_r1.corpus.config import SourceConfig
from megatron_r1.corpus.files import InputFile, Stored, check_unchanged
from megatron_r1.corpus.filters import content_key
from megatron_r1.corpus.items import Bad, Item, excerpt
from megatron_r1.corpus.partitions import Partition, plan_partitions, splittable
from megatron_r1.data.document import Document
from megatron_r1.utils.errors import DataError


def read(name: str, source: SourceConfig, files: Sequence[InputFile]) -> Iterator[tuple[Document | Bad, int]]:
    """Everything in a source, in order, with the bytes of content each took. Raises what `read_partition` does."""
    for partition in plan_partitions(name, source, files, 1 << 62):
        for made, size, _ in read_partition(source, partition, files):
            yield made, size


def read_partition(source: SourceConfig, partition: Partition, files: Sequence[InputFile], resume: int | None = None) -> Iterator[Item]:
    """Documents and bad input of a partition, in order. `resume` is the position of an earlier item: what follows it is yielded.

    Raises DataError when the file is gone or changed (looked at before and after), EnvironmentProblem when it can not be read.
    """
    file = next((file for file in files if file.name == partition.file), None)
    if file is None:
        raise DataError(expected=f"{partition.file} among the files of source {partition.source!r}", found=f"{len(files)} others", fix="plan the partitions from these files")
    check_unchanged(file)
    for made, size, after in _items(source, partition, file, resume):
        if source.ids == "content" and isinstance(made, Document):
            made = replace(made, id=content_key(made))
        yield made, size, after
    check_unchanged(file)


def _items(source: SourceConfig, partition: Partition, file: InputFile, resume: int | None) -> Iterator[Item]:
    with Stored(file) as stream:
        if source.kind == "parquet":
            yield from parquet.items(source, partition, stream, resume)
        elif source.kind == "warc":
            yield from warc.items(partition, stream, file.suffix, resume)
        elif source.kind == "text" and source.document == "file":
            if resume is None:
                yield _whole(partition, stream, file.suffix)
        elif source.kind == "text" and source.document == "paragraph":
            yield from _paragraphs(source, partition, stream, file, resume)
        else:
            yield from _by_line(source, partition, stream, file, resume)


def _by_line(source: SourceConfig, partition: Partition, stream: Stored, file: InputFile, resume: int | None) -> Iterator[Item]:
    """One document a line."""
    before = _first(partition, stream) if resume is None else resume
    end = partition.end if splittable(source, file) else None
    if end is not None and before >= end:
        return
    jsonl = source.kind == "jsonl"
    try:
        for offset, line, after in streams.lines(streams.blocks(stream, file.suffix, before), before):
            if end is not None and offset >= end:
                return
            line = _bare(line, offset)
            if not line.strip():
                continue
            made: Document | Bad | str
            if jsonl:
                record = fields.parse(line, offset)
                made = record if isinstance(record, str) else fields.make(partition.source, source, record, file.name, offset)
                if isinstance(made, str):
                    made = Bad(file.name, offset, made, excerpt(line))
            else:
                made = _decoded(partition.source, line, f"{file.name}:{offset}", file.name, offset)
            yield made, after - before, after
            before = after
    except streams.DamagedInput as damage:
        yield _damaged(file, before, *damage.args)


def _paragraphs(source: SourceConfig, partition: Partition, stream: Stored, file: InputFile, resume: int | None) -> Iterator[Item]:
    """One document between empty lines. A paragraph belongs to where the empty line before it begins: both neighbours of a cut see that alike."""
    before = _first(partition, stream) if resume is None else resume
    end = partition.end if splittable(source, file) else None
    if end is not None and before >= end:
        return
    inside = resume is not None or partition.start == 0
    block: list[bytes] = []
    start = after = before
    try:
        for offset, line, after in streams.lines(streams.blocks(stream, file.suffix, before), before):  # noqa: B007 - used behind the loop
            line = _bare(line, offset)
            foreign = end is not None and offset >= end
            if line.strip():
                if not inside and foreign:
                    return
                if inside:
                    start = start if block else offset
                    block.append(line)
                continue
            if block:
                yield _decoded(partition.source, b"\n".join(block), f"{file.name}:{start}", file.name, start), offset - before, offset
                before, block = offset, []
            if foreign:
                return
            inside = True
    except streams.DamagedInput as damage:
        reason, offset, begin, reached = damage.args
        yield _damaged(file, before, reason, start if block else offset, block[0] if block else begin, reached)
        return
    if block:
        yield _decoded(partition.source, b"\n".join(block), f"{file.name}:{start}", file.name, start), after - before, after


def _whole(partition: Partition, stream: Stored, suffix: str) -> Item:
    """The file as one document."""
    content: list[bytes] = []
    try:
        content.extend(streams.blocks(stream, suffix))
    except streams.DamagedInput as damage:
        size = sum(map(len, content))
        return Bad(partition.file, 0, f"{damage.args[0]} (after {size} bytes)", excerpt(content[0] if content else b"")), size, size
    raw = _bare(b"".join(content), 0, newline=False)
    content.clear()
    return _decoded(partition.source, raw, partition.file, partition.file, 0), len(raw), len(raw)


def _first(partition: Partition, stream: Stored) -> int:
    """Where the first line of a partition begins (of compressed files: at 0), or its end when none does."""
    if partition.start == 0:
        return 0
    position = partition.start - 1
    stream.seek(position)
    while position < partition.end and (block := stream.read(min(streams.BLOCK, partition.end - position))):
        found = block.find(b"\n")
        if found >= 0:
            return position + found + 1
        position += len(block)
    return partition.end


def _damaged(file: InputFile, before: int, reason: str, offset: int, begin: bytes, reached: int) -> Item:
    """The one item that stands for all that can not be read. Its position lies behind what can be, so that nothing follows it."""
    return Bad(file.name, offset, f"{reason} (after {reached} bytes of content); what follows is lost", excerpt(begin)), reached - before, reached + 1


def _bare(line: bytes, offset: int, newline: bool = True) -> bytes:
    """Without the byte order mark of a file's beginning, nor what Windows ends lines with."""
    if offset == 0:
        line = line.removeprefix(codecs.BOM_UTF8)
    return line.rstrip(b"\r") if newline else line


def _decoded(name: str, raw: bytes, identity: str, file: str, offset: int) -> Document | Bad:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return Bad(file, offset, f"invalid UTF-8 at byte {offset + error.start}", excerpt(raw))
    if not text or text.isspace():
        return Bad(file, offset, "empty document")
    return Document(identity, name, text=text, file=file, offset=offset)
