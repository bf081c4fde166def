"""Checkpoints: whole or absent, verified before they are opened, loadable under any layout.

    <checkpoint>/
      weights/            megatron-core's torch_dist format: model tensors and, if saved, optimizer tensors, by global name
      rng/rank-00000.json generators of each process
      common.json         what the trainer stores (JSON only) and what this module needs to load
      checksums.json      size of every file above and SHA-256 of every 64 MiB of it; written last

Everything is written under a temporary name, flushed, and renamed when `checksums.json` is complete, so a checkpoint with
its final name is complete. The optimizer's moments are stored under the model's own names and places, whatever optimizer kept
them (whole, mixed precision, or sharded over data-parallel ranks, each of which stores its own part): any of them continues from any other.
"""

from __future__ import annotations

import base64
import json
import math
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_r1.parallel import device as _device
from megatron_r1.parallel import tensor_files
from megatron_r1.parallel.context import ParallelContext
from megatron_r1.parallel.ddp import gather_weights, unwrap
from megatron_r1.parallel.mcore import (
    MegatronOptimizer,
    PlannedSave,
    ShardedTensor,
    ShardedTensorFactory,
    dist_checkpointing,
    is_main_replica,
    nested_values,
    quietly,
)
from megatron_r1.parallel.optimizer import adam_step, local_states, set_adam_step
from megatron_r1.parallel.pickle_guard import check_index
from megatron_r1.utils.errors import ArtifactError, CheckpointError, EnvironmentProblem, R1Error
from megatron_r1.utils.io import (
    atomic_write_json,
    disk_errors,
    fsync_directory,
    read_json,
    require_free_space,
    sha256_file,
)

FORMAT = 2  # 1 had one SHA-256 for the whole of a file
PIECE = 64 << 20
HASH_THREADS = 4
_CHECKSUMS, _COMMON, _WEIGHTS = "checksums.json", "common.json", "weights"


# ------------------------------------------------------------------------------------------------ save


class PendingSave:
    """A checkpoint on its way to the disk. `finish` must be called, by every rank; until then nothing has its final name."""

    def __init__(self, path: Path, ctx: ParallelContext, plan: PlannedSave, kept: dict[str, Any], background: bool) -> None:
        self.path, self._ctx, self._plan, self._kept = path, ctx, plan, kept
        self._partial = _partial(path)
        self._outcome: tuple[Any, Exception | None] = (None, None)
        self._rng = _rng_texts(ctx)
        self._thread = threading.Thread(target=self._write, name=f"save {path.name}") if background else None
        self._thread.start() if self._thread else self._write()

    def _write(self) -> None:
        """This rank's files and their checksums. No communication: it may run beside a training step."""
        try:
            with disk_errors(self.path):
                written = self._plan.write()
                atomic_write_json(self._partial / "rng" / f"rank-{self._ctx.rank:05d}.json", self._rng)
                self._outcome = ((written, _hash_own_files(self._partial, self._ctx)), None)
        except (R1Error, OSError) as error:
            self._outcome = (None, error)
        except Exception as error:  # kept for `finish`, which raises it on every rank: a thread's error would be lost
            found = f"{type(error).__name__}: {str(error).strip()[:300]}"
            self._outcome = (None, CheckpointError(expected=f"{self.path} to be written", found=found, fix="run the same command again; if it stays, report it"))

    def ready(self) -> bool:
        """Whether every rank has written its part (or failed to), so that `finish` will not wait. Collective."""
        busy = torch.tensor([float(self._thread is not None and self._thread.is_alive())], device=self._ctx.device)
        return not bool(self._ctx.all_reduce_max(busy, over="world"))

    def finish(self) -> None:
        """Wait for the writing and commit: index, checksums, fsync, rename. Collective. Raises what went wrong, on every rank."""
        if self._thread is not None:
            self._thread.join()
        parts = self._ctx.agree(*self._outcome)
        with disk_errors(self.path):
            self._ctx.on_main(lambda: self._commit(parts))

    def close(self) -> bool:
        """End without communication, when the program fails for another reason: wait for the thread, commit if that needs no other rank.

        Returns whether the checkpoint is complete; otherwise nothing has its final name.
        """
        if self._ctx.world_size == 1:
            self.finish()
            return True
        if self._thread is not None:
            self._thread.join()
        return False

    def _commit(self, parts: list[tuple[Any, dict[str, dict[str, Any]]]]) -> None:
        partial, files = self._partial, {name: record for _, part in parts for name, record in part.items()}
        self._plan.finish([written for written, _ in parts])
        atomic_write_json(partial / _COMMON, self._kept)
        for file in sorted(partial.rglob("*")):
            name = file.relative_to(partial).as_posix()
            if file.is_file() and name not in files:
                with open(file, "rb") as stream:
                    os.fsync(stream.fileno())
                files[name] = _record(file)
        atomic_write_json(partial / _CHECKSUMS, {"format": FORMAT, "piece": PIECE, "files": dict(sorted(files.items()))})
        for folder in (partial / _WEIGHTS, partial / "rng", partial):
            fsync_directory(folder)
        _replace(partial, self.path)


