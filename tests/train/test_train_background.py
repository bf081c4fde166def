"""Saving beside training: the state of the step it was asked at, nothing lost, nothing silent."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from pathlib import Path

import pytest
from train_toys import final_bytes, resumable, settings, train

from megatron_r1.artifacts.base import open_workspace
from megatron_r1.artifacts.checkpoint import CheckpointSet
from megatron_r1.parallel import checkpoint, context
from megatron_r1.parallel.mcore import PlannedSave
from megatron_r1.train import loop
from megatron_r1.utils.errors import CheckpointError, EnvironmentProblem
from megatron_r1.utils.lock import only_process


def workspace(folder: Path, config, shards) -> Path:
    return open_workspace(folder, "train", "checkpoint", config, {"shards": shards}).path


def held(monkeypatch: pytest.MonkeyPatch, until: threading.Event) -> list[str]:
    """Background writing waits for `until`; returns the list in which the threads that wrote are named."""
    write, names = PlannedSave.write, []

    def waiting(self):
        names.append(threading.current_thread().name)
        if threading.current_thread() is not threading.main_thread():
            assert until.wait(60)
        return write(self)

    monkeypatch.setattr(PlannedSave, "write", waiting)
    return names


def test_what_is_written_is_the_state_of_the_step_it_was_asked_at(tmp_path, shards, monkeypatch) -> None:
    """Steps go on while the writer waits; a writer that read the live tensors would store theirs."""
    every = {"budget": "6 steps", "checkpoints": {"evenly": 2}}
    plain = train(tmp_path / "plain", settings(**{**every, "checkpoints": {"evenly": 2, "background": False}}), shards=shards)
    release = threading.Event()
    names = held(monkeypatch, release)
    update = loop.Trainer._update

    def releasing(self, *arguments):
        if self.step + 1 == 6:
            assert not (checkpoint_of(self.folder, 3)).exists()
            release.set()
        return update(self, *arguments)

    monkeypatch.setattr(loop.Trainer, "_update", releasing)
    background = train(tmp_path / "background", settings(**every), shards=shards)
    assert names == ["save step-00000003", "save step-00000006"]
    for step in (3, 6):
        one, two = (checkpoint_of(artifact.path, step) for artifact in (plain, background))
        for file in ("weights/__0_0.distcp", "weights/.metadata", "weights/common.pt", "rng/rank-00000.json"):
            assert (one / file).read_bytes() == (two / file).read_bytes(), file
        checkpoint.verify(two, context.current())


def checkpoint_of(root: Path, step: int) -> Path:
    return root / "checkpoints" / f"step-{step:08d}"


def test_a_failed_save_ends_training_at_a_step_boundary_and_keeps_the_one_before(tmp_path, shards, straight, monkeypatch) -> None:
    write, config = PlannedSave.write, resumable()
    calls = []

    def failing(self):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self)

    with monkeypatch.context() as patch:
        patch.setattr(PlannedSave, "write", failing)
        with pytest.raises(EnvironmentProblem, match="step-00000004"):
            train(tmp_path, config, shards=shards)
    folder = workspace(tmp_path, config, shards) / "checkpoints"
    assert [path.name for path in sorted(folder.iterdir()) if not path.name.startswith(".")] == ["step-00000002"], "deleted only after a newer one is complete"
    assert final_bytes(train(tmp_path, config, shards=shards)) == final_bytes(straight)


@pytest.mark.parametrize("every", [2, 4])
def test_a_rollback_while_a_checkpoint_is_being_written(every, tmp_path, shards, monkeypatch) -> None:
    """It is waited for: it is the one to go back to (of step 4), or has to go because it is newer than the incident (of step 6)."""
    config = settings(
        budget="9 steps", checkpoints={"every": f"{every} steps", "keep": 3}, guard={"skip": 1, "hold": 1, "recovery": 2, "hold_steps": "2 steps"},
    )
    monkeypatch.setattr(loop.Trainer, "_reduce", bad_losses(loop.Trainer._reduce, {5, 6, 7}))
    plain = train(tmp_path / "plain", config, shards=shards)
    release, waited = threading.Event(), []
    held(monkeypatch, release)
    finish = checkpoint.PendingSave.finish

    def finishing(self):
        waited.append(self.path.name)
        release.set()
        finish(self)
        release.clear()

    monkeypatch.setattr(checkpoint.PendingSave, "finish", finishing)
    monkeypatch.setattr(checkpoint.PendingSave, "ready", lambda self: False)
    found = train(tmp_path / "held", config, shards=shards)
    assert waited[:2] == (["step-00000002", "step-00000004"] if every == 2 else ["step-00000004", "step-00000008"])
    assert waited[2:3] == (["step-00000006"] if every == 2 else ["step-00000009"])
    assert [record["decision"] for record in CheckpointSet.open(found).journal()] == ["skip", "hold", "rollback"]
    assert CheckpointSet.open(found).journal() == CheckpointSet.open(plain).journal()
    assert final_bytes(found) == final_bytes(plain)


def bad_losses(reduce, steps):
    """Losses of these steps are no numbers."""

    def faulty(self, reports, stop):
        sums = reduce(self, reports, stop)
        if self.step + 1 in steps:
            sums["loss_sum"] = float("nan")
        return sums

    return faulty


def test_a_checkpoint_of_another_model_is_refused_and_kept(tmp_path, shards) -> None:
    """Undamaged, but not of this model: an error before the first step, and nothing is written over."""
    other = train(tmp_path / "other", settings(model={"preset": "nano", "num_layers": 1}, budget="2 steps"), shards=shards)
    config = settings(budget="6 steps")
    folder = workspace(tmp_path, config, shards) / "checkpoints" / "step-00000002"
    shutil.copytree(checkpoint_of(other.path, 2), folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError) as caught:
        train(tmp_path, config, shards=shards)
    assert str(folder) in caught.value.expected
    assert "configuration" in caught.value.fix
    assert {path: path.read_bytes() for path in folder.parent.rglob("*") if path.is_file()} == before
    assert not (folder.parent.parent / "ledger.jsonl").exists(), "no step was made"


def test_a_checkpoint_is_hashed_once_when_a_run_goes_on(tmp_path, shards, straight, monkeypatch) -> None:
    from megatron_r1.train import run

    with monkeypatch.context() as patch:
        patch.setattr(run, "write_payload", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, resumable(), shards=shards)
    hashed, check = [], checkpoint._check_piece

    def counted(path, name, *rest):
        hashed.append((path.name, name))
        check(path, name, *rest)

    monkeypatch.setattr(checkpoint, "_check_piece", counted)
    assert final_bytes(train(tmp_path, resumable(), shards=shards)) == final_bytes(straight)
    assert ("step-00000007", "weights/__0_0.distcp") in hashed
    assert len(hashed) == len(set(hashed))


def test_any_failure_of_the_writer_is_told(tmp_path, shards, monkeypatch) -> None:
    def failing(self):
        raise RuntimeError("the writer broke")

    monkeypatch.setattr(PlannedSave, "write", failing)
    with pytest.raises(CheckpointError, match="the writer broke"):
        train(tmp_path, settings(budget="2 steps"), shards=shards)


@pytest.mark.parametrize("damage", ["all", "newest"])
def test_all_damaged_is_an_error_and_changes_nothing(damage, tmp_path, shards, straight, monkeypatch) -> None:
    from megatron_r1.train import run

    config = resumable()
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_payload", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, config, shards=shards)
    folder = workspace(tmp_path, config, shards) / "checkpoints"
    found = sorted(folder.iterdir())
    assert [path.name for path in found] == ["step-00000006", "step-00000007"]  # `keep`: 2, the last step among them
    os.truncate(found[1] / "weights" / "__0_0.distcp", 100)
    if damage == "newest":
        assert final_bytes(train(tmp_path, config, shards=shards)) == final_bytes(straight)
        return
    shutil.rmtree(found[0] / "rng")
    with pytest.raises(CheckpointError) as caught:
        train(tmp_path, config, shards=shards)
    for word in ("step-00000006: the file is missing", "step-00000007: 100 bytes"):
        assert word in caught.value.found
    assert sorted(folder.iterdir()) == found


def test_a_second_run_is_refused(tmp_path, shards) -> None:
    config = settings(budget="1 steps")
    work = open_workspace(tmp_path, "train", "checkpoint", config, {"shards": shards})
    with only_process(work.tmp, "lock"), pytest.raises(EnvironmentProblem, match=f"process {os.getpid()} on "):
        train(tmp_path, config, shards=shards)
    assert not (work.path / "checkpoints").exists()
