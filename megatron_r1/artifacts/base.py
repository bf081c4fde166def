"""Immutable folders with a manifest.

A stage writes into a *workspace* (a partial folder that survives an interruption). `Workspace.complete` checksums every
file, writes `manifest.json`, flushes everything to disk and renames the folder: an artifact is whole or it is absent.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from megatron_r1 import __version__
from megatron_r1.config.base import Frozen, fingerprint
from megatron_r1.utils import io, machine
from megatron_r1.utils.errors import ArtifactError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
PARTIAL = ".partial"
Verify = Literal["none", "sizes", "full"]


class Parent(Frozen):
    """An artifact another one was made from."""

    name: str = Field(description="step name of the parent")
    kind: str = Field(description="kind of the parent")
    fingerprint: str = Field(description="fingerprint of the parent")


class FileRecord(Frozen):
    """One payload file."""

    bytes: int = Field(description="size in bytes")
    sha256: str = Field(description="hex SHA-256 of the content")


class Manifest(Frozen):
    """What an artifact is, what it was made from and how to check it."""

    schema_version: int = Field(description="version of this manifest's format")
    kind: str = Field(description="type of artifact: shards, probe, influence, mixture, checkpoint, evaluation, export, report")
    name: str = Field(description="step name in its recipe")
    fingerprint: str = Field(description="hash of the step's settings and of its parents' fingerprints")
    config: dict[str, Any] = Field(description="the step's resolved settings")
    parents: dict[str, Parent | list[Parent]] = Field(description="input role -> artifact it was made from")
    command: str = Field(description="the command that made it")
    created: str = Field(description="UTC time of completion, ISO 8601")
    seconds: float = Field(description="wall-clock seconds of the stage, over all attempts known")
    machine: dict[str, Any] = Field(description="processor, cores, memory, system")
    versions: dict[str, str] = Field(description="versions of the packages a number may depend on")
    files: dict[str, FileRecord] = Field(description="payload: relative path -> size and checksum")
    summary: dict[str, Any] = Field(description="the stage's own small figures")
    checksum: str = Field("", description="hex SHA-256 of this record without this field, as canonical JSON; empty in manifests of earlier releases")

    def sealed(self) -> Manifest:
        """This record with its checksum."""
        return self.model_copy(update={"checksum": self.expected_checksum()})

    def expected_checksum(self) -> str:
        """What `checksum` must be."""
        # By way of JSON text: what is read back may differ from what was given (keys that were numbers are text).
        plain = json.loads(json.dumps(self.plain(), allow_nan=False))
        return fingerprint({key: value for key, value in plain.items() if key != "checksum"})


class Artifact:
    """A complete artifact, opened for reading."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest

    @property
    def kind(self) -> str:
        """Type of artifact."""
        return self.manifest.kind

    @property
    def name(self) -> str:
        """Step name."""
        return self.manifest.name

    @property
    def fingerprint(self) -> str:
        """Hash of settings and parents."""
        return self.manifest.fingerprint

    def file(self, relative: str) -> Path:
        """Path of a payload file; ArtifactError when the manifest does not list it."""
        if relative not in self.manifest.files:
            near = sorted(self.manifest.files)[:8]
            raise ArtifactError(
                expected=f"a file {relative!r} in the {self.kind} artifact {self.path}",
                found=f"a manifest that lists {len(self.manifest.files)} other files ({', '.join(near)} ...)",
                fix="use an artifact of this release, or make it again",
            )
        return self.path / relative

    def json(self, relative: str) -> Any:
        """Content of a JSON payload file."""
        return io.read_json(self.file(relative))

    def verify(self, level: Verify = "full") -> None:
        """Compare sizes (and, with "full", SHA-256) of every payload file. Raises ArtifactError naming the first bad file."""
        if level == "none":
            return
        for relative, record in self.manifest.files.items():
            path = self.path / relative
            if not path.is_file():
                self._damaged(relative, f"{record.bytes} bytes", "no such file")
            size = path.stat().st_size
            if size != record.bytes:
                self._damaged(relative, f"{record.bytes} bytes", f"{size} bytes")
        if level != "full":
            return
        records = self.manifest.files
        for (relative, record), digest in zip(records.items(), io.sha256_files([self.path / relative for relative in records])):
            if digest != record.sha256:
                self._damaged(relative, f"SHA-256 {record.sha256[:16]}...", f"SHA-256 {digest[:16]}... (a bit was flipped or the file was edited)")

    def _damaged(self, relative: str, expected: str, found: str) -> None:
        raise ArtifactError(
            expected=f"{relative} of {self.path.name} with {expected}",
            found=found,
            fix=f"delete the folder {self.path} and run the same command again; other artifacts are untouched",
        )


