"""Checkpoints: exact resume, every kind of damage, no foreign code, a full disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import random
import shutil
import threading
import types
import zipfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scenarios import MODEL, Run

from megatron_r1.model.build import build_model
from megatron_r1.model.load import load_model
from megatron_r1.parallel import checkpoint, tensor_files
from megatron_r1.parallel.config import LayoutConfig
from megatron_r1.parallel.device import HostCopies
from megatron_r1.parallel.mcore import ShardedTensor
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
    for change in ({"ffn_size": 256}, {"num_layers": 5}, {"tied_embeddings": False}, {"vocab_size": 320}):
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
        assert checkpoint.verify(tmp_path / "c", run.ctx)["common"] == {"step": step}
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


def test_a_flipped_bit_in_any_piece_of_a_file(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large files have a checksum for every piece of them, the last one shorter."""
    run = Run(LayoutConfig())
    run.load(saved)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "PIECE", 1_000_003)
        run.save(tmp_path / "c")
    tensors = tmp_path / "c" / "weights" / "__0_0.distcp"
    data = tensors.read_bytes()
    listed = json.loads((tmp_path / "c" / "checksums.json").read_text())["files"]["weights/__0_0.distcp"]
    assert listed["bytes"] == len(data)
    assert listed["sha256"] == [hashlib.sha256(data[start : start + 1_000_003]).hexdigest() for start in range(0, len(data), 1_000_003)]
    assert len(listed["sha256"]) > 3
    for position in (0, 1_000_002, 1_000_003, 2_500_000, len(data) - 1):
        tensors.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        refused(tmp_path / "c", "__0_0.distcp", f"bytes {position // 1_000_003 * 1_000_003} to", "damaged")
    tensors.write_bytes(data)
    checkpoint.verify(tmp_path / "c", run.ctx)


def test_a_later_format_is_not_taken_for_damage(copy: Path) -> None:
    record = json.loads((copy / "checksums.json").read_text())
    (copy / "checksums.json").write_text(json.dumps(record | {"format": checkpoint.FORMAT + 1}))
    with pytest.raises(EnvironmentProblem, match=f"format {checkpoint.FORMAT + 1}"):
        checkpoint.verify(copy, Run(LayoutConfig()).ctx)


@pytest.mark.parametrize("name", [*FILES, "checksums.json"])
def test_missing_file(name: str, copy: Path) -> None:
    (copy / name).unlink()
    refused(copy, name, "missing")


def test_extra_file(copy: Path) -> None:
    (copy / "weights" / "__9_0.distcp").write_bytes(b"x")
    refused(copy, "__9_0.distcp")


def test_damaged_list(copy: Path) -> None:
    record = json.loads((copy / "checksums.json").read_text())
    first = next(iter(record["files"].values()))
    short = {**record, "files": {**record["files"], "common.json": {**first, "bytes": (copy / "common.json").stat().st_size, "sha256": []}}}
    for text in ("{", "[]", "{}", json.dumps({**record, "piece": 0}), json.dumps({**record, "piece": "x"}), json.dumps({**record, "format": None}), json.dumps(short)):
        (copy / "checksums.json").write_text(text)
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
        f.relative_to(path).as_posix(): {"bytes": f.stat().st_size, "sha256": [sha256_file(f)]}
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


# ---------------------------------------------------------------- tensors and their places


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 5), max_size=4).map(tuple), st.data())
def test_a_range_of_a_tensor_as_rectangles(shape: tuple[int, ...], data: st.DataObject) -> None:
    """They are the range, in its order, and few."""
    numbers = np.arange(int(np.prod(shape))).reshape(shape)
    low = data.draw(st.integers(0, numbers.size))
    high = data.draw(st.integers(low, numbers.size))
    found, count = [], 0
    for corner, size, start in checkpoint._rectangles(shape, low, high):
        part = numbers[tuple(slice(a, a + n) for a, n in zip(corner, size))].reshape(-1)
        assert part[0] == start
        found += part.tolist()
        count += 1
    assert found == list(range(low, high))
    assert count <= max(1, 2 * len(shape) - 1)


