"""Checkpoints: whole or absent, verified before they are opened, loadable under any layout.

    <checkpoint>/
      weights/            megatron-core's torch_dist format: model tensors and, if saved, optimizer tensors, by global name
      rng/rank-00000.json generators of each process
      common.json         what the trainer stores (JSON only) and what this module needs to load
      checksums.json      size and SHA-256 of every file above; written last

Everything is written under a temporary name, flushed, and renamed when `checksums.json` is complete, so a checkpoint with
its final name is complete. The optimizer's moments are stored in the model's own shapes and names, whatever optimizer kept
them (whole, mixed precision, or sharded over data-parallel ranks): any of them continues from any other.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import CheckpointException

from megatron_r1.parallel import device as _device
from megatron_r1.parallel.context import ParallelContext
from megatron_r1.parallel.ddp import unwrap
from megatron_r1.parallel.mcore import MegatronOptimizer, PlannedSave, ShardedTensor, dist_checkpointing, quietly
from megatron_r1.parallel.optimizer import adam_step, local_states, set_adam_step
from megatron_r1.parallel.pickle_guard import check_index
from megatron_r1.utils.errors import ArtifactError, CheckpointError, R1Error
from megatron_r1.utils.io import (
    atomic_write_json,
    disk_errors,
    fsync_directory,
    read_json,
    require_free_space,
    sha256_file,
)

FORMAT = 1
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
        parts = _agree(self._ctx, self._outcome)
        with disk_errors(self.path):
            _on_main(self._ctx, lambda: self._commit(parts))

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
        atomic_write_json(partial / _CHECKSUMS, {"format": FORMAT, "files": dict(sorted(files.items()))})
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
    state = _sharded_model(chunks)
    moments = _sharded_moments(chunks, optimizer, gather=True) if optimizer is not None else {}
    has_main = any(entry.key.startswith("optimizer.main.") for entry in moments.values())
    kept = {
        "format": FORMAT,
        "common": json.loads(json.dumps(common, allow_nan=False)),  # as it is now: the trainer goes on changing its own
        "optimizer": None if optimizer is None else {"step": adam_step(optimizer)},
        "main_weights": has_main,
        "saved_with": {"world_size": ctx.world_size, "layout": ctx.layout.plain()},
    }

    def prepare() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        (partial / _WEIGHTS).mkdir(parents=True)
        (partial / "rng").mkdir()
        # Every process with other weights holds about as much as this one.
        others = ctx.tensor_size * ctx.pipeline_size
        weights, rest = (others * _local_bytes(list(entries.values())) for entries in (state, moments))
        what = f"a checkpoint: weights {weights / 2**30:.2f} GiB + optimizer {rest / 2**30:.2f} GiB + 2 %"
        require_free_space(path.parent, int(1.02 * (weights + rest)), what)

    plan = PlannedSave(copies)
    with disk_errors(path):
        _on_main(ctx, prepare)
        with quietly():
            dist_checkpointing.save({"model": state, "optimizer": moments}, str(partial / _WEIGHTS), sharded_strategy=plan)
    return PendingSave(path, ctx, plan, kept, background=copies is not None)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _everywhere(ctx: ParallelContext, action: Callable[[], Any]) -> list[Any]:
    """Run `action` on every rank; returns all results, or raises on every rank what failed on any (nobody waits for ever)."""
    try:
        outcome = (action(), None)
    except (R1Error, OSError) as error:
        outcome = (None, error)
    return _agree(ctx, outcome)


def _agree(ctx: ParallelContext, outcome: tuple[Any, Exception | None]) -> list[Any]:
    """Every rank's result, from each rank's (result, error); raises the first error, on every rank."""
    outcomes = ctx.gather_objects(outcome)
    for _, problem in outcomes:
        if problem is not None:
            raise problem
    return [value for value, _ in outcomes]


def _on_main(ctx: ParallelContext, action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0; every rank gets its result, or raises what it raised."""
    return _everywhere(ctx, lambda: action() if ctx.is_main else None)[0]


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
    return {"bytes": file.stat().st_size, "sha256": sha256_file(file)}


def _rng_texts(ctx: ParallelContext) -> dict[str, str]:
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in _device.rng_state(ctx.device).items()}


# ------------------------------------------------------------------------------------------------ verify, load