def open_artifact(path: Path | str, kind: str | None = None, verify: Verify = "sizes") -> Artifact:
    """Open a complete artifact and check it. Raises ArtifactError when missing, incomplete, damaged or of another kind."""
    path = Path(path)
    if not (path / MANIFEST).is_file():
        partial = path.with_name(path.name + PARTIAL)
        found = "an unfinished attempt" if partial.is_dir() else "a folder without manifest.json" if path.is_dir() else "no such folder"
        raise ArtifactError(expected=f"a complete artifact at {path}", found=found, fix="run the step that makes it (relaunching the same command finishes unfinished work)")
    try:
        manifest = Manifest.model_validate(io.read_json(path / MANIFEST))
    except ValidationError as error:
        raise ArtifactError(
            expected=f"a manifest of schema version {SCHEMA_VERSION} in {path / MANIFEST}", found=f"{error.error_count()} wrong or missing fields",
            fix="delete the folder and run the same command again",
        ) from error
    if manifest.schema_version != SCHEMA_VERSION:
        raise ArtifactError(
            expected=f"schema version {SCHEMA_VERSION} in {path / MANIFEST}", found=f"version {manifest.schema_version}",
            fix="make the artifact again with this release, or use the release that made it",
        )
    if manifest.checksum and manifest.checksum != manifest.expected_checksum():
        raise ArtifactError(
            expected=f"{path / MANIFEST} with the checksum it holds ({manifest.checksum[:16]}...)",
            found=f"SHA-256 {manifest.expected_checksum()[:16]}... (a bit was flipped or the file was edited)",
            fix="restore the file, or delete the folder and run the same command again",
        )
    if kind is not None and manifest.kind != kind:
        raise ArtifactError(expected=f"a {kind} artifact", found=f"{path.name} is of kind {manifest.kind}", fix="point this input at a step that makes the right kind")
    artifact = Artifact(path, manifest)
    artifact.verify(verify)
    return artifact


ParentArtifacts = Mapping[str, "Artifact | list[Artifact] | None"]


def step_fingerprint(kind: str, config: Frozen | dict[str, Any], parents: ParentArtifacts) -> str:
    """Identity of a step's result: kind, settings, and the identities of what it is made from."""
    settings = config.identity() if isinstance(config, Frozen) else dict(config)
    return fingerprint({"schema": SCHEMA_VERSION, "kind": kind, "config": settings, "parents": _identities(parents)})


def _identities(parents: ParentArtifacts) -> dict[str, Any]:
    return {
        role: [item.fingerprint for item in value] if isinstance(value, list) else value.fingerprint
        for role, value in sorted(parents.items()) if value is not None
    }


