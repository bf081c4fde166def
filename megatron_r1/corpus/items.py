"""What readers yield: a document, or input that is none, and where the next one begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_r1.data.document import Document

EXCERPT = 200


@dataclass(frozen=True)
class Bad:
    """Input that is no document: where it is and why."""

    file: str
    offset: int
    """Byte of the decompressed file, or row of a Parquet file."""
    reason: str
    excerpt: str = ""

    def record(self) -> dict[str, Any]:
        """As a line of the quarantine."""
        return {"file": self.file, "offset": self.offset, "reason": self.reason, "excerpt": self.excerpt}


Item = tuple[Document | Bad, int, int]
"""(what was made, bytes of content it took, position behind it)."""


def excerpt(raw: bytes) -> str:
    """The beginning of bad input, for people."""
    return raw[:EXCERPT].decode("utf-8", errors="replace")