def save(path: Path, chunks: Sequence[nn.Module], optimizer: MegatronOptimizer | None, common: dict[str, Any], ctx: ParallelContext) -> None:
    """Write a checkpoint to `path` (replacing one of that name). Collective; returns when it is complete on disk.

    `chunks` wrapped or not; `optimizer` None stores the weights alone; `common`: anything JSON can hold.
    Raises EnvironmentProblem when the disk is full; then nothing of that name has appeared.
    """
    begin_save(path, chunks, optimizer, common, ctx).finish()


def begin_save(
    path: Path, chunks: Sequence[nn.Module], optimizer: MegatronOptimizer | None, common: dict[str, Any], ctx: ParallelContext,
    copies: _device.HostCopies | None = None,
) -> PendingSave:
    """As `save`, in two parts: plan, and with `copies` copy the state to host memory and return while a thread writes it.

    Training may go on at once, `copies` belong to this save until its `finish`, which every rank calls. Without `copies` the
    tensors are written before it returns.
    """
    path = Path(path)
    partial = _partial(path)
    gather_weights(chunks)
    weights, moments = _stored(chunks, optimizer)
    has_main = any(entry.key.startswith("optimizer.main.") for entry in moments)
    kept = {
        "format": FORMAT,
        "common": json.loads(json.dumps(common, allow_nan=False)),  # as it is now: the trainer goes on changing its own
        "optimizer": None if optimizer is None else {"step": adam_step(optimizer)},
        "main_weights": has_main,
        "saved_with": {"world_size": ctx.world_size, "layout": ctx.layout.plain()},
    }

    sizes = ctx.gather_objects([_bytes(weights), _bytes(moments)])

    def prepare() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        (partial / _WEIGHTS).mkdir(parents=True)
        (partial / "rng").mkdir()
        of_weights, of_moments = (sum(part) for part in zip(*sizes))
        what = f"a checkpoint: weights {of_weights / 2**30:.2f} GiB + optimizer {of_moments / 2**30:.2f} GiB + 2 %"
        require_free_space(path.parent, int(1.02 * (of_weights + of_moments)), what)

    plan = PlannedSave(copies)
    with disk_errors(path):
        ctx.on_main(prepare)
        with quietly():
            dist_checkpointing.save({str(i): entry for i, entry in enumerate([*weights, *moments])}, str(partial / _WEIGHTS), sharded_strategy=plan)
    return PendingSave(path, ctx, plan, kept, background=copies is not None)