def verify(path: Path) -> dict[str, Any]:
    """Check that every file is there, of its recorded size and SHA-256, and that no pickle names anything unexpected.

    Returns the content of common.json. Raises CheckpointError naming the damaged file.
    """
    path = Path(path)
    fix = "use another checkpoint, or delete this folder and run the same command again to write it anew"
    try:
        files: dict[str, dict[str, Any]] = read_json(path / _CHECKSUMS)["files"]
    except (ArtifactError, KeyError, TypeError) as error:
        found = "no such folder" if not path.is_dir() else "it is missing or damaged: the checkpoint was never completed"
        raise CheckpointError(expected=f"a checkpoint with {_CHECKSUMS} in {path}", found=found, fix=fix) from error
    for name, record in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(expected=f"{file}", found="the file is missing", fix=fix)
        if file.stat().st_size != record["bytes"]:
            raise CheckpointError(
                expected=f"{record['bytes']} bytes in {file}", found=f"{file.stat().st_size} bytes: the file was cut short or changed", fix=fix
            )
        if (digest := sha256_file(file)) != record["sha256"]:
            raise CheckpointError(
                expected=f"SHA-256 {record['sha256'][:16]}… of {file}", found=f"{digest[:16]}…: its content was damaged", fix=fix
            )
    unknown = [f for f in path.rglob("*") if f.is_file() and f.relative_to(path).as_posix() not in {*files, _CHECKSUMS}]
    if unknown:
        raise CheckpointError(expected=f"only the files listed in {_CHECKSUMS}", found=f"{unknown[0]}", fix=fix)
    check_index(path / _WEIGHTS)
    return read_json(path / _COMMON)


def load(path: Path, chunks: Sequence[nn.Module], optimizer: MegatronOptimizer | None, ctx: ParallelContext) -> dict[str, Any]:
    """Verify `path`, then fill `chunks` and, if given, `optimizer` from it; returns what `save` got as `common`. Collective.

    The layout may differ from the one it was saved under. With the same number of processes and an optimizer the random
    generators are restored too: training continues bit for bit. Raises CheckpointError when the checkpoint is damaged, or
    lacks something (another model, no optimizer state).
    """
    path = Path(path)
    kept = _verified(path, ctx)
    state = _sharded_model(chunks)
    if kept["main_weights"]:
        # fp32 main weights hold more than the bf16 model: read the model from them.
        state = {name: _rename(entry, f"optimizer.main.{entry.key}") for name, entry in state.items()}
    _read(path, state)
    if optimizer is not None:
        if kept["optimizer"] is None:
            raise CheckpointError(
                expected=f"optimizer state in {path}", found="weights only", fix="start the optimizer anew, or use a checkpoint saved with it"
            )
        _load_moments(path, chunks, optimizer, kept["main_weights"])
        set_adam_step(optimizer, int(kept["optimizer"]["step"]))
        if kept["saved_with"]["world_size"] == ctx.world_size:
            _read_rng(path, ctx)
    ctx.barrier()
    return kept["common"]


def load_second_moment(path: Path, chunks: Sequence[nn.Module], ctx: ParallelContext) -> tuple[dict[str, torch.Tensor], int]:
    """Adam's second moment for the parameters of `chunks`: (parameter name -> exp_avg_sq fp32, of the parameter's shape), step.

    Names are those of `unwrap(chunk).named_parameters()`, with `chunk<i>.` in front when there are several chunks.
    The value is the running mean as stored; Adam divides it by 1 - beta2^step. Raises CheckpointError as `load` does.
    """
    path = Path(path)
    kept = _verified(path, ctx)
    if kept["optimizer"] is None:
        raise CheckpointError(
            expected=f"optimizer state in {path}", found="weights only", fix="save checkpoints with the optimizer, or use no Adam preconditioner"
        )
    result: dict[str, torch.Tensor] = {}
    entries: dict[str, Any] = {}
    for index, chunk in enumerate(chunks):
        names = {id(p): n for n, p in unwrap(chunk).named_parameters()}
        prefix = f"chunk{index}." if len(chunks) > 1 else ""
        for entry in _sharded_model([chunk]).values():
            name = prefix + names[id(entry.data)]
            result[name] = torch.empty_like(entry.data, dtype=torch.float32)
            entries[name] = _rename(entry, f"optimizer.exp_avg_sq.{entry.key}", result[name])
    _read(path, entries)
    return result, int(kept["optimizer"]["step"])


def _verified(path: Path, ctx: ParallelContext) -> dict[str, Any]:
    """`verify` once, on rank 0, for everybody: the files are shared."""
    return _on_main(ctx, lambda: verify(path))


def _read(path: Path, wanted: dict[str, Any]) -> None:
    """Fill the tensors of `wanted` (sharded entries) in place. Raises CheckpointError when they are not in the checkpoint."""
    targets = {name: entry.data for name, entry in wanted.items()}
    try:
        with quietly():
            loaded = dist_checkpointing.load(dict(wanted), path / _WEIGHTS)  # a copy: it changes the dictionary, and the entries
    except R1Error:
        raise
    except (Exception, CheckpointException) as error:  # torch's CheckpointException is not an Exception
        inner = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        reason = str(inner).strip().splitlines()
        raise CheckpointError(
            expected=f"tensors of this model in {path}",
            found=f"{type(inner).__name__}: {reason[0][:300] if reason else 'no message'}",
            fix="check that the model's configuration is the one the checkpoint was trained with",
        ) from error
    with torch.no_grad():
        for name, target in targets.items():
            if target.data_ptr() != loaded[name].data_ptr():
                target.copy_(loaded[name].reshape(target.shape))


