"""Which documents are kept, and a count for every reason one is not."""

from __future__ import annotations

import hashlib
from collections import Counter

from megatron_r1.data.document import Document

MIN_CHARS = {"text": 200, "chat": 1}


def content_key(document: Document) -> str:
    """Equal for documents that differ in white space only: 128 bits, hex."""
    return hashlib.sha256(" ".join(document.content().split()).encode("utf-8")).hexdigest()[:32]


def group_of(document: Document, key: str | None = None) -> str:
    """The group that decides the split: the document's own, or one that equal texts share in every source."""
    return document.group or f"text:{key or content_key(document)}"


class Filters:
    """Length, then exact duplicates within the source; `dropped` counts both, and what other rules report."""

    def __init__(self, min_chars: int, deduplicate: bool) -> None:
        self.min_chars, self.deduplicate = min_chars, deduplicate
        self.dropped: Counter[str] = Counter()
        self._seen: set[str] = set()

    def keep(self, document: Document, key: str) -> bool:
        """Whether the document stays; `key` is its content_key."""
        if len(document.content()) < self.min_chars:
            self.dropped["short"] += 1
            return False
        if self.deduplicate:
            if key in self._seen:
                self.dropped["duplicate"] += 1
                return False
            self._seen.add(key)
        return True
