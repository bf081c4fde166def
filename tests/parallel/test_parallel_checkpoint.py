"""Checkpoints: exact resume, every kind of damage, no foreign code, a full disk."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import zipfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from scenarios import MODEL, Run

from megatron_r1.model.build import build_model
from megatron_r1.model.load import load_model
from megatron_r1.parallel import checkpoint
from megatron_r1.parallel.config import LayoutConfig
from megatron_r1.parallel.optimizer import adam_step, local_states
from megatron_r1.parallel.pickle_guard import guarded_load
from megatron_r1.utils.errors import CheckpointError, EnvironmentProblem
from megatron_r1.utils.io import sha256_file

SHARDED = LayoutConfig(distributed_optimizer=True)
OPTIONS = {
    "fp32": (LayoutConfig(), {}),
    "bf16": (LayoutConfig(), {"precision": "bf16"}),
    "fp32 sharded": (SHARDED, {}),
    "bf16 sharded": (SHARDED, {"precision": "bf16"}),
}


def weights(run: Run) -> list[torch.Tensor]:
    return [p.detach().clone() for p in run.chunks[0].parameters()]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after two steps (fp32, with optimizer); tests that change it copy it first."""
    run = Run(LayoutConfig())
    run.steps(2)
    path = tmp_path_factory.mktemp("saved") / "step-2"
    run.save(path)
    return path


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "step-2"))


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize("name", OPTIONS)
def test_resume_is_bit_for_bit(name: str, tmp_path: Path) -> None:
    layout, options = OPTIONS[name]
    straight = Run(layout, **options)
    straight.steps(2)
    straight.save(tmp_path / "c")
    at_save = torch.get_rng_state()
    expected = straight.steps(3)
    torch.manual_seed(999)
    resumed = Run(layout, seed=1234, **options)
    resumed.load(tmp_path / "c")
    assert torch.equal(torch.get_rng_state(), at_save)
    assert resumed.step_number == 2
    assert adam_step(resumed.optimizer) == 2
    assert resumed.steps(3) == expected
    for a, b in zip(weights(straight), weights(resumed)):
        assert torch.equal(a, b)


def test_a_checkpoint_before_the_first_step(tmp_path: Path) -> None:
    first = Run(LayoutConfig())
    first.save(tmp_path / "c")
    expected = first.steps(2)
    second = Run(LayoutConfig(), seed=77)
    second.load(tmp_path / "c")
    assert second.steps(2) == expected


@pytest.mark.parametrize("name", ["fp32 sharded", "bf16"])
def test_another_kind_of_optimizer_continues(name: str, tmp_path: Path) -> None:
    layout, options = OPTIONS[name]
    first = Run(layout, **options)
    first.steps(2)
    first.save(tmp_path / "c")
    other_layout = SHARDED if layout != SHARDED else LayoutConfig()
    other = Run(other_layout, seed=3, **options)
    other.load(tmp_path / "c")
    for (loss, norm), (loss2, norm2) in zip(first.steps(2), other.steps(2)):
        assert loss2 == pytest.approx(loss, abs=1e-6)
        assert norm2 == pytest.approx(norm, rel=1e-5)


def test_precisions_exchange_checkpoints(tmp_path: Path) -> None:
    half = Run(LayoutConfig(), precision="bf16")
    half.steps(2)
    half.save(tmp_path / "half")
    mains = {id(p): t["main"] for p, _, t in local_states(half.optimizer)}
    exact = load_model(tmp_path / "half", half.ctx, config=MODEL)[0]
    for p, q in zip(half.chunks[0].parameters(), exact.parameters()):
        assert torch.equal(mains[id(p)], q), "fp32 models take the fp32 main weights"
    full = Run(LayoutConfig())
    full.steps(2)
    full.save(tmp_path / "full")
    half.load(tmp_path / "full")
    for (p, _, tensors), q in zip(local_states(half.optimizer), [p for p, _, _ in local_states(full.optimizer)]):
        assert torch.equal(tensors["main"], q), "bf16 runs keep fp32 weights as their main weights"
        assert torch.equal(p, q.bfloat16())


def test_equal_states_make_equal_bytes(saved: Path, tmp_path: Path) -> None:
    run = Run(LayoutConfig())
    run.steps(2)
    run.save(tmp_path / "elsewhere" / "c")
    names = ["weights/.metadata", "weights/__0_0.distcp", "weights/common.pt", "common.json"]
    assert [(saved / n).read_bytes() == (tmp_path / "elsewhere" / "c" / n).read_bytes() for n in names] == [True] * 4
    assert b"/" + tmp_path.name.encode() not in (tmp_path / "elsewhere" / "c" / "weights" / ".metadata").read_bytes()