def _read_rng(path: Path, ctx: ParallelContext) -> None:
    states = read_json(path / "rng" / f"rank-{ctx.rank:05d}.json")
    loaded = {name: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8) for name, text in states.items()}
    _device.set_rng_state(loaded, ctx.device)


# ------------------------------------------------------------------------------------------------ what is stored


def _sharded_model(chunks: Sequence[nn.Module]) -> dict[str, Any]:
    """Local name -> sharded entry (with its global name and place) of every model tensor of this process.

    Only parameters: extra state of modules is Python objects, and ours have none.
    """
    result = {}
    for index, chunk in enumerate(chunks):
        for name, entry in unwrap(chunk).sharded_state_dict().items():
            if isinstance(getattr(entry, "data", None), torch.Tensor):
                result[f"{index}.{name}"] = entry
    return result


def _rename(entry: Any, key: str, data: torch.Tensor | None = None) -> Any:
    """The same place in the whole tensor, under another name and with other data of the same shape."""
    changes: dict[str, Any] = {"key": key}
    if data is not None:
        changes["data"] = data
        if isinstance(entry, ShardedTensor):
            changes["dtype"] = data.dtype
    return replace(entry, **changes)


def _sharded_moments(chunks: Sequence[nn.Module], optimizer: MegatronOptimizer, gather: bool) -> dict[str, Any]:
    """Entries `<kind>.<local name>` of the optimizer's tensors in the shape of their parameters.

    `gather`: fill them (for saving), collecting the pieces of a distributed optimizer; else leave room to load into.
    """
    by_parameter = {id(entry.data): (name, entry) for name, entry in _sharded_model(chunks).items()}
    whole: dict[tuple[str, str], torch.Tensor] = {}
    split = False
    for parameter, span, tensors in local_states(optimizer):
        name, _ = by_parameter[id(parameter)]
        for kind, tensor in tensors.items():
            if span is None:
                whole[kind, name] = tensor.detach() if gather else torch.empty_like(tensor)
            else:
                split = True
                full = torch.zeros(parameter.shape, dtype=tensor.dtype, device=tensor.device)
                if gather:
                    full.view(-1)[span] = tensor.detach()
                whole[kind, name] = full
    if split:
        _complete_pieces(whole, by_parameter, gather)
    entries = {name: entry for name, entry in by_parameter.values()}
    return {f"{kind}.{name}": _rename(entries[name], f"optimizer.{kind}.{entries[name].key}", t) for (kind, name), t in sorted(whole.items())}


def _complete_pieces(whole: dict[tuple[str, str], torch.Tensor], by_parameter: dict[int, tuple[str, Any]], gather: bool) -> None:
    """Add up the pieces of a distributed optimizer over the processes it is cut over: the others' parts are zero, so sums are exact."""
    from megatron_r1.parallel.context import current

    ctx = current()
    kinds = sorted({kind for part in ctx.gather_objects(sorted({k for k, _ in whole})) for kind in part})
    for name, entry in sorted(by_parameter.values(), key=lambda item: item[0]):
        for kind in kinds:
            if (kind, name) not in whole:
                whole[kind, name] = torch.zeros(entry.data.shape, dtype=torch.float32, device=entry.data.device)
            if gather:
                ctx.all_reduce_sum(whole[kind, name], over="replicas")


def _load_moments(path: Path, chunks: Sequence[nn.Module], optimizer: MegatronOptimizer, has_main: bool) -> None:
    entries = _sharded_moments(chunks, optimizer, gather=False)
    if not has_main:
        # Saved in fp32: the model's weights are the main weights.
        entries = {k: _rename(e, e.key.removeprefix("optimizer.main.")) if k.startswith("main.") else e for k, e in entries.items()}
    room = {name: entry.data for name, entry in entries.items()}
    _read(path, entries)
    names = {id(entry.data): name for name, entry in _sharded_model(chunks).items()}
    with torch.no_grad():
        for parameter, span, tensors in local_states(optimizer):
            for kind, tensor in tensors.items():
                loaded = room[f"{kind}.{names[id(parameter)]}"]
                tensor.copy_(loaded if span is None else loaded.reshape(-1)[span])


def _local_bytes(entries: Sequence[Any]) -> int:
    return sum(entry.data.numel() * entry.data.element_size() for entry in entries)
