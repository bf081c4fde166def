"""A ShardSet: the tokens of every source and split, their documents, and the tokenizer they were made with.

    tokenizer/                          tokenizer.json or *.model, tokenizer_info.json
    sources.json                        what is in it, what is missing and why
    sources/<name>/<split>.bin .idx     Megatron's indexed dataset (stock megatron.core reads it)
    sources/<name>/<split>.docs.parquet id, group, n_tokens, n_bytes, file, offset of every document (data/documents.py)
    sources/<name>/<split>.mask         conversations only: 1 byte per token, 1 = learn to predict it
    sources/<name>/<split>.*.crc        CRC-32 of every MiB of each of these
    quarantine/<name>.jsonl             bad input with file, byte offset and reason
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict, Field, ValidationError, field_validator

from megatron_r1.artifacts.base import Artifact
from megatron_r1.config.base import Frozen
from megatron_r1.data.documents import Column, Documents, DocumentsWriter
from megatron_r1.data.indexed import AGAIN, BlockReader, Index, IndexedWriter, crc_path, suffixed, token_dtype
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.utils.errors import ArtifactError, DataError, R1Error
from megatron_r1.utils.io import read_json

SPLITS = ("train", "probe", "test", "control")
Domain = Literal["code", "math", "knowledge", "web", "chat", "science", "noise"]
Format = Literal["text", "chat"]
SOURCES_FILE = "sources.json"
SUFFIXES = (".bin", ".idx", ".docs.parquet", ".mask")
NO_SUMS = -1
REMAKE = "make these files again, or restore them"
SCHEMA_VERSION = 2
"""Of sources.json and the files it describes. 1: checksums of whole files for .idx and docs.parquet, no origin of documents."""


class SplitRecord(Frozen):
    """One split of one source."""

    documents: int = Field(ge=0, description="documents")
    tokens: int = Field(ge=0, description="tokens, end-of-text tokens included")
    bytes: int = Field(ge=0, description="UTF-8 bytes of the text the tokens stand for (what bits per byte divide by)")
    files: dict[str, tuple[int, int]] = Field(default_factory=dict, description="suffix -> [bytes, CRC-32 of its .crc file, which has the CRC-32 of every block; -1: no such file]")


class SourceRecord(Frozen):
    """One source of a ShardSet."""

    name: str = Field(description="source name")
    domain: Domain = Field(description="kind of content")
    distractor: bool = Field(False, description="planted noise, labelled for the report only: no stage may use this to choose data")
    format: Format = Field("text", description="plain text, or conversations with a loss mask")
    origin: dict[str, Any] = Field(default_factory=dict, description="where it came from: files or package with version and checksum")
    splits: dict[str, SplitRecord] = Field(description="split -> counts")
    dropped: dict[str, int] = Field(default_factory=dict, description="filter -> documents it dropped")
    quarantined: int = Field(0, description="bad inputs set aside in quarantine/<name>.jsonl")

    @property
    def tokens(self) -> int:
        """Training tokens."""
        return self.splits["train"].tokens if "train" in self.splits else 0


def describe(prefix: Path, bytes: int, fix: str = AGAIN) -> SplitRecord:
    """The record of the files of a split that lie on disk, with their checksums where there are any. bytes: UTF-8 bytes of the text."""
    files = {}
    for suffix in SUFFIXES:
        path = suffixed(prefix, suffix)
        if path.is_file():
            files[suffix] = [path.stat().st_size, zlib.crc32(crc_path(path).read_bytes()) if crc_path(path).is_file() else NO_SUMS]
    index = Index(suffixed(prefix, ".idx"), fix=fix)
    return SplitRecord(documents=index.documents, tokens=index.tokens, bytes=bytes, files=files)


def prefix_of(path: Path) -> Path:
    """The prefix of a dataset that may be named by one of its files."""
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


class TokenizerReference(Frozen):
    """The tokenizer a ShardSet was made with, and what its makers noted about it."""

    model_config = ConfigDict(extra="allow")

    sha256: str = Field(description="hex SHA-256 of its file")
    vocab_size: int | None = Field(None, description="largest id + 1")


class Contents(Frozen):
    """sources.json. Keys of later releases of this format are left alone."""

    model_config = ConfigDict(extra="ignore")

    schema_version: int = Field(SCHEMA_VERSION, description="format of this record and the files it describes; another one is refused: make the shards again")
    tokenizer: TokenizerReference | None = Field(None, description="the tokenizer the shards were made with")
    sources: dict[str, SourceRecord] = Field(description="source -> what it holds, in the order of the recipe")
    missing: list[dict[str, str]] = Field(default_factory=list, description="corpora that could not be had: name, reason, fix")
    control_groups: list[str] = Field(default_factory=list, description="groups kept out of everything but the split control")
    decontaminated: list[dict[str, Any]] = Field(default_factory=list, description="evaluation sets whose items were removed: how many, and how many of them are too short to be found (shorter_than_ngram)")

    @field_validator("sources")
    @classmethod
    def _names_are_folders(cls, sources: dict[str, SourceRecord]) -> dict[str, SourceRecord]:
        for name in sources:
            if not name or len(name.encode("utf-8", "replace")) > 200 or name.startswith(".") or any(char in "/\\" or not char.isprintable() for char in name):
                raise ValueError(f"{name[:200]!r} is no name for a source's folder")
        return sources


class Shard:
    """One split of one source, mapped: opening looks at sizes and at the ends of the index, the rest is read where it is used.

    A shard without documents is fine. Raises DataError when files are missing, of another size or not what the record says.
    """

    def __init__(self, prefix: Path, record: SplitRecord, label: str = "", fix: str = AGAIN) -> None:
        self.prefix, self.record, self.label, self.fix = prefix, record, label or prefix.name, fix
        self.index: Index | None = None
        self.dtype = np.dtype(np.uint16)
        self._readers: dict[str, BlockReader] = {}
        if not record.documents:
            return
        for suffix in SUFFIXES:
            if suffix in record.files or suffix in (".bin", ".idx"):
                size, crc = record.files.get(suffix, (None, 0))
                self._readers[suffix] = BlockReader(suffixed(prefix, suffix), size, crc != NO_SUMS, crc, fix)
        self.index = Index(self._readers[".idx"])
        self.dtype = self.index.dtype
        found = (len(self.index), self.index.tokens)
        if found != (record.documents, record.tokens):
            raise DataError(
                expected=f"{record.documents} documents with {record.tokens} tokens in {self.index.path}", found=f"{found[0]} documents with {found[1]} tokens", fix=fix,
            )
        for suffix, width in ((".bin", self.dtype.itemsize), (".mask", 1)):
            if suffix in self._readers and self._readers[suffix].size != record.tokens * width:
                raise DataError(
                    expected=f"{suffixed(prefix, suffix)} with {record.tokens * width} bytes for {record.tokens} tokens", found=f"{self._readers[suffix].size} bytes", fix=fix
                )

    @classmethod
    def at(cls, prefix: Path | str, label: str = "") -> Shard:
        """The dataset `<prefix>.bin`, `.idx`, of this project or of Megatron, with the sidecar and checksums that lie beside it.

        Raises DataError when damaged; without checksums, only what contradicts itself is damaged.
        """
        prefix = prefix_of(Path(prefix))
        record = describe(prefix, 0, REMAKE)
        shard = cls(prefix, record, label, REMAKE)
        if ".docs.parquet" in record.files:
            shard.record = record.model_copy(update={"bytes": int(shard.document_bytes.sum())})
        return shard

    @property
    def checked(self) -> bool:
        """Whether every file has checksums."""
        return all(reader.checked for reader in self._readers.values())

    @property
    def masked(self) -> bool:
        """Whether there is a loss mask."""
        return ".mask" in self.record.files

    @property
    def documented(self) -> bool:
        """Whether there is a docs.parquet."""
        return ".docs.parquet" in self.record.files

    def __len__(self) -> int:
        """Documents."""
        return self.record.documents

    @property
    def n_tokens(self) -> int:
        """Tokens of all documents."""
        return self.record.tokens

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of the text of all documents."""
        return self.record.bytes

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every document: int32[documents], mapped."""
        return np.zeros(0, np.int32) if self.index is None else self.index.lengths

    @cached_property
    def offsets(self) -> np.ndarray:
        """First token of every document, and the end: int64[documents + 1], in memory. `edges` and `find` need none."""
        return self.edges(0, len(self))

    def edges(self, first: int, last: int) -> np.ndarray:
        """First token of documents first ... last - 1, and the end of the last: int64[last - first + 1]."""
        return np.zeros(1, np.int64) if self.index is None else self.index.edges(first, last)

    def find(self, token: int) -> int:
        """The document that token number `token` of the shard belongs to. O(log documents), next to no memory."""
        if self.index is None:
            raise DataError(expected=f"a token of {self.label}", found=f"{token} of none", fix="look only into shards with documents")
        return self.index.find(token)

    def tokens(self, i: int) -> np.ndarray:
        """Tokens of document i: [n_tokens(i)], the dtype of the shard. Raises DataError when the file is damaged."""
        start, end = self.edges(int(i), int(i) + 1).tolist()
        return self.read(start, end - start)

    def mask(self, i: int) -> np.ndarray | None:
        """Loss mask of document i, uint8[n_tokens(i)], or None for plain text."""
        if ".mask" not in self._readers:
            return None
        start, end = self.edges(int(i), int(i) + 1).tolist()
        return self.read_mask(start, end - start)

    def read(self, start: int, n: int) -> np.ndarray:
        """Tokens [n] from position `start` of all documents end to end."""
        if n == 0:
            return np.zeros(0, self.dtype)
        if self.index is None:
            raise DataError(expected=f"a range inside the 0 tokens of {self.label}", found=f"tokens {start} to {start + n}", fix="look only into shards with documents")
        width = self.dtype.itemsize
        return self._readers[".bin"].bytes(start * width, (start + n) * width).view(self.dtype)

    def windows(self, starts: np.ndarray, n: int) -> np.ndarray:
        """Tokens [k, n] from positions `starts` int[k]: `read` for many at once, copied."""
        return self._readers[".bin"].windows(starts, n, self.dtype)

    def read_mask(self, start: int, n: int) -> np.ndarray:
        """Loss mask uint8[n] from position `start` of all documents end to end. Only of a shard that is `masked`."""
        return self._readers[".mask"].bytes(start, start + n) if n else np.zeros(0, np.uint8)

    def damaged(self) -> list[R1Error]:
        """Check every block of every file, and that they agree: one error for each damaged file."""
        checks = [reader.verify for reader in self._readers.values()]
        found = _errors(checks)
        # What contradicts itself although every block is as it was written.
        return found or _errors([self.index.verify, *([self.documents.verify] if self.documented else [])] if self.index is not None else [])

    def verify(self) -> None:
        """Check every block of every file now. Raises DataError naming the first damaged one."""
        for error in self.damaged():
            raise error

    @cached_property
    def documents(self) -> Documents:
        """The rows of docs.parquet. Raises DataError when there is none."""
        if ".docs.parquet" not in self._readers:
            raise DataError(expected=f"a file {suffixed(self.prefix, '.docs.parquet')}", found="none: the shard has no documents, or no sidecar", fix="ask for documents by number")
        return Documents(self._readers[".docs.parquet"], self.record.documents)

    def _column(self, name: str) -> Column | list[Any]:
        return self.documents.column(name) if self.record.documents else []

    @cached_property
    def ids(self) -> Sequence[str]:
        """Document ids, in order, read where they are looked at."""
        return self._column("id")

    @cached_property
    def groups(self) -> Sequence[str]:
        """Document groups, in order, read where they are looked at."""
        return self._column("group")

    @property
    def document_bytes(self) -> np.ndarray:
        """UTF-8 bytes of the text of each document, int64[documents]."""
        return self.documents.column("n_bytes").numbers() if self.record.documents else np.zeros(0, np.int64)


def _errors(checks: Iterable[Callable[[], None]]) -> list[R1Error]:
    found = []
    for check in checks:
        try:
            check()
        except R1Error as error:
            found.append(error)
    return found


class ShardWriter:
    """Writes one split of one source under `prefix`; nothing is readable until `close` returned its record.

    Memory does not grow with what is written. tokenizer: SHA-256 of the tokenizer the ids are of.
    """

    def __init__(self, prefix: Path, vocab_size: int, masked: bool = False, tokenizer: str = "") -> None:
        self.prefix = Path(prefix)
        self._writer = IndexedWriter(self.prefix, token_dtype(vocab_size), masked)
        try:
            self._documents = DocumentsWriter(suffixed(self.prefix, ".docs.parquet"), tokenizer)
        except BaseException:
            self._writer.abandon()
            raise

    def add(
        self, tokens: Sequence[int] | np.ndarray, n_bytes: int, id: str, group: str = "", mask: Sequence[int] | np.ndarray | None = None,
        file: str = "", offset: int = -1,
    ) -> None:
        """Append one document: its tokens, the UTF-8 bytes of its text, its id (unique within the source) and group.

        file, offset: where it came from; the offset is that of its first byte, decompressed (of Parquet: its row), -1 if unknown.
        """
        self._writer.add(np.asarray(tokens), None if mask is None else np.asarray(mask))
        self._documents.add(id, group, len(tokens), n_bytes, file, offset)

    @property
    def tokens(self) -> int:
        """Tokens so far."""
        return self._writer.tokens

    def close(self) -> SplitRecord:
        """Finish the files and describe them."""
        self._documents.close()
        self._writer.close()
        return describe(self.prefix, self._documents.bytes)

    def abandon(self) -> None:
        """Stop: what was written stays recognisably incomplete."""
        self._documents.abandon()
        self._writer.abandon()


class ShardSet:
    """A shards artifact, opened.

    sources: name -> SourceRecord, in the order of the recipe; missing: [{"name", "reason"}] of corpora that could not be had.
    """

    def __init__(self, path: Path) -> None:
        self.path, file = path, path / SOURCES_FILE
        content = read_json(file)
        version = content.get("schema_version", SCHEMA_VERSION) if isinstance(content, dict) else SCHEMA_VERSION
        if version != SCHEMA_VERSION:
            raise ArtifactError(expected=f"shards of format {SCHEMA_VERSION} in {file}", found=f"format {str(version)[:20]}, of another release", fix=AGAIN)
        try:
            self.contents = Contents.model_validate(content)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise ArtifactError(
                expected=f"the sources of a ShardSet in {file}", found=f"ValidationError: {'.'.join(map(str, first['loc']))[:200]}: {first['msg'][:400]}", fix=AGAIN
            ) from error
        self.sources, self.missing, self.control_groups = dict(self.contents.sources), self.contents.missing, self.contents.control_groups
        self._shards: dict[tuple[str, str], Shard] = {}

    @classmethod
    def open(cls, artifact: Artifact | Path | str) -> ShardSet:
        """Open a shards artifact (or its folder). Raises ArtifactError or DataError."""
        if isinstance(artifact, Artifact):
            if artifact.kind != "shards":
                raise ArtifactError(expected="a shards artifact", found=f"{artifact.path.name} of kind {artifact.kind}", fix="point this input at a corpus step")
            path = artifact.path
        else:
            path = Path(artifact)
        shards = cls(path)
        found, wanted = shards.tokenizer.sha256, shards.contents.tokenizer
        if wanted is not None and found != wanted.sha256:
            raise DataError(
                expected=f"the tokenizer these shards were made with (SHA-256 {wanted.sha256[:16]}...) in {path / 'tokenizer'}", found=f"SHA-256 {found[:16]}...",
                fix="restore the tokenizer folder, or " + AGAIN,
            )
        return shards

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer the shards were made with."""
        return Tokenizer.load(self.path / "tokenizer")

    def require_tokenizer(self, sha256: str, who: str) -> None:
        """Raise DataError unless `who` (a checkpoint, a teacher) uses the tokenizer of these shards."""
        if sha256 != self.tokenizer.sha256:
            raise DataError(
                expected=f"{who} to use the tokenizer of the shards (SHA-256 {self.tokenizer.sha256[:16]}...)", found=f"SHA-256 {sha256[:16]}...",
                fix="make the shards with that tokenizer (inputs.tokenizer of the corpus step), or use a model trained on these shards",
            )

    def split(self, source: str, split: str = "train") -> Shard:
        """The documents of one split of one source; an empty Shard when it has none. Raises DataError for unknown names."""
        if source not in self.sources or split not in SPLITS:
            raise DataError(
                expected=f"a source among {', '.join(self.sources)} and a split among {', '.join(SPLITS)}", found=f"{source!r}, {split!r}",
                fix="correct the name, or use the shards that hold it",
            )
        if (source, split) not in self._shards:
            record = self.sources[source].splits.get(split) or SplitRecord(documents=0, tokens=0, bytes=0)
            self._shards[source, split] = Shard(self.path / "sources" / source / split, record, f"{source}/{split}")
        return self._shards[source, split]