def test_second_moment(saved: Path) -> None:
    run = Run(LayoutConfig())
    run.load(saved)
    moments, step = checkpoint.load_second_moment(saved, build_model(MODEL, run.ctx, seed=0), run.ctx)
    names = {id(p): n.removeprefix("module.") for n, p in run.chunks[0].named_parameters()}
    expected = {names[id(p)]: t["exp_avg_sq"] for p, _, t in local_states(run.optimizer)}
    assert step == 2
    assert moments.keys() == expected.keys()
    for name, value in moments.items():
        assert torch.equal(value, expected[name])
        assert value.abs().max() > 0


def test_load_model_finds_its_shape(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "artifact" / "checkpoints" / "step-00000002"
    shutil.copytree(saved, path)
    ctx = Run(LayoutConfig()).ctx
    with pytest.raises(CheckpointError, match=r"model\.json"):
        load_model(path, ctx)
    (tmp_path / "artifact" / "model.json").write_text(MODEL.model_dump_json())
    info = namedtuple("Info", "step tokens path")(2, 100, path)
    (chunk,) = load_model(info, ctx)
    assert not chunk.training
    run = Run(LayoutConfig())
    run.load(saved)
    for a, b in zip(chunk.parameters(), run.chunks[0].parameters()):
        assert torch.equal(a, b)


def test_weights_alone(tmp_path: Path) -> None:
    run = Run(LayoutConfig())
    checkpoint.save(tmp_path / "w", run.chunks, None, {"note": "é"}, run.ctx)
    assert checkpoint.load(tmp_path / "w", run.chunks, None, run.ctx) == {"note": "é"}
    with pytest.raises(CheckpointError, match="weights only"):
        checkpoint.load(tmp_path / "w", run.chunks, run.optimizer, run.ctx)
    with pytest.raises(CheckpointError, match="weights only"):
        checkpoint.load_second_moment(tmp_path / "w", run.chunks, run.ctx)


def test_another_model_does_not_fit(saved: Path) -> None:
    ctx = Run(LayoutConfig()).ctx
    for change in ({"ffn_size": 256}, {"num_layers": 5}, {"tied_embeddings": False}):
        with pytest.raises(CheckpointError) as caught:
            load_model(saved, ctx, config=MODEL.replace(**change))
        assert str(saved) in caught.value.expected
        assert "configuration" in caught.value.fix


def test_saving_again_replaces(tmp_path: Path) -> None:
    run = Run(LayoutConfig())
    (tmp_path / ".c.partial" / "weights").mkdir(parents=True)  # what a killed save leaves
    (tmp_path / ".c.partial" / "weights" / "junk").write_text("half")
    for step in (1, 2):
        checkpoint.save(tmp_path / "c", run.chunks, run.optimizer, {"step": step}, run.ctx)
        assert checkpoint.verify(tmp_path / "c")["common"] == {"step": step}
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


# ---------------------------------------------------------------- damage


def refused(path: Path, *words: str) -> CheckpointError:
    """Loading must fail with all the words in the message, and leave the model as it was."""
    run = Run(LayoutConfig(), seed=21)
    before = weights(run)
    with pytest.raises(CheckpointError) as caught:
        run.load(path)
    for word in words:
        assert word in str(caught.value)
    for part in (caught.value.expected, caught.value.found, caught.value.fix):
        assert part
    for a, b in zip(before, weights(run)):
        assert torch.equal(a, b)
    return caught.value


FILES = ["weights/__0_0.distcp", "weights/.metadata", "weights/common.pt", "weights/metadata.json", "rng/rank-00000.json", "common.json"]


def test_the_list_of_files_is_complete(saved: Path) -> None:
    assert sorted(str(f.relative_to(saved)) for f in saved.rglob("*") if f.is_file()) == sorted([*FILES, "checksums.json"])


@pytest.mark.parametrize("name", FILES)
def test_cut_short(name: str, copy: Path) -> None:
    size = (copy / name).stat().st_size
    os.truncate(copy / name, size // 2)
    refused(copy, name, f"{size} bytes", f"{size // 2} bytes")


@pytest.mark.parametrize("name", FILES)
def test_flipped_bit(name: str, copy: Path) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    refused(copy, name, "SHA-256", "damaged")


@pytest.mark.parametrize("name", [*FILES, "checksums.json"])
def test_missing_file(name: str, copy: Path) -> None:
    (copy / name).unlink()
    refused(copy, name, "missing")


def test_extra_file(copy: Path) -> None:
    (copy / "weights" / "__9_0.distcp").write_bytes(b"x")
    refused(copy, "__9_0.distcp")


def test_damaged_list(copy: Path) -> None:
    (copy / "checksums.json").write_text("{")
    refused(copy, "checksums.json")


def test_no_checkpoint(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "no such folder")


# ---------------------------------------------------------------- foreign code


class Evil:
    """Unpickling this would make a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


class Subtle(Evil):
    """The same through a chain that begins harmlessly."""

    def __reduce__(self) -> Any:
        return (getattr, (self.target, "touch"))


def resign(path: Path) -> None:
    """Make the checksums fit what is there: an attacker can do that."""
    record = json.loads((path / "checksums.json").read_text())
    record["files"] = {
        f.relative_to(path).as_posix(): {"bytes": f.stat().st_size, "sha256": sha256_file(f)}
        for f in path.rglob("*") if f.is_file() and f.name != "checksums.json"
    }  # fmt: skip
    (path / "checksums.json").write_text(json.dumps(record))


@pytest.mark.parametrize("kind", [Evil, Subtle])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_code_in_the_index_is_not_run(kind: type[Evil], protocol: int, copy: Path, tmp_path: Path) -> None:
    index = copy / "weights" / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    metadata.planner_data = kind(tmp_path / "owned")
    index.write_bytes(pickle.dumps(metadata, protocol=protocol))
    resign(copy)
    error = refused(copy, ".metadata")
    assert "do not load" in error.fix
    assert not (tmp_path / "owned").exists()
    if kind is Evil:
        pickle.loads(index.read_bytes())
        assert (tmp_path / "owned").exists(), "the trap must be a real one"


class Member:
    """A member of an enumeration as Python 3.11.0 to 3.11.3 write it, or something else that getattr can get."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> Any:
        return (getattr, (self.owner, self.name))


def test_members_of_enumerations_are_all_that_getattr_gets(copy: Path) -> None:
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, TensorProperties

    index = copy / "weights" / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    for owner, name in ((_MEM_FORMAT_ENCODING, "__reduce_ex__"), (_MEM_FORMAT_ENCODING, "mro"), (TensorProperties, "__init__"), (_MEM_FORMAT_ENCODING, "NONE")):
        metadata.planner_data = Member(owner, name)
        index.write_bytes(pickle.dumps(metadata))
        resign(copy)
        assert "do not load" in refused(copy, ".metadata").fix
    metadata.planner_data = Member(_MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT")
    index.write_bytes(pickle.dumps(metadata))
    assert guarded_load(index).planner_data is _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT


def test_code_in_the_common_file_is_not_run(copy: Path, tmp_path: Path) -> None:
    torch.save({"x": Evil(tmp_path / "owned")}, copy / "weights" / "common.pt")
    assert zipfile.is_zipfile(copy / "weights" / "common.pt")
    resign(copy)
    refused(copy, "common.pt")
    assert not (tmp_path / "owned").exists()


def test_code_among_the_tensors_is_not_run(copy: Path, tmp_path: Path) -> None:
    """An entry of a Python object: torch's loader would unpickle its bytes."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    index = copy / "weights" / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    metadata.state_dict_metadata["extra/shard_0_1"] = BytesStorageMetadata()
    index.write_bytes(pickle.dumps(metadata))
    resign(copy)
    refused(copy, "pickled Python objects", "extra/shard_0_1")


def test_code_in_a_tensor_file_is_not_run(copy: Path, tmp_path: Path) -> None:
    """A tensor's bytes replaced by a pickle with code, index adjusted."""
    import io

    index = copy / "weights" / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    buffer = io.BytesIO()
    torch.save(Evil(tmp_path / "owned"), buffer)
    (copy / "weights" / "__9_0.distcp").write_bytes(buffer.getvalue())
    for key, info in metadata.storage_data.items():
        if key.fqn == "decoder.final_layernorm.weight":
            metadata.storage_data[key] = type(info)("__9_0.distcp", 0, len(buffer.getvalue()))
    index.write_bytes(pickle.dumps(metadata))
    resign(copy)
    run = Run(LayoutConfig(), seed=21)
    with pytest.raises(CheckpointError):
        run.load(copy)
    assert not (tmp_path / "owned").exists()


# ---------------------------------------------------------------- full disk


def test_full_disk_leaves_the_last_checkpoint(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.checkpoint.filesystem import FileSystem

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = Run(LayoutConfig())
    with monkeypatch.context() as patch:
        patch.setattr(FileSystem, "create_stream", full)
        with pytest.raises(EnvironmentProblem) as caught:
            run.save(copy)
    assert "full" in caught.value.found
    assert "free space" in caught.value.fix
    assert checkpoint.verify(copy)["common"] == {"step": 2}
    run.save(copy)
    assert checkpoint.verify(copy)["common"] == {"step": 0}


def test_space_is_checked_before_writing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(LayoutConfig())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "total used free")(10**6, 10**6, 1000))
    with pytest.raises(EnvironmentProblem):
        run.save(copy)
    assert checkpoint.verify(copy)["common"] == {"step": 2}
