"""A ShardSet: the tokens of every source and split, their documents, and the tokenizer they were made with.

    tokenizer/                          tokenizer.json or *.model, tokenizer_info.json
    sources.json                        what is in it, what is missing and why
    sources/<name>/<split>.bin .idx     Megatron's indexed dataset (stock megatron.core reads it)
    sources/<name>/<split>.docs.parquet id, group, n_tokens, n_bytes of every document
    sources/<name>/<split>.mask         conversations only: 1 byte per token, 1 = learn to predict it
    sources/<name>/<split>.*.crc        CRC-32 of every MiB
    quarantine/<name>.jsonl             bad input with file, byte offset and reason
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from megatron_r1.artifacts.base import Artifact
from megatron_r1.config.base import Frozen
from megatron_r1.data.indexed import AGAIN, BlockReader, IndexedWriter, read_index, suffixed, token_dtype
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.utils.errors import ArtifactError, DataError
from megatron_r1.utils.io import disk_errors, read_json

SPLITS = ("train", "probe", "test", "control")
DOMAINS = ("code", "math", "knowledge", "web", "chat", "science", "noise")
Domain = Literal["code", "math", "knowledge", "web", "chat", "science", "noise"]
Format = Literal["text", "chat"]
SOURCES_FILE = "sources.json"


class SplitRecord(Frozen):
    """One split of one source."""

    documents: int = Field(description="documents")
    tokens: int = Field(description="tokens, end-of-text tokens included")
    bytes: int = Field(description="UTF-8 bytes of the text the tokens stand for (what bits per byte divide by)")
    files: dict[str, list[int]] = Field(default_factory=dict, description="suffix -> [bytes, CRC-32 of the whole file, or -1 where a .crc file has it by block]")


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


class Shard:
    """One split of one source, memory-mapped. A shard without documents is fine.

    lengths, offsets: int64[documents], int64[documents + 1], in tokens.
    """

    def __init__(self, prefix: Path, record: SplitRecord, label: str = "") -> None:
        self.prefix, self.record, self.label = prefix, record, label or prefix.name
        self.lengths: np.ndarray = np.zeros(0, np.int64)
        self.dtype = np.dtype(np.uint16)
        self._bin: BlockReader | None = None
        self._mask: BlockReader | None = None
        if record.documents:
            self._small_file(".idx")
            self._small_file(".docs.parquet")
            self.lengths, self.dtype = read_index(suffixed(prefix, ".idx"))
            found = (len(self.lengths), int(self.lengths.sum()))
            if found != (record.documents, record.tokens):
                raise DataError(
                    expected=f"{record.documents} documents with {record.tokens} tokens in {suffixed(prefix, '.idx')}",
                    found=f"{found[0]} documents with {found[1]} tokens", fix=AGAIN,
                )
            self._bin = BlockReader(suffixed(prefix, ".bin"), record.tokens * self.dtype.itemsize)
            if ".mask" in record.files:
                self._mask = BlockReader(suffixed(prefix, ".mask"), record.tokens)
        self.offsets: np.ndarray = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths)])

    def _small_file(self, suffix: str) -> None:
        path = suffixed(self.prefix, suffix)
        size, crc = self.record.files.get(suffix, [-1, -1])
        content = path.read_bytes() if path.is_file() else None
        if content is None or len(content) != size:
            raise DataError(expected=f"{path} with {size} bytes", found="no such file" if content is None else f"{len(content)} bytes", fix=AGAIN)
        if zlib.crc32(content) != crc:
            raise DataError(expected=f"CRC-32 {crc:08x} of {path}", found=f"{zlib.crc32(content):08x}: the file was changed after it was written", fix=AGAIN)

    def __len__(self) -> int:
        """Documents."""
        return len(self.lengths)

    @property
    def n_tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.offsets[-1])

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of the text of all documents."""
        return self.record.bytes

    def tokens(self, i: int) -> np.ndarray:
        """Tokens of document i: [n_tokens(i)], the dtype of the shard. Raises DataError when the file is damaged."""
        return self.read(int(self.offsets[i]), int(self.lengths[i]))

    def mask(self, i: int) -> np.ndarray | None:
        """Loss mask of document i, uint8[n_tokens(i)], or None for plain text."""
        if self._mask is None:
            return None
        return self._mask.bytes(int(self.offsets[i]), int(self.offsets[i + 1]))

    def read(self, start: int, n: int) -> np.ndarray:
        """Tokens [n] from position `start` of all documents end to end."""
        if self._bin is None or n == 0:
            return np.zeros(0, self.dtype)
        width = self.dtype.itemsize
        return self._bin.bytes(start * width, (start + n) * width).view(self.dtype)

    def verify(self) -> None:
        """Check every block of every file now. Raises DataError naming the first damaged one."""
        for reader in (self._bin, self._mask):
            if reader is not None:
                reader.verify()

    @cached_property
    def _docs(self) -> dict[str, list[Any]]:
        if not self.record.documents:
            return {"id": [], "group": [], "n_tokens": [], "n_bytes": []}
        import pyarrow.parquet as pq

        return pq.read_table(suffixed(self.prefix, ".docs.parquet")).to_pydict()

    @property
    def ids(self) -> list[str]:
        """Document ids, in order."""
        return self._docs["id"]

    @property
    def groups(self) -> list[str]:
        """Document groups, in order."""
        return self._docs["group"]

    @property
    def document_bytes(self) -> np.ndarray:
        """UTF-8 bytes of the text of each document, int64[documents]."""
        return np.asarray(self._docs["n_bytes"], np.int64)


