"""Your own files as documents: JSON lines, plain text, Parquet. Bad input is reported, never raised.

Files are read line by line; offsets count bytes of the (decompressed) file. A line may be as long as memory allows.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import json
import lzma
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import IO, Any

from megatron_r1.corpus.config import SourceConfig
from megatron_r1.data.document import Document, problem
from megatron_r1.utils.errors import DataError

OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
ENDINGS = {"jsonl": (".jsonl", ".json", ".ndjson"), "text": (".txt", ".text", ".md", ".rst", ".py"), "parquet": (".parquet",)}
EXCERPT = 200


@dataclass(frozen=True)
class Bad:
    """Input that is no document: where it is and why."""

    file: str
    offset: int
    position: int
    """Line (jsonl, text: from 1) or row (parquet: from 0)."""
    reason: str
    excerpt: str = ""

    def record(self) -> dict[str, Any]:
        """As a line of the quarantine."""
        return {"file": self.file, "offset": self.offset, "position": self.position, "reason": self.reason, "excerpt": self.excerpt}


def find_files(name: str, source: SourceConfig) -> list[Path]:
    """The files of a source, sorted. Raises DataError when there are none."""
    pattern = os.path.expandvars(os.path.expanduser(source.path or ""))
    path = Path(pattern)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and Path(p.name.removesuffix(p.suffix) if p.suffix in OPENERS else p.name).suffix in ENDINGS[source.kind])
    else:
        files = [path] if path.is_file() else sorted(Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file())
    if not files:
        endings = ", ".join(ENDINGS[source.kind])
        raise DataError(expected=f"files of source {name!r} at {source.path}", found="none", fix=f"correct sources.{name}.path (a folder is searched for {endings})")
    return files


def read(name: str, source: SourceConfig, files: list[Path]) -> Iterator[tuple[Document | Bad, int]]:
    """Documents and bad input of a source in order, each with the bytes of input it took."""
    reader = {"jsonl": _jsonl, "text": _text, "parquet": _parquet}[source.kind]
    names = _short_names(files)
    for path in files:
        yield from reader(name, source, path, names[path])


def _short_names(files: list[Path]) -> dict[Path, str]:
    """File names for ids and the quarantine: relative to what all files share, so that ids do not depend on the machine."""
    if len(files) == 1:
        return {files[0]: files[0].name}
    root = Path(os.path.commonpath([path.parent for path in files]))
    return {path: path.relative_to(root).as_posix() for path in files}


def _open(path: Path) -> IO[bytes]:
    return OPENERS.get(path.suffix, open)(path, "rb")  # type: ignore[operator]


def _excerpt(line: bytes) -> str:
    return line[:EXCERPT].decode("utf-8", errors="replace")


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(byte offset, line number from 1, line without its end)."""
    offset = 0
    with _open(path) as stream:
        for number, line in enumerate(stream, 1):
            yield offset, number, line.rstrip(b"\r\n")
            offset += len(line)


def _jsonl(name: str, source: SourceConfig, path: Path, file: str) -> Iterator[tuple[Document | Bad, int]]:
    for offset, number, line in _lines(path):
        if not line.strip():
            continue
        size = len(line) + 1

        def bad(reason: str, offset: int = offset, number: int = number, line: bytes = line) -> Bad:
            return Bad(file, offset, number, reason, _excerpt(line))

        try:
            fields = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield bad(f"invalid UTF-8 at byte {offset + error.start}"), size
            continue
        except json.JSONDecodeError as error:
            yield bad(f"invalid JSON: {error.msg} at character {error.pos}"), size
            continue
        except RecursionError:
            yield bad("invalid JSON: nested too deeply"), size
            continue
        if not isinstance(fields, dict):
            yield bad(f"a JSON {type(fields).__name__}, not an object"), size
            continue
        made = _document(name, source, fields, f"{file}:{number}")
        yield (bad(made) if isinstance(made, str) else made), size


def _filled(template: str, fields: dict[str, Any]) -> tuple[str, str]:
    """(text, reason it can not be made)."""
    for _, field, _, _ in Formatter().parse(template):
        key = (field or "").split(".")[0].split("[")[0]
        if key and fields.get(key) is None:
            return "", f"field {key!r} is missing"
    try:
        return template.format_map(fields), ""
    except (KeyError, IndexError, AttributeError, ValueError, TypeError) as error:
        return "", f"the template does not fit: {type(error).__name__}: {error}"


