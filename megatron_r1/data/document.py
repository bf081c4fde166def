"""One document on its way from a raw file to a shard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}"""

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text or a conversation.

    id: unique within its source. group: documents of one group never straddle splits (a problem with all its solutions,
    a country, an article); empty means the document is its own group. Exactly one of `text` and `messages` is set.
    """

    id: str
    source: str
    text: str | None = None
    messages: tuple[Message, ...] | None = None
    group: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    file: str = ""
    offset: int = -1

    def content(self) -> str:
        """All text, for filters and tokenizer training."""
        if self.messages is not None:
            return "\n".join(message["content"] for message in self.messages)
        return self.text or ""


def problem(messages: Any) -> str | None:
    """Why `messages` is not a conversation, or None when it is one."""
    if not isinstance(messages, list) or not messages:
        return "messages is not a non-empty list"
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            return f"message {number} has no role among {', '.join(ROLES)}"
        if not isinstance(message.get("content"), str) or not message["content"].strip():
            return f"message {number} has no content"
    if not any(message["role"] == "assistant" for message in messages):
        return "no assistant message, so nothing to learn from"
    return None
