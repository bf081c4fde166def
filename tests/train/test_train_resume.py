"""Interrupted and relaunched: the same bytes, nothing written twice."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from train_toys import CACHE_TOKENS, CACHED, final_bytes, resumable, timeless, train

from megatron_r1.artifacts.base import open_artifact, open_workspace
from megatron_r1.artifacts.checkpoint import CheckpointSet
from megatron_r1.train import loop, run, teacher_cache
from megatron_r1.train.topk_cache import TopKCache
from megatron_r1.utils.errors import REQUEUE_EXIT_CODE

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def same(resumed, straight):
    """Weights, moments, metrics and ledger of two artifacts are equal."""
    assert final_bytes(resumed) == final_bytes(straight)
    a, b = CheckpointSet.open(resumed), CheckpointSet.open(straight)
    assert timeless(a.metrics()) == timeless(b.metrics())
    assert a.ledger() == b.ledger()
    assert [info.step for info in a.checkpoints] == [info.step for info in b.checkpoints] == [7]
    assert a.manifest == b.manifest


def victim(folder, shards, when, *beside):
    command = [sys.executable, str(HERE / "train_victim.py"), str(folder), str(shards.path), when, *beside]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_sigkill_in_a_step_and_in_a_save_ends_in_the_same_bytes(tmp_path, shards, straight):
    for when in ("step 4", "save 6"):
        killed = victim(tmp_path, shards, when)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    work = open_workspace(tmp_path, "train", "checkpoint", resumable(), {"shards": shards}).path
    names = sorted(path.name for path in (work / "checkpoints").iterdir())
    assert names == [".step-00000006.partial", "step-00000002", "step-00000004"], names
    last = victim(tmp_path, shards, "none")
    assert last.returncode == 0, last.stderr
    assert "resuming after step 4 of 7" in last.stderr
    finished = open_workspace(tmp_path, "train", "checkpoint", resumable(), {"shards": shards}).final
    same(open_artifact(finished, verify="full"), straight)


@pytest.mark.slow
def test_sigkill_while_the_cache_is_made_and_a_flipped_bit_end_in_the_same_bytes(tmp_path, shards, straight, monkeypatch, messages):
    """Only what is not there, or no longer what was written, is made again."""
    monkeypatch.setattr(teacher_cache, "CHUNK_TOKENS", CACHE_TOKENS)
    caches, written = [], []
    training, writing = loop.Trainer.train, TopKCache.write

    def looked_at(self):
        folder = self.folder / "tmp" / "teacher_top_k"
        caches.append({path.name: path.read_bytes() for path in sorted(folder.iterdir())})
        return training(self)

    monkeypatch.setattr(loop.Trainer, "train", looked_at)
    monkeypatch.setattr(TopKCache, "write", lambda self, chunk, *tensors: (written.append(chunk), writing(self, chunk, *tensors))[1])
    killed = victim(tmp_path / "killed", shards, "chunk 2", "teacher", str(straight.path))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert "top 16 of 28 samples, 0.1 MiB on disk; 4 of 4 chunks to compute" in killed.stderr
    inputs = {"shards": shards, "teacher": straight}
    cache = open_workspace(tmp_path / "killed", "train", "checkpoint", resumable(**CACHED), inputs).path / "tmp" / "teacher_top_k"
    whole, part = sorted(cache.glob("chunk-*.safetensors")), sorted(cache.glob(".chunk-*"))
    assert [path.name for path in (*whole, *part)] == ["chunk-000000.safetensors", "chunk-000001.safetensors", ".chunk-000002.safetensors.tmp"]
    flipped = bytearray(whole[1].read_bytes())
    flipped[-7] ^= 4
    whole[1].write_bytes(flipped)
    resumed = train(tmp_path / "killed", resumable(**CACHED), **inputs)
    assert written == [1, 2, 3]
    assert any("chunk-000001.safetensors is damaged" in message for message in messages)
    never_killed = train(tmp_path / "whole", resumable(**CACHED), **inputs)
    assert written == [1, 2, 3, 0, 1, 2, 3]
    assert len(caches[0]) == 9  # four chunks, their receipts, and whom it belongs to
    assert caches[0] == caches[1]
    same(resumed, never_killed)


class Interrupt(Exception):
    """Raised in the middle of a step."""


def interrupted_run(monkeypatch, folder, shards, step):
    """A run that fails before the update of `step`."""
    update = loop.Trainer._update

    def failing(self, *arguments):
        if self.step + 1 == step:
            raise Interrupt
        return update(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_update", failing)
        with pytest.raises(Interrupt):
            train(folder, resumable(), shards=shards)


def test_a_damaged_checkpoint_is_named_and_skipped(tmp_path, shards, straight, monkeypatch, messages):
    interrupted_run(monkeypatch, tmp_path, shards, 6)
    work = open_workspace(tmp_path, "train", "checkpoint", resumable(), {"shards": shards}).path
    assert sorted(path.name for path in (work / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    tensors = next((work / "checkpoints" / "step-00000004" / "weights").glob("*.distcp"))
    content = bytearray(tensors.read_bytes())
    content[len(content) // 2] ^= 1
    tensors.write_bytes(content)
    artifact = train(tmp_path, resumable(), shards=shards)
    assert any("step-00000004" in message and "damaged" in message for message in messages)
    assert any("resuming after step 2 of 7" in message for message in messages)
    same(artifact, straight)


def test_sigterm_saves_and_exits_with_the_stated_code(tmp_path, shards, straight, monkeypatch):
    update = loop.Trainer._update

    def asked(self, *arguments):
        if self.step + 1 == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, *arguments)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_update", asked)
        with pytest.raises(SystemExit) as stopped:
            train(tmp_path, resumable(), shards=shards)
    assert stopped.value.code == REQUEUE_EXIT_CODE == 85
    assert signal.getsignal(signal.SIGTERM) is before
    work = open_workspace(tmp_path, "train", "checkpoint", resumable(), {"shards": shards}).path
    assert (work / "checkpoints" / "step-00000003").is_dir()
    same(train(tmp_path, resumable(), shards=shards), straight)


def test_killed_after_the_last_step_only_seals(tmp_path, shards, straight, monkeypatch):
    def die(*_):
        raise Interrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "write_payload", die)
        with pytest.raises(Interrupt):
            train(tmp_path, resumable(), shards=shards)
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_one_step", lambda *_: pytest.fail("a finished phase was trained on"))
        artifact = train(tmp_path, resumable(), shards=shards)
    same(artifact, straight)


def test_tensorboard_has_every_point_once_and_no_host_name(straight, tmp_path, shards, monkeypatch):
    import socket

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    interrupted_run(monkeypatch, tmp_path, shards, 6)
    artifact = train(tmp_path, resumable(), shards=shards)
    files = list((artifact.path / "tensorboard").iterdir())
    assert len(files) == 1
    assert socket.gethostname() not in files[0].name
    events = EventAccumulator(str(artifact.path / "tensorboard"))
    events.Reload()
    records = CheckpointSet.open(artifact).metrics()
    losses = {event.step: event.value for event in events.Scalars("loss")}
    assert len(events.Scalars("loss")) == len(losses)
    assert losses == pytest.approx({r["step"]: r["loss"] for r in records if "loss" in r})
    assert {event.step for event in events.Scalars("validation/probe/code")} == {0, 4, 7}