def find_document(shards: Mapping[tuple[str, str], Shard], where: str | None, id: str | None = None) -> Iterator[tuple[tuple[str, str], Shard, int]]:
    """Documents by place ("SOURCE:SPLIT:NUMBER", or "NUMBER" when there is one shard) or by id: (source, split), shard, number.

    Ids are looked for through all the shards, a row group at a time. Raises DataError when there is no such document.
    """
    if where is not None:
        name, _, number = where.rpartition(":")
        key = next((key for key in shards if name == ":".join(key) or (not name and len(shards) == 1)), None)
        if key is None or not number.isdecimal():
            raise DataError(expected="SOURCE:SPLIT:NUMBER, such as web_wiki:train:0 (of a .bin/.idx only NUMBER)", found=repr(where), fix="correct --document")
        if int(number) >= len(shards[key]):
            raise DataError(expected=f"a document number below {len(shards[key])}", found=number, fix="correct --document")
        yield key, shards[key], int(number)
        return
    found = False
    for key, shard in shards.items():
        for number, identity in enumerate(shard.ids):
            if identity == id:
                found = True
                yield key, shard, number
    if not found:
        raise DataError(expected=f"a document of id {id!r}", found=f"none in {len(shards)} splits", fix="correct --id (ids are unique within a source, and written as the sidecar has them)")