class ShardWriter:
    """Writes one split of one source under `prefix`; nothing is readable until `close` returned its record."""

    def __init__(self, prefix: Path, vocab_size: int, masked: bool = False) -> None:
        self.prefix = Path(prefix)
        self._writer = IndexedWriter(self.prefix, token_dtype(vocab_size), masked)
        self._masked = masked
        self._ids: list[str] = []
        self._groups: list[str] = []
        self._bytes: list[int] = []

    def add(self, tokens: Sequence[int] | np.ndarray, n_bytes: int, id: str, group: str = "", mask: Sequence[int] | np.ndarray | None = None) -> None:
        """Append one document: its tokens, the UTF-8 bytes of its text, its id (unique within the source) and group."""
        self._writer.add(np.asarray(tokens), None if mask is None else np.asarray(mask))
        self._ids.append(id)
        self._groups.append(group)
        self._bytes.append(n_bytes)

    @property
    def tokens(self) -> int:
        """Tokens so far."""
        return sum(self._writer.lengths)

    def close(self) -> SplitRecord:
        """Finish the files and describe them."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._writer.close()
        table = pa.table({
            "id": pa.array(self._ids, pa.string()), "group": pa.array(self._groups, pa.string()),
            "n_tokens": pa.array(self._writer.lengths, pa.int64()), "n_bytes": pa.array(self._bytes, pa.int64()),
        })
        path = suffixed(self.prefix, ".docs.parquet")
        with disk_errors(path):
            pq.write_table(table, path, compression="zstd")
        files = {".bin": [suffixed(self.prefix, ".bin").stat().st_size, -1]}
        if self._masked:
            files[".mask"] = [suffixed(self.prefix, ".mask").stat().st_size, -1]
        for suffix in (".idx", ".docs.parquet"):
            content = suffixed(self.prefix, suffix).read_bytes()
            files[suffix] = [len(content), zlib.crc32(content)]
        return SplitRecord(documents=len(self._ids), tokens=sum(self._writer.lengths), bytes=sum(self._bytes), files=files)


class ShardSet:
    """A shards artifact, opened.

    sources: name -> SourceRecord, in the order of the recipe; missing: [{"name", "reason"}] of corpora that could not be had.
    """

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path, self.content = path, content
        self.sources: dict[str, SourceRecord] = {name: SourceRecord.model_validate(record) for name, record in content["sources"].items()}
        self.missing: list[dict[str, str]] = content.get("missing", [])
        self.control_groups: list[str] = content.get("control_groups", [])
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
        try:
            shards = cls(path, read_json(path / SOURCES_FILE))
        except (KeyError, TypeError, AttributeError, ValidationError) as error:
            raise ArtifactError(expected=f"the sources of a ShardSet in {path / SOURCES_FILE}", found=f"{type(error).__name__}: {error}", fix=AGAIN) from error
        found = shards.tokenizer.sha256
        wanted = shards.content.get("tokenizer", {}).get("sha256", found)
        if found != wanted:
            raise DataError(
                expected=f"the tokenizer these shards were made with (SHA-256 {wanted[:16]}...) in {path / 'tokenizer'}", found=f"SHA-256 {found[:16]}...",
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