def reserve(copies: _device.HostCopies, chunks: Sequence[nn.Module], optimizer: MegatronOptimizer | None) -> None:
    """Let `copies` ask, beside training, for the memory that saving takes, so that the first save waits no longer than later ones."""
    weights, moments = _stored(chunks, optimizer)
    copies.reserve([entry.data for entry in [*weights, *moments] if is_main_replica(entry.replica_id)])


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _replace(partial: Path, path: Path) -> None:
    old = path.with_name(f".{path.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.rename(path, old)
    os.rename(partial, path)
    fsync_directory(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _hash_own_files(folder: Path, ctx: ParallelContext) -> dict[str, dict[str, Any]]:
    """Checksums of what this rank wrote: each rank reads back its own, so large checkpoints are hashed in parallel."""
    files = [*(folder / _WEIGHTS).glob(f"__{ctx.rank}_*.distcp"), folder / "rng" / f"rank-{ctx.rank:05d}.json"]
    return {file.relative_to(folder).as_posix(): _record(file) for file in files}


def _record(file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    # One thread: training goes on beside it.
    return {"bytes": size, "sha256": [sha256_file(file, start, PIECE) for start in range(0, max(1, size), PIECE)]}


def _rng_texts(ctx: ParallelContext) -> dict[str, str]:
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in _device.rng_state(ctx.device).items()}


# ------------------------------------------------------------------------------------------------ verify, load


def verify(path: Path, ctx: ParallelContext) -> dict[str, Any]:
    """Check that every file is there, of its recorded size and SHA-256, and that no pickle names anything unexpected.

    Collective: every rank hashes its share of the bytes, on several threads. Returns the content of common.json. Raises CheckpointError naming
    the damaged file, on every rank; EnvironmentProblem for a checkpoint of a later release, which is not damaged.
    """
    path = Path(path)
    pieces = ctx.on_main(lambda: _listed(path))
    mine = pieces[ctx.rank * len(pieces) // ctx.world_size : (ctx.rank + 1) * len(pieces) // ctx.world_size]

    def check() -> None:
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            for _ in pool.map(lambda piece: _check_piece(path, *piece), mine):
                pass

    ctx.everywhere(check)

    def read() -> dict[str, Any]:
        check_index(path / _WEIGHTS)
        return read_json(path / _COMMON)

    return ctx.on_main(read)


_ANOTHER = "use another checkpoint, or delete this folder and run the same command again to write it anew"


def _listed(path: Path) -> list[tuple[str, int, int, str]]:
    """(file, start, bytes, SHA-256) of everything that checksums.json lists, once the files are found to be those, and of the right sizes."""
    pieces = []
    try:
        record = read_json(path / _CHECKSUMS)
        if record["format"] > FORMAT:
            raise EnvironmentProblem(
                expected=f"a checkpoint of format {FORMAT} or earlier in {path}", found=f"format {record['format']}", fix="use the release that wrote it, or a later one"
            )
        for name, listed in record["files"].items():
            size = _size(path / name, listed["bytes"])
            digests, step = (listed["sha256"], record["piece"]) if record["format"] > 1 else ([listed["sha256"]], max(1, size))
            starts = range(0, max(1, size), step)
            pieces += [(name, start, min(step, size - start), digest) for start, digest in zip(starts, digests, strict=True)]
    except (ArtifactError, KeyError, TypeError, ValueError, AttributeError) as error:
        found = "no such folder" if not path.is_dir() else "it is missing or damaged: the checkpoint was never completed"
        raise CheckpointError(expected=f"a checkpoint with {_CHECKSUMS} in {path}", found=found, fix=_ANOTHER) from error
    unknown = [f for f in path.rglob("*") if f.is_file() and f.relative_to(path).as_posix() not in {*record["files"], _CHECKSUMS}]
    if unknown:
        raise CheckpointError(expected=f"only the files listed in {_CHECKSUMS}", found=f"{unknown[0]}", fix=_ANOTHER)
    return pieces


def _size(file: Path, expected: int) -> int:
    if not file.is_file():
        raise CheckpointError(expected=f"{file}", found="the file is missing", fix=_ANOTHER)
    if (size := file.stat().st_size) != expected:
        raise CheckpointError(expected=f"{expected} bytes in {file}", found=f"{size} bytes: the file was cut short or changed", fix=_ANOTHER)
    return size


def _check_piece(path: Path, name: str, start: int, length: int, expected: str) -> None:
    if (digest := sha256_file(path / name, start, length)) != expected:
        raise CheckpointError(
            expected=f"SHA-256 {expected[:16]}… of {path / name} (bytes {start} to {start + length})", found=f"{digest[:16]}…: its content was damaged", fix=_ANOTHER
        )


def load(path: Path, chunks: Sequence[nn.Module], optimizer: MegatronOptimizer | None, ctx: ParallelContext, verified: bool = False) -> dict[str, Any]:
    """Verify `path` unless it is `verified` already, then fill `chunks` and, if given, `optimizer` from it; returns what `save` got as `common`.

    Collective. The layout may differ from the one it was saved under. With the same number of processes and an optimizer the random
    generators are restored too: training continues bit for bit. Raises CheckpointError, on every rank, when the checkpoint is damaged, or
    lacks something (another model, no optimizer state).
    """
    path = Path(path)
    kept = ctx.on_main(lambda: read_json(path / _COMMON)) if verified else verify(path, ctx)
    if optimizer is not None and kept["optimizer"] is None:
        raise CheckpointError(
            expected=f"optimizer state in {path}", found="weights only", fix="start the optimizer anew, or use a checkpoint saved with it"
        )
    has_main = kept["main_weights"]
    weights, moments = _stored(chunks, optimizer)
    # fp32 main weights hold more than the bf16 model: an fp32 model is read from them, and every model of format 1, where weights whose gathering
    # was overlapped were one update behind. The other way round where there are none.
    wanted = [_renamed(e, f"optimizer.main.{e.key}") if has_main and (e.dtype == torch.float32 or kept["format"] == 1) else e for e in weights]
    wanted += [entry if has_main else _renamed(entry, entry.key.removeprefix("optimizer.main.")) for entry in moments]
    ctx.everywhere(lambda: tensor_files.read(path / _WEIGHTS, wanted))
    if optimizer is not None:
        set_adam_step(optimizer, int(kept["optimizer"]["step"]))
        if kept["saved_with"]["world_size"] == ctx.world_size:
            ctx.everywhere(lambda: _read_rng(path, ctx))
    return kept["common"]


def load_second_moment(path: Path, chunks: Sequence[nn.Module], ctx: ParallelContext) -> tuple[dict[str, torch.Tensor], int]:
    """Adam's second moment for the parameters of `chunks`: (parameter name -> exp_avg_sq fp32, of the parameter's shape), step.

    Names are those of `unwrap(chunk).named_parameters()`, with `chunk<i>.` in front when there are several chunks.
    The value is the running mean as stored; Adam divides it by 1 - beta2^step. Raises CheckpointError as `load` does.
    """
    path = Path(path)
    kept = verify(path, ctx)
    if kept["optimizer"] is None:
        raise CheckpointError(
            expected=f"optimizer state in {path}", found="weights only", fix="save checkpoints with the optimizer, or use no Adam preconditioner"
        )
    result: dict[str, torch.Tensor] = {}
    wanted: list[ShardedTensor] = []
    for index, chunk in enumerate(chunks):
        names = {id(p): n for n, p in unwrap(chunk).named_parameters()}
        prefix = f"chunk{index}." if len(chunks) > 1 else ""
        for parameter, parts in _parts([chunk]):
            moment = result[prefix + names[id(parameter)]] = torch.empty_like(parameter, dtype=torch.float32, requires_grad=False)
            wanted += [_entry(part, f"optimizer.exp_avg_sq.{part.key}", moment.view(-1), first) for first, part in parts]
    ctx.everywhere(lambda: tensor_files.read(path / _WEIGHTS, wanted))
    return result, int(kept["optimizer"]["step"])


def _read_rng(path: Path, ctx: ParallelContext) -> None:
    states = read_json(path / "rng" / f"rank-{ctx.rank:05d}.json")
    loaded = {name: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8) for name, text in states.items()}
    _device.set_rng_state(loaded, ctx.device)


# ------------------------------------------------------------------------------------------------ what is stored


def _stored(chunks: Sequence[nn.Module], optimizer: MegatronOptimizer | None) -> tuple[list[ShardedTensor], list[ShardedTensor]]:
    """What this process holds of a checkpoint, with global names and places: model tensors, optimizer tensors. Their data are the live tensors.

    Optimizer tensors are named `optimizer.<kind>.<name of the parameter>` and have its shape and place. Of a distributed optimizer's each process has those
    rectangles of a parameter that make up its part, so nothing is exchanged to save or load them.
    """
    parts = {id(parameter): found for parameter, found in _parts(chunks)}
    weights = [_entry(part, part.key, part.data.view(-1), 0) for found in parts.values() for _, part in found]
    moments = []
    for parameter, span, tensors in local_states(optimizer) if optimizer is not None else ():
        begin, end = (0, parameter.numel()) if span is None else (span.start, span.stop)
        for kind, tensor in tensors.items():
            flat = tensor.detach().view(-1)
            for first, part in parts[id(parameter)]:
                low, high = max(begin, first), min(end, first + part.data.numel())
                for corner, shape, start in _rectangles(tuple(part.local_shape), low - first, high - first):
                    moments.append(_entry(part, f"optimizer.{kind}.{part.key}", flat, first + start - begin, corner, shape, whole=span is None))
    return weights, sorted(moments, key=lambda entry: (entry.key, entry.global_offset))


def _parts(chunks: Sequence[nn.Module]) -> list[tuple[nn.Parameter, list[tuple[int, ShardedTensor]]]]:
    """Every parameter of this process with its rectangles of global tensors, and where each begins in the flattened parameter: one, but two for
    the gated MLP's input matrix. Only parameters: Transformer Engine's modules also have an extra state, but with scales from the tensor at hand nothing is in it."""
    found: dict[int, tuple[nn.Parameter, list[tuple[int, ShardedTensor]]]] = {}
    for chunk in chunks:
        for entry in unwrap(chunk).sharded_state_dict().values():
            if isinstance(entry, ShardedTensor | ShardedTensorFactory):
                parameter = entry.data
                built = nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]
                starts = [(part.data.storage_offset() - parameter.storage_offset(), part) for part in built]
                found.setdefault(id(parameter), (parameter, []))[1].extend(starts)
    return list(found.values())


def _entry(
    part: ShardedTensor, key: str, flat: torch.Tensor, start: int, corner: Sequence[int] | None = None, shape: Sequence[int] | None = None, whole: bool = True,
) -> ShardedTensor:
    """Numbers of `flat` from `start` on as the rectangle of `part` (all of it by default) that begins at `corner`, under the name `key`.

    Not `whole`: a part that no other process of the data-parallel group has.
    """
    shape = tuple(part.local_shape if shape is None else shape)
    lead = (1,) * part.prepend_axis_num
    offset = [a + b for a, b in zip(part.global_offset, (*(0,) * len(lead), *(corner or (0,) * len(shape))))]
    data = flat.detach()[start : start + math.prod(shape)].view(lead + shape)
    replica = part.replica_id if whole else (*part.replica_id[:-1], 0)
    return ShardedTensor(key, data, data.dtype, tuple(data.shape), tuple(part.global_shape), tuple(offset), None, replica)


def _rectangles(shape: tuple[int, ...], low: int, high: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Numbers `low` to `high` of a flattened tensor of `shape` as rectangles, in order: (corner, shape, first number)."""
    if low >= high:
        return
    if (low, high) == (0, math.prod(shape)):
        yield (0,) * len(shape), shape, low
        return
    row = math.prod(shape[1:])
    first, last = -(-low // row), high // row
    if first > last:  # within one row
        cuts = [(last, low, high)]
    else:
        cuts = [(first - 1, low, first * row), (last, last * row, high)]
    for index, (at, begin, end) in enumerate(cuts):
        if index and first < last:
            yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:]), first * row
        for corner, part, start in _rectangles(shape[1:], begin - at * row, end - at * row):
            yield (at, *corner), (1, *part), at * row + start


def _renamed(entry: ShardedTensor, key: str) -> ShardedTensor:
    return replace(entry, key=key)


def _bytes(entries: Sequence[ShardedTensor]) -> int:
    """What this process writes of them."""
    return sum(entry.data.numel() * entry.data.element_size() for entry in entries if is_main_replica(entry.replica_id))