class Workspace:
    """The not-yet-complete artifact a stage works in.

    `path` is the partial folder; files of an interrupted attempt at the same step (same fingerprint) are still in it.
    Scratch files go under `path/"tmp"`, which is removed at completion.
    """

    def __init__(self, final: Path, name: str, kind: str, digest: str, config: dict[str, Any], parents: ParentArtifacts, command: str) -> None:
        self.final, self.name, self.kind, self.fingerprint = final, name, kind, digest
        self._config, self._parents, self._command = config, parents, command
        self.path = final.with_name(final.name + PARTIAL)
        self._began = time.monotonic()
        with io.disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)

    @property
    def tmp(self) -> Path:
        """A scratch folder that is not part of the artifact."""
        folder = self.path / "tmp"
        folder.mkdir(exist_ok=True)
        return folder

    def _earlier_seconds(self) -> float:
        try:
            return float((self.path / "tmp" / "seconds").read_text())
        except (OSError, ValueError):
            return 0.0

    def note_time(self) -> None:
        """Remember the time spent so far, so that a resumed step reports all of it. Safe to call at any time."""
        io.atomic_write_text(self.tmp / "seconds", repr(self._earlier_seconds() + time.monotonic() - self._began))
        self._began = time.monotonic()

    def complete(self, summary: dict[str, Any] | None = None) -> Artifact:
        """Seal the artifact: checksums, manifest, fsync, scratch removed, rename. Call once, last, on rank 0 only."""
        seconds = self._earlier_seconds() + time.monotonic() - self._began
        with io.disk_errors(self.path):
            paths = []
            for path in sorted(self._payload()):
                if path.name.startswith(".") and path.suffix == ".tmp":
                    path.unlink()  # what a killed process was writing
                    continue
                with open(path, "rb") as stream:
                    os.fsync(stream.fileno())
                paths.append(path)
            sums = io.sha256_files(paths)
            files = {path.relative_to(self.path).as_posix(): FileRecord(bytes=path.stat().st_size, sha256=digest) for path, digest in zip(paths, sums)}
        manifest = Manifest(
            schema_version=SCHEMA_VERSION, kind=self.kind, name=self.name, fingerprint=self.fingerprint, config=self._config,
            parents={role: _parent(value) for role, value in self._parents.items() if value is not None}, command=self._command,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"), seconds=round(seconds, 3), machine=machine.describe(),
            versions={"megatron_r1": __version__, **machine.versions()}, files=files, summary=summary or {},
        ).sealed()
        io.atomic_write_json(self.path / MANIFEST, manifest.plain())
        return self._seal(manifest)

    def sealed(self) -> Artifact | None:
        """The artifact, when an attempt was interrupted after its manifest was written: all that was left to do is done. Else None."""
        if not (self.path / MANIFEST).is_file():
            return None
        manifest = Manifest.model_validate(io.read_json(self.path / MANIFEST))
        return self._seal(manifest)

    def _payload(self) -> Iterator[Path]:
        """Every file of the artifact."""
        for folder, folders, names in os.walk(self.path):
            at = Path(folder)
            if at == self.path:
                folders[:] = [name for name in folders if name != "tmp"]
                names = [name for name in names if name != MANIFEST]
            yield from (at / name for name in names)

    def _seal(self, manifest: Manifest) -> Artifact:
        # Scratch goes last: until the manifest is there, it is what a killed attempt goes on from.
        shutil.rmtree(self.path / "tmp", ignore_errors=True)
        with io.disk_errors(self.final):
            for folder in {path.parent for path in self.path.rglob("*")}:
                io.fsync_directory(folder)
            os.rename(self.path, self.final)
            io.fsync_directory(self.final.parent)
        return Artifact(self.final, manifest)


def _parent(value: Artifact | list[Artifact]) -> Parent | list[Parent]:
    if isinstance(value, list):
        return [_parent(item) for item in value]  # type: ignore[misc]
    return Parent(name=value.name, kind=value.kind, fingerprint=value.fingerprint)


def artifact_path(folder: Path | str, name: str, digest: str) -> Path:
    """Where a step's artifact lives: the name for people, eight digits of the fingerprint for truth."""
    return Path(folder) / f"{name}-{digest[:8]}"


def open_workspace(
    folder: Path | str, name: str, kind: str, config: Frozen | dict[str, Any], parents: ParentArtifacts | None = None, command: str = "",
) -> Workspace:
    """Begin (or go on with) the step `name` under `folder`."""
    parents = parents or {}
    plain = config.plain() if isinstance(config, Frozen) else dict(config)
    digest = step_fingerprint(kind, config, parents)
    return Workspace(artifact_path(folder, name, digest), name, kind, digest, plain, parents, command)
