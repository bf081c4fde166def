"""What a text is compared by, and the least of it that is kept."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

from megatron_r1.data.document import Document

STRETCH = 1 << 20
_SPACE = re.compile(r"\s")
_WORDS_AND_SPACE = re.compile(r"[\w\s]+")
MIN_CHARS = {"text": 200, "chat": 1}


def stretches(text: str, size: int = STRETCH) -> Iterator[str]:
    """The text in stretches of about `size` characters that end at white space, so that no word is cut: one document may be
    hundreds of megabytes, and a list of its words ten times that."""
    start = 0
    while start < len(text):
        space = _SPACE.search(text, start + size)
        end = space.end() if space else len(text)
        yield text[start:end]
        start = end


def content_key(document: Document) -> str:
    """Equal for documents that differ in white space only: 128 bits, hex."""
    digest, between = hashlib.sha256(), b""
    for part in stretches(document.content()):
        if words := part.split():
            digest.update(between + " ".join(words).encode("utf-8"))
            between = b" "
    return digest.hexdigest()[:32]


def group_of(document: Document, key: str | None = None) -> str:
    """The group that decides the split: the document's own, or one that equal texts share in every source."""
    return document.group or f"text:{key or content_key(document)}"


def repeated_lines(text: str) -> float:
    """Share of the characters that stand in lines which came before in the same text; empty lines do not count."""
    seen: set[str] = set()
    again = total = 0
    for line in text.split("\n"):
        if line := line.strip():
            total += len(line)
            if line in seen:
                again += len(line)
            seen.add(line)
    return again / max(1, total)


def symbols(text: str) -> float:
    """Share of the characters that are neither letters, digits, underscores nor white space."""
    return len(_WORDS_AND_SPACE.sub("", text)) / max(1, len(text))