def _document(name: str, source: SourceConfig, fields: dict[str, Any], default_id: str) -> Document | str:
    """A document, or why there is none."""
    identity, group = default_id, ""
    for field in (source.id_field, source.group_field):
        if field is not None and fields.get(field) is None:
            return f"field {field!r} is missing"
    if source.id_field is not None:
        identity = str(fields[source.id_field])
    if source.group_field is not None:
        group = f"{source.group_field}:{fields[source.group_field]}"
    if source.format == "chat":
        if source.prompt_template is not None and source.response_template is not None:
            messages = []
            for role, template in (("user", source.prompt_template), ("assistant", source.response_template)):
                content, reason = _filled(template, fields)
                if reason:
                    return reason
                messages.append({"role": role, "content": content})
        elif source.messages_field not in fields:
            return f"field {source.messages_field!r} is missing"
        else:
            messages = fields[source.messages_field]
        reason = problem(messages) or ""
        if reason:
            return reason
        kept = tuple({"role": message["role"], "content": _storable(message["content"])} for message in messages)
        return Document(identity, name, messages=kept, group=group)
    if source.template is not None:
        text, reason = _filled(source.template, fields)
        if reason:
            return reason
    else:
        if source.text_field not in fields:
            return f"field {source.text_field!r} is missing"
        text = fields[source.text_field]
        if not isinstance(text, str):
            return f"field {source.text_field!r} is a {type(text).__name__}, not text"
    if not text.strip():
        return "empty document"
    return Document(identity, name, text=_storable(text), group=group)


def _storable(text: str) -> str:
    """JSON may spell half of a surrogate pair, which UTF-8 cannot hold."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-8", errors="replace").decode("utf-8")


def _text(name: str, source: SourceConfig, path: Path, file: str) -> Iterator[tuple[Document | Bad, int]]:
    if source.document == "file":
        with _open(path) as stream:
            raw = stream.read()
        yield _decoded(name, raw, file, file, 0, 1), len(raw)
        return
    block: list[bytes] = []
    start, first = 0, 1
    for offset, number, line in _lines(path):
        if source.document == "line":
            if line.strip():
                yield _decoded(name, line, f"{file}:{number}", file, offset, number), len(line) + 1
            continue
        if not block:
            start, first = offset, number
        if line.strip():
            block.append(line)
        elif block:
            raw = b"\n".join(block)
            yield _decoded(name, raw, f"{file}:{first}", file, start, first), len(raw) + 1
            block = []
    if block:
        raw = b"\n".join(block)
        yield _decoded(name, raw, f"{file}:{first}", file, start, first), len(raw) + 1


def _decoded(name: str, raw: bytes, identity: str, file: str, offset: int, position: int) -> Document | Bad:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return Bad(file, offset, position, f"invalid UTF-8 at byte {offset + error.start}", _excerpt(raw))
    if not text.strip():
        return Bad(file, offset, position, "empty document")
    return Document(identity, name, text=text)


def _parquet(name: str, source: SourceConfig, path: Path, file: str) -> Iterator[tuple[Document | Bad, int]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(expected=f"a Parquet file at {path}", found=str(error).split("\n")[0], fix=f"write it again, or take it out of sources.{name}.path") from error
    wanted = {source.id_field, source.group_field}
    templates = [t for t in (source.template, source.prompt_template, source.response_template) if t is not None]
    for template in templates:
        wanted |= {(field or "").split(".")[0].split("[")[0] for _, field, _, _ in Formatter().parse(template)}
    if not templates:
        wanted.add(source.messages_field if source.format == "chat" else source.text_field)
    columns = [column for column in table.schema_arrow.names if column in wanted]
    position = 0
    for batch in table.iter_batches(batch_size=1024, columns=columns):
        size = batch.nbytes // max(1, batch.num_rows)
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError:
            rows = [_row(batch, i) for i in range(batch.num_rows)]
        for row in rows:
            made: Document | str = "invalid UTF-8" if row is None else _document(name, source, row, f"{file}:{position}")
            yield (Bad(file, position, position, made) if isinstance(made, str) else made), size
            position += 1


def _row(batch: Any, i: int) -> dict[str, Any] | None:
    try:
        return batch.slice(i, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return None
