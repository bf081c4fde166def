"""WARC and WET files, through the libraries fastwarc and resiliparse: pages are reduced to their main text, WET records are text already.

Requests, metadata, and answers that are errors, images and the like are no documents and no bad input either: they are counted in the log.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from megatron_r1.corpus import streams
from megatron_r1.corpus.files import Stored
from megatron_r1.corpus.items import Bad, Item, excerpt
from megatron_r1.corpus.partitions import Partition
from megatron_r1.data.document import Document
from megatron_r1.utils.errors import EnvironmentProblem
from megatron_r1.utils.logging import get_logger

log = get_logger("corpus.warc")
NESTED = 2000
"""Elements inside each other beyond which a page is bad: extraction takes the square of it."""
END = 1 << 62
"""Position behind whatever can not be read."""
_TAG = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9]*)")
_NEVER_NESTED = frozenset(("area", "base", "br", "col", "dd", "dt", "embed", "hr", "img", "input", "li", "link", "meta", "option", "p", "param", "source", "tbody", "td", "th", "thead", "tr", "wbr"))
HTML = ("text/html", "application/xhtml+xml")


def items(partition: Partition, stream: Stored, suffix: str, resume: int | None) -> Iterator[Item]:
    """The documents of a file. A position is one byte behind the beginning of a record: that record is read again and left out.

    Raises EnvironmentProblem when the libraries are not installed.
    """
    library, file = _libraries(), partition.file
    if resume == END:
        return
    done = resume or 0
    begin = max(0, done - 1)
    content = _Content(streams.blocks(stream, suffix, begin))
    skipped: Counter[str] = Counter()
    offset, reason, block = begin, "", b""
    records = iter(library.Archive(content, record_types=library.Type.response | library.Type.conversion, parse_http=False, stream_detect=False))
    while True:
        try:
            record = next(records)
            offset = begin + record.stream_pos
            block = record.reader.read()
            if len(block) < record.content_length:
                reason = f"the record is cut off: {len(block)} of {record.content_length} bytes"
        except StopIteration:
            reason, block = "", b""
            break
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # malformed, by an exception or by a panic of the library's Rust, which is no Exception
            reason, block = f"behind the record that begins here stands something else: {error}", b""
        if reason:
            break
        if offset < done:
            continue
        made = _made(library, record, block, partition.source, file, offset)
        if made is None or isinstance(made, str):
            skipped[made or "without text"] += 1
            continue
        yield made, len(block), offset + 1
    if isinstance(content.problem, streams.DamagedInput):
        offset, reason = (offset, f"{content.problem}; {reason}") if reason else (begin + content.read_bytes, str(content.problem))
    elif content.problem is not None:
        raise content.problem
    if reason:
        yield Bad(file, offset, f"{reason}; what follows is lost", excerpt(block)), len(block), END
    if skipped:
        log.info("%s: %s", file, ", ".join(f"{count} records {reason}" for reason, count in skipped.most_common()))


def _libraries() -> Any:
    """What is used of the two libraries, under one name."""
    try:
        from fastwarc.warc import ArchiveIterator, WarcRecordType
        from resiliparse.extract.html2text import extract_plain_text
        from resiliparse.parse.encoding import bytes_to_str, detect_encoding
    except ImportError as error:
        raise EnvironmentProblem(
            expected="the packages fastwarc and resiliparse, for sources of kind warc", found=f"{type(error).__name__}: {error}", fix="pip install fastwarc resiliparse"
        ) from error
    return SimpleNamespace(Archive=ArchiveIterator, Type=WarcRecordType, extract=extract_plain_text, decode=bytes_to_str, detect=detect_encoding)


class _Content:
    """Decompressed content as a file. What goes wrong is kept for later: a library in between may make something else of an exception."""

    def __init__(self, content: Iterator[bytes]) -> None:
        self._content, self._left = content, b""
        self.read_bytes = 0
        self.problem: Exception | None = None

    def tell(self) -> int:
        """Bytes read."""
        return self.read_bytes

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes."""
        if not self._left and self.problem is None:
            try:
                self._left = next(self._content, b"")
            except Exception as problem:
                self.problem = problem
        size = len(self._left) if size < 0 else size
        block, self._left = self._left[:size], self._left[size:]
        self.read_bytes += len(block)
        return block


def _made(library: Any, record: Any, block: bytes, source: str, file: str, offset: int) -> Document | Bad | str | None:
    """A document, bad input, the reason a record is left out, or None when there is no text in it."""
    identity = (record.record_id or "").removeprefix("<").removesuffix(">").removeprefix("urn:uuid:") or f"{file}:{offset}"
    kind = "text/plain"
    if record.record_type == library.Type.response:
        if not record.is_http:
            return "that are no HTTP"
        record.set_bytes_content(block)
        try:
            record.parse_http(auto_decode="all")
            block = record.reader.read()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            return Bad(file, offset, f"a malformed HTTP response: {error}", excerpt(block))
        status = record.http_headers.status_code
        if status != 200:
            return f"with status {status}"
        kind = record.http_content_type or ""
        if kind not in (*HTML, "text/plain"):
            return f"of type {kind or 'unknown'}"
    if record.record_type == library.Type.conversion:
        try:
            text = block.decode("utf-8")
        except UnicodeDecodeError as error:
            return Bad(file, offset, f"invalid UTF-8 at byte {error.start} of the record", excerpt(block))
    else:
        text = library.decode(block, record.http_charset or library.detect(block))
    if kind in HTML:
        if _nested(text):
            return Bad(file, offset, f"HTML nested deeper than {NESTED} elements", excerpt(block))
        text = library.extract(text, main_content=True)
    if not text or text.isspace():
        return None
    return Document(identity, source, text=text, metadata={"url": record.headers.get("WARC-Target-URI") or ""}, file=file, offset=offset)


def _nested(html: str) -> bool:
    """Whether elements stand inside each other more than NESTED times, at a rough count."""
    if html.count("<") <= NESTED:
        return False
    depth = 0
    for closing, name in _TAG.findall(html):
        if name.lower() not in _NEVER_NESTED:
            depth = max(0, depth - 1) if closing else depth + 1
            if depth > NESTED:
                return True
    return False
