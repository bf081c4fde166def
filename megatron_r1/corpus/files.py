"""Input files, here or elsewhere: found, described, opened. Anything with `://` goes through fsspec (s3://, hf://, https://, memory://).

A file is described once, when the work is planned; whoever reads it later compares, so that bytes of two versions never mix.
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
import posixpath
import re
import stat
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import parent_process
from pathlib import Path
from typing import IO, Any, TypeVar

from pydantic import Field

from megatron_r1.config.base import Frozen
from megatron_r1.corpus.config import SourceConfig
from megatron_r1.utils.errors import DataError, EnvironmentProblem, R1Error
from megatron_r1.utils.logging import get_logger

log = get_logger("corpus.files")
T = TypeVar("T")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zstd")
ENDINGS = {"jsonl": (".jsonl", ".json", ".ndjson"), "text": (".txt", ".text", ".md", ".rst", ".py"), "parquet": (".parquet",), "warc": (".warc", ".wet")}
BLOCK = 1 << 20
WAITS = (1.0, 5.0, 20.0)
"""Seconds before a read that failed is tried again."""
VERSIONS = ("ETag", "etag", "oid", "blob_id", "sha256", "md5Hash", "generation")
"""What file systems call that which changes when a file does; the first they know is taken, or else a time."""
TIMES = ("LastModified", "last_modified", "mtime", "modified", "created")


class InputFile(Frozen):
    """One input file as it was when the work was planned."""

    name: str = Field(description="name in ids and records: relative to what all files of the source share, so that it does not depend on the machine")
    path: str = Field(description="path on this machine, or URL")
    size: int = Field(description="bytes as stored")
    stamp: str = Field(description="modification time (ns) or what the store calls the version")

    @property
    def suffix(self) -> str:
        """The ending that says how the file is compressed; empty when it is not."""
        suffix = posixpath.splitext(self.name)[1].lower()
        return suffix if suffix in COMPRESSED else ""


def remote(path: str) -> bool:
    """Whether a path goes through fsspec."""
    return "://" in path


def find_files(name: str, source: SourceConfig) -> list[InputFile]:
    """The files of a source, sorted by name: a file, all that fit in a folder (and below), or those of a pattern.

    Raises DataError when there are none, EnvironmentProblem when a store can not be reached.
    """
    pattern = os.path.expandvars(os.path.expanduser(source.path or ""))
    endings = ENDINGS[source.kind]
    found = _remote_files(pattern, endings) if remote(pattern) else [_local(path) for path in _local_files(pattern, endings)]
    if not found:
        raise DataError(
            expected=f"files of source {name!r} at {source.path}", found="none",
            fix=f"correct sources.{name}.path (a folder is searched for {', '.join(endings)}, also with {', '.join(COMPRESSED)} behind)",
        )
    return sorted(_named(found), key=lambda file: file.name)


def describe(paths: Iterable[str | Path]) -> list[InputFile]:
    """Exactly these files, in this order. Raises DataError for one that is not there, EnvironmentProblem when a store can not be reached."""
    found: list[tuple[str, int, str]] = []
    for path in map(str, paths):
        found += [_stat(path)]
    return _named(found)


def check_unchanged(file: InputFile) -> None:
    """Raise DataError unless the file is what it was when the work was planned."""
    _, size, stamp = _stat(file.path)
    if (size, stamp) != (file.size, file.stamp):
        raise DataError(
            expected=f"{file.path} as it was when this run began ({file.size} bytes)", found=f"it was changed since ({size} bytes, version {stamp} instead of {file.stamp})",
            fix="wait until whatever writes it is done, then run the same command again",
        )


class Stored(io.RawIOBase):
    """The bytes of an input file as stored. Opening, reading and seeking raise DataError when the file is gone and
    EnvironmentProblem for what else is the machine's or the store's fault, so that neither is taken for damage. A store
    that fails is asked again, after WAITS."""

    def __init__(self, file: InputFile) -> None:
        self._path, self._position = file.path, 0
        self._stream: IO[bytes] = self._open()

    def _open(self) -> IO[bytes]:
        with _access(self._path):
            return _filesystem(self._path).open(_bare(self._path), "rb", block_size=8 * BLOCK) if remote(self._path) else io.FileIO(self._path)

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes; none at the end."""
        waits = list(WAITS) if remote(self._path) else []
        while True:
            try:
                with _access(self._path):
                    block = self._stream.read(size)
                self._position += len(block)
                return block
            except EnvironmentProblem as problem:
                if not waits:
                    raise
                log.warning("%s: byte %d could not be read (%s), trying again", self._path, self._position, problem.found)
                time.sleep(waits.pop(0))
                self._stream = self._open()
                self.seek(self._position)

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as it goes; returns bytes."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a byte."""
        with _access(self._path):
            self._position = self._stream.seek(offset, whence)
        return self._position

    def tell(self) -> int:
        """The present byte."""
        return self._position

    def close(self) -> None:
        """Close the file below."""
        self._stream.close()
        super().close()


