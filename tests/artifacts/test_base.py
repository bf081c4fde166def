"""Artifacts are whole or absent, and any flipped bit is found."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from megatron_r1.artifacts.base import open_artifact, open_workspace
from megatron_r1.artifacts.ledger import draw, read_run
from megatron_r1.utils import io
from megatron_r1.utils.errors import ArtifactError, EnvironmentProblem


def make(folder: Path, name: str = "corpus", kind: str = "shards", parents: dict | None = None, **config: int):
    work = open_workspace(folder, name, kind, {"x": 1, **config}, parents, "a command")
    (work.path / "data").mkdir(exist_ok=True)
    (work.path / "data" / "payload.bin").write_bytes(bytes(range(256)))
    (work.tmp / "scratch").write_text("not payload")
    return work.complete({"tokens": 256})


def test_complete_artifact_round_trip(tmp_path: Path) -> None:
    made = make(tmp_path)
    opened = open_artifact(made.path, "shards", verify="full")
    assert opened.manifest == made.manifest
    assert list(opened.manifest.files) == ["data/payload.bin"]
    assert opened.manifest.summary == {"tokens": 256}
    assert not (made.path / "tmp").exists()
    assert made.path.name == f"corpus-{made.fingerprint[:8]}"


@pytest.mark.parametrize("name", ["rmtree", "rename"])
def test_killed_while_it_is_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Scratch stays until the manifest is written; from then on all that is left is to finish the seal."""
    class Killed(BaseException):
        pass

    def die(*arguments: object, **more: object) -> None:
        raise Killed

    monkeypatch.setattr(shutil if name == "rmtree" else os, name, die)
    with pytest.raises(Killed):
        make(tmp_path)
    monkeypatch.undo()
    work = open_workspace(tmp_path, "corpus", "shards", {"x": 1})
    sealed = work.sealed()
    assert sealed is not None
    assert list(open_artifact(sealed.path, "shards", verify="full").manifest.files) == ["data/payload.bin"]
    assert not list(tmp_path.glob("*.partial"))
    assert open_workspace(tmp_path, "corpus", "shards", {"x": 2}).sealed() is None


def test_what_a_killed_process_was_writing_is_no_payload(tmp_path: Path) -> None:
    work = open_workspace(tmp_path, "corpus", "shards", {"x": 1})
    (work.path / ".sources.json.77.tmp").write_text("half")
    assert list(make(tmp_path).manifest.files) == ["data/payload.bin"]


def test_unfinished_work_is_not_an_artifact_and_is_found_again(tmp_path: Path) -> None:
    work = open_workspace(tmp_path, "corpus", "shards", {"x": 1})
    (work.path / "part-0").write_text("done")
    with pytest.raises(ArtifactError, match="unfinished attempt"):
        open_artifact(work.final)
    again = open_workspace(tmp_path, "corpus", "shards", {"x": 1})
    assert (again.path / "part-0").read_text() == "done"
    other = open_workspace(tmp_path, "corpus", "shards", {"x": 2})
    assert not (other.path / "part-0").exists()


@pytest.mark.parametrize("level", ["full", "sizes"])
def test_truncated_payload(tmp_path: Path, level: str) -> None:
    made = make(tmp_path)
    path = made.path / "data" / "payload.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="255 bytes") as caught:
        open_artifact(made.path, verify=level)
    assert "data/payload.bin" in caught.value.expected
    assert "delete the folder" in caught.value.fix


@pytest.mark.parametrize("position", [0, 100, 255])
def test_one_flipped_bit(tmp_path: Path, position: int) -> None:
    made = make(tmp_path)
    path = made.path / "data" / "payload.bin"
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="bit was flipped"):
        open_artifact(made.path, verify="full")


def test_wrong_kind_missing_file_and_damaged_manifest(tmp_path: Path) -> None:
    made = make(tmp_path)
    with pytest.raises(ArtifactError, match="of kind shards"):
        open_artifact(made.path, "checkpoint")
    with pytest.raises(ArtifactError, match="other files"):
        made.file("model.json")
    (made.path / "manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match="JSON"):
        open_artifact(made.path)


def test_fingerprint_follows_settings_and_parents(tmp_path: Path) -> None:
    first, second = make(tmp_path), make(tmp_path, y=2)
    child = make(tmp_path, "probe", "probe", {"shards": first})
    assert len({first.fingerprint, second.fingerprint, child.fingerprint}) == 3
    assert make(tmp_path / "elsewhere").fingerprint == first.fingerprint
    assert make(tmp_path, "probe", "probe", {"shards": second}).fingerprint != child.fingerprint


def test_full_disk_is_explained_and_earlier_artifacts_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = make(tmp_path)
    work = open_workspace(tmp_path, "probe", "probe", {"x": 1}, {"shards": earlier})
    (work.path / "payload").write_text("x")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(EnvironmentProblem, match="disk is full") as caught:
            work.complete()
    assert "complete artifacts are kept" in caught.value.fix
    open_artifact(earlier.path, verify="full")
    assert not work.final.exists()
    assert open_workspace(tmp_path, "probe", "probe", {"x": 1}, {"shards": earlier}).complete().path == work.final


def test_require_free_space(tmp_path: Path) -> None:
    io.require_free_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(EnvironmentProblem, match="GiB free"):
        io.require_free_space(tmp_path, 1 << 60)


def test_journal_drops_a_torn_last_line_only(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    io.append_jsonl(path, {"a": 1})
    with open(path, "a") as stream:
        stream.write('{"a": 2')
    assert io.read_jsonl(path) == [{"a": 1}]
    path.write_text('{"a": 1\n{"a": 2}\n')
    with pytest.raises(ArtifactError, match="line 1"):
        io.read_jsonl(path)


def test_ledger_lists_verifies_and_draws(tmp_path: Path) -> None:
    corpus = make(tmp_path)
    make(tmp_path, "probe", "probe", {"shards": corpus})
    open_workspace(tmp_path, "train", "checkpoint", {"x": 1})
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    io.atomic_write_json(tmp_path / "run.json", {"steps": {"corpus": corpus.path.name}})
    entries = read_run(tmp_path, verify=True)
    states = {entry.path.name.split("-")[0]: entry.state for entry in entries}
    assert states == {"corpus": "current", "probe": "older", "train": "unfinished"}
    assert f"<- {corpus.path.name}" in draw(entries)
    (corpus.path / "data" / "payload.bin").write_bytes(b"no")
    assert {entry.state for entry in read_run(tmp_path)} == {"damaged", "older", "unfinished"}
    with pytest.raises(ArtifactError, match="run folder"):
        read_run(tmp_path / "nowhere")