def test_tensors_are_read_as_torch_reads_them(saved: Path) -> None:
    """Every tensor, and random parts of them into any type, against torch's reader of the format."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    expected: dict[str, torch.Tensor] = {}
    _load_state_dict(expected, storage_reader=FileSystemReader(saved / "weights"), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    assert any(tensor.dim() == 3 or "layers" in name for name, tensor in expected.items())
    draw = random.Random(3)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        wanted = []
        for name, whole in expected.items():
            low = [draw.randrange(n) for n in whole.shape]
            size = [draw.randint(1, n - a) for a, n in zip(low, whole.shape)]
            room = torch.full([n + 1 for n in size], -7.0, dtype=dtype)[tuple(slice(0, n) for n in size)]
            wanted.append(ShardedTensor(name, room, dtype, tuple(size), tuple(whole.shape), tuple(low), None))
        tensor_files.read(saved / "weights", wanted)
        for entry in wanted:
            part = expected[entry.key][tuple(slice(a, a + n) for a, n in zip(entry.global_offset, entry.local_shape))]
            assert torch.equal(entry.data, part.to(dtype)), entry.key
    entries = [ShardedTensor(name, torch.empty_like(t), t.dtype, tuple(t.shape), tuple(t.shape), (0,) * t.dim(), None) for name, t in expected.items()]
    tensor_files.read(saved / "weights", entries)
    assert all(torch.equal(entry.data, expected[entry.key]) for entry in entries)


def test_memory_asked_for_ahead_is_the_one_used() -> None:
    tensors = [torch.randn(1000, 7), torch.arange(5), torch.randn(3, 3, dtype=torch.bfloat16).t()]
    copies = HostCopies()
    copies.reserve(tensors)
    found = copies.take(tensors)
    memory = copies._memory
    assert memory is not None
    copies.reserve(tensors)
    again = copies.take(tensors[1:])
    assert copies._memory is memory, "neither grown nor made anew"
    for copy in (found[0], *again):
        assert copy.is_contiguous()
        assert copy.data_ptr() % 64 == 0
        assert memory.data_ptr() <= copy.data_ptr() < memory.data_ptr() + memory.numel()
    assert torch.equal(again[1], tensors[2])
    assert copies.take([torch.ones(10**5)])[0].sum() == 10**5


def test_the_thread_that_writes_leaves_the_gpu_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's writer beside a GPU waits for its stream, of the thread's GPU: for a thread that is the machine's first one."""
    from torch.distributed.checkpoint import filesystem

    class WithGpu:
        cuda = types.SimpleNamespace(is_available=lambda: True)

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    used: list[str] = []

    class Streamed(filesystem._SerialCpuLoader):
        def __init__(self, resolve: Any, inflight_threshhold: int) -> None:
            super().__init__(resolve)
            used.append(threading.current_thread().name)

    run = Run(LayoutConfig())
    monkeypatch.setattr(filesystem, "torch", WithGpu())
    monkeypatch.setattr(filesystem, "_OverlappingCpuLoader", Streamed)
    run.save(tmp_path / "waiting")
    assert used == ["MainThread"]
    checkpoint.begin_save(tmp_path / "beside", run.chunks, run.optimizer, {"step": 0}, run.ctx, HostCopies()).finish()
    assert used == ["MainThread"]
    for folder in ("waiting", "beside"):
        assert checkpoint.verify(tmp_path / folder, run.ctx)["common"] == {"step": 0}


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
    assert checkpoint.verify(copy, run.ctx)["common"] == {"step": 2}
    run.save(copy)
    assert checkpoint.verify(copy, run.ctx)["common"] == {"step": 0}


def test_space_is_checked_before_writing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(LayoutConfig())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "total used free")(10**6, 10**6, 1000))
    with pytest.raises(EnvironmentProblem):
        run.save(copy)
    assert checkpoint.verify(copy, run.ctx)["common"] == {"step": 2}