def sha256(file: InputFile) -> str:
    """Hex SHA-256 of the bytes as stored."""
    digest = hashlib.sha256()
    with Stored(file) as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _stat(path: str) -> tuple[str, int, str]:
    if not remote(path):
        return _local(Path(path))
    with _access(path):
        filesystem = _filesystem(path)
        filesystem.invalidate_cache()
        return _described(path, filesystem.info(_bare(path)))


def _local(path: Path) -> tuple[str, int, str]:
    with _access(str(path)):
        state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        raise DataError(expected=f"a file {path}", found="a folder, pipe or device", fix="name a regular file: it is read in parts, and again after an interruption")
    return str(path), state.st_size, str(state.st_mtime_ns)


def _local_files(pattern: str, endings: tuple[str, ...]) -> list[Path]:
    if os.path.isdir(pattern):
        return _fitting(pattern, {str(path): path for path in _walk(pattern)}, endings)
    if os.path.exists(pattern):
        return [Path(pattern)]
    parts = Path(pattern).parts
    if "**" not in parts:
        return [Path(path) for path in glob.glob(pattern) if os.path.isfile(path)]
    # glob itself follows links that form circles until the system stops it.
    roots = glob.glob(str(Path(*parts[: parts.index("**")])))
    fits = re.compile(_regex(pattern))
    return [path for root in roots for path in _walk(root) if fits.fullmatch(str(path))]


def _regex(pattern: str) -> str:
    """A pattern with `**` as a regular expression over whole paths."""
    from fsspec.utils import glob_translate

    return glob_translate(str(Path(pattern)))


