"""List, verify and draw the artifacts of a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_r1.artifacts.base import MANIFEST, PARTIAL, Artifact, Parent, open_artifact
from megatron_r1.utils import io
from megatron_r1.utils.errors import ArtifactError


@dataclass(frozen=True)
class Entry:
    """One folder of a run. `state` is "current", "older" (made with other settings), "unfinished" or "damaged"."""

    path: Path
    state: str
    artifact: Artifact | None
    problem: str = ""


def read_run(folder: Path | str, verify: bool = False) -> list[Entry]:
    """Every artifact in a run folder, parents before children. With `verify`, every byte is checked. Raises ArtifactError for no run."""
    folder = Path(folder)
    if not (folder / "recipe.yaml").is_file():
        raise ArtifactError(expected=f"a run folder (with recipe.yaml) at {folder}", found="none", fix="give the path of a run, such as runs/quickstart")
    record = folder / "run.json"
    current = set(io.read_json(record)["steps"].values()) if record.exists() else None
    entries = [_entry(path, current, verify) for path in sorted(folder.iterdir()) if path.is_dir()]
    return _parents_first(entries)


def _entry(path: Path, current: set[str] | None, verify: bool) -> Entry:
    if path.name.endswith(PARTIAL) or not (path / MANIFEST).exists():
        return Entry(path, "unfinished", None)
    try:
        artifact = open_artifact(path, verify="full" if verify else "sizes")
    except ArtifactError as error:
        return Entry(path, "damaged", None, f"{error.expected}; found {error.found}")
    return Entry(path, "current" if current is None or path.name in current else "older", artifact)


def parent_fingerprints(artifact: Artifact) -> Iterator[Parent]:
    """The parents an artifact's manifest names."""
    for value in artifact.manifest.parents.values():
        yield from value if isinstance(value, list) else [value]


def _parents_first(entries: list[Entry]) -> list[Entry]:
    waiting, ordered, seen = list(entries), [], set()
    known = {entry.artifact.fingerprint for entry in entries if entry.artifact}
    while waiting:
        ready = next(
            (
                entry for entry in waiting
                if entry.artifact is None or all(parent.fingerprint in seen or parent.fingerprint not in known for parent in parent_fingerprints(entry.artifact))
            ),
            waiting[0],
        )
        waiting.remove(ready)
        ordered.append(ready)
        if ready.artifact:
            seen.add(ready.artifact.fingerprint)
    return ordered


def draw(entries: list[Entry]) -> str:
    """The graph as text: one line an artifact, its parents behind an arrow."""
    names = {entry.artifact.fingerprint: entry.path.name for entry in entries if entry.artifact}
    lines = []
    for entry in entries:
        if entry.artifact is None:
            continue
        parents = sorted({names.get(parent.fingerprint, f"{parent.name} (elsewhere)") for parent in parent_fingerprints(entry.artifact)})
        lines.append(f"{entry.path.name:<34} <- {', '.join(parents) or '(raw data)'}")
    return "\n".join(lines)


def mermaid(entries: list[Entry]) -> str:
    """The graph in Mermaid's language, for documents that render it."""
    names = {entry.artifact.fingerprint: entry.artifact.name for entry in entries if entry.artifact and entry.state == "current"}
    lines = ["graph LR"]
    for entry in entries:
        if entry.artifact and entry.state == "current":
            lines.append(f"  {entry.artifact.name}[{entry.artifact.name}: {entry.artifact.kind}]")
            lines += [f"  {names[parent.fingerprint]} --> {entry.artifact.name}" for parent in parent_fingerprints(entry.artifact) if parent.fingerprint in names]
    return "\n".join(dict.fromkeys(lines))