def _walk(root: str) -> Iterator[Path]:
    """Files below `root`, hidden ones left out; links are followed, but no folder is entered twice (links may form circles)."""
    entered: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=_refused):
        state = os.stat(folder)
        if (state.st_dev, state.st_ino) in entered:
            folders.clear()
            continue
        entered.add((state.st_dev, state.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (path for name in sorted(names) if not name.startswith(".") and (path := Path(folder, name)).is_file())


def _refused(error: OSError) -> None:
    raise _problem(str(error.filename), error) from error


def _fitting(folder: str, every: Mapping[str, T], endings: tuple[str, ...]) -> list[T]:
    """Those of the files of a folder, by path, that have one of the endings. That others are there is said once."""
    found = [item for path, item in every.items() if _fits(posixpath.basename(path), endings)]
    if (others := len(every) - len(found)) and found and parent_process() is None:
        kinds = Counter(posixpath.splitext(path)[1].lower() or "none" for path in every if not _fits(posixpath.basename(path), endings))
        said = ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common(8))
        log.warning("%s: %d files are read; %d are left out, whose endings are not among %s: %s", folder, len(found), others, ", ".join(endings), said)
    return found


def _fits(name: str, endings: tuple[str, ...]) -> bool:
    stem, suffix = posixpath.splitext(name)
    return (posixpath.splitext(stem)[1] if suffix.lower() in COMPRESSED else suffix).lower() in endings


def _remote_files(pattern: str, endings: tuple[str, ...]) -> list[tuple[str, int, str]]:
    with _access(pattern):
        filesystem, bare = _filesystem(pattern), _bare(pattern)
        filesystem.invalidate_cache()
        if any(char in bare for char in ("*[" if pattern.startswith("http") else "*?[")):
            entries = filesystem.glob(bare, detail=True)
        else:
            try:
                info = filesystem.info(bare)
            except FileNotFoundError as error:
                if _unreachable(error):
                    raise
                return []
            if info["type"] == "file":
                return [_described(pattern, info)]
            every = {path: (path, info) for path, info in filesystem.find(bare, detail=True).items() if "/." not in path.removeprefix(bare)}
            entries = dict(_fitting(pattern, every, endings))
        found = []
        for path, info in entries.items():
            if info["type"] == "file":
                # What a listing tells and what is told of one file agree only where there is a proper version.
                told = info if any(info.get(key) for key in VERSIONS) else filesystem.info(path)
                found.append(_described(filesystem.unstrip_protocol(path), told))
        return found


def _described(path: str, info: dict[str, Any]) -> tuple[str, int, str]:
    if info.get("size") is None:
        raise EnvironmentProblem(expected=f"a store that tells the size of {path}", found="none told", fix="download the file and read it from disk")
    return path, int(info["size"]), next((str(info[key]) for key in (*VERSIONS, *TIMES) if info.get(key) is not None), "")


def _named(found: list[tuple[str, int, str]]) -> list[InputFile]:
    """With names relative to what all share."""
    bare = [re.split(r"[?#]", path)[0] if remote(path) else Path(path).as_posix() for path, _, _ in found]
    folders = {posixpath.dirname(path) for path in bare}
    try:
        root = posixpath.commonpath(folders) if folders else ""
    except ValueError:  # absolute and relative ones
        root = ""
    files = [InputFile(name=posixpath.relpath(name, root) if root else name, path=path, size=size, stamp=stamp) for name, (path, size, stamp) in zip(bare, found, strict=True)]
    twice = [name for name, count in Counter(file.name for file in files).items() if count > 1]
    if twice:
        raise DataError(expected="input files with names of their own (ids are made of them)", found=f"{twice[0]} more than once", fix="name every file once; of addresses only the part before ? counts")
    return files


def _filesystem(path: str) -> Any:
    import fsspec

    return fsspec.core.url_to_fs(path)[0]


def _bare(path: str) -> str:
    import fsspec

    return fsspec.core.url_to_fs(path)[1]


@contextmanager
def _access(path: str) -> Iterator[None]:
    """Whatever a file system raises, as an error that says what to do."""
    try:
        yield
    except R1Error:
        raise
    except FileNotFoundError as error:
        if _unreachable(error):
            raise _problem(path, error) from error
        raise DataError(expected=f"a file {path}", found="no such file", fix="correct the path; if it was moved or deleted while the run went on, put it back and run the same command again") from error
    except OSError as error:
        raise _problem(path, error) from error
    except Exception as error:
        # Stores raise exceptions of their own libraries; here they are the store's, because only its calls stand in the block.
        if not remote(path):
            raise
        raise _problem(path, error) from error


def _unreachable(error: FileNotFoundError) -> bool:
    """fsspec's HTTP says "not found" of servers that do not answer, too; what did happen is the cause."""
    cause = error.__cause__
    return cause is not None and not isinstance(cause, FileNotFoundError) and (isinstance(cause, OSError) or "Connection" in type(cause).__name__ or "Timeout" in type(cause).__name__)


def _problem(path: str, error: Exception) -> EnvironmentProblem:
    found = ": ".join([type(error).__name__, str(error), *([str(error.__cause__)] if error.__cause__ else [])])
    if isinstance(error, ImportError):
        fix = "install what the message names (s3:// needs s3fs, hf:// huggingface_hub, https:// aiohttp)"
    elif remote(path):
        fix = "check the address, the network and the store's credentials (s3: AWS_PROFILE or AWS_ACCESS_KEY_ID, hf: HF_TOKEN), then run the same command again"
    else:
        fix = "check the permissions and the disk, then run the same command again"
    return EnvironmentProblem(expected=f"to read {path}", found=found, fix=fix)
