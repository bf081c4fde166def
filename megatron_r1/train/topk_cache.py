"""The teacher's k largest log-probabilities of every training position, computed once and kept on disk in chunks.

Layout of the folder (scratch: it is not part of the finished artifact):

    cache.json                    identity of the teacher, the data order and the numbers below; another identity: start over
    chunk-000000.safetensors      logprobs float32 [n, s, k] (descending), indices int32 [n, s, k]
    chunk-000000.json             bytes and SHA-256, written after the chunk: a chunk without it does not exist

Log-probabilities at the distillation temperature. In float32: float16 would save a quarter of the disk, but its rounding
(5e-4 near -1) makes gradient norms depend on the layout in the fourth digit. Legend: n samples of a chunk, s positions, k entries.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_r1.utils import io
from megatron_r1.utils.errors import ArtifactError, CheckpointError
from megatron_r1.utils.logging import get_logger

log = get_logger("train.topk_cache")
BYTES_PER_ENTRY = 4 + 4


class TopKCache:
    """Chunks of consecutive training samples. Every rank may write its own chunks; all read all of them."""

    def __init__(self, folder: Path, identity: dict[str, Any], *, samples: int, seq_length: int, top_k: int, chunk: int) -> None:
        self.folder, self.samples, self.seq_length, self.top_k, self.chunk = folder, samples, seq_length, top_k, chunk
        self.identity = {**identity, "samples": samples, "seq_length": seq_length, "top_k": top_k, "chunk": chunk}
        self.chunks = -(-samples // chunk)
        self._open: dict[int, Any] = {}

    @property
    def nbytes(self) -> int:
        """Size on disk when complete (tensors; headers add about 200 bytes a chunk)."""
        return self.samples * self.seq_length * self.top_k * BYTES_PER_ENTRY

    def prepare(self) -> None:
        """Make the folder; throw away what belongs to another identity. Rank 0 only; a barrier must follow."""
        header = self.folder / "cache.json"
        try:
            known = io.read_json(header) if header.exists() else None
        except ArtifactError:
            known = None
        if known is not None and known != self.identity:
            changed = sorted(key for key in {*known, *self.identity} if known.get(key) != self.identity.get(key))
            log.warning("teacher cache in %s was made for something else (%s differ): made again", self.folder.name, ", ".join(changed))
        if known != self.identity:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            io.atomic_write_json(header, self.identity)

    def rows(self, chunk: int) -> range:
        """Samples of a chunk."""
        return range(chunk * self.chunk, min((chunk + 1) * self.chunk, self.samples))

    def _paths(self, chunk: int) -> tuple[Path, Path]:
        stem = self.folder / f"chunk-{chunk:06d}"
        return stem.with_suffix(".safetensors"), stem.with_suffix(".json")

    def complete(self, chunk: int) -> bool:
        """True when the chunk is there and its checksum is right; a damaged one is named in the log."""
        data, receipt = self._paths(chunk)
        if not receipt.exists():
            return False
        try:
            record = io.read_json(receipt)
            if data.stat().st_size == record["bytes"] and io.sha256_file(data) == record["sha256"]:
                return True
        except (ArtifactError, OSError, KeyError, TypeError):
            pass
        log.warning("teacher cache: %s is damaged and will be computed again", data.name)
        return False

    def write(self, chunk: int, logprobs: Tensor, indices: Tensor) -> None:
        """Store one chunk: logprobs and indices [n, s, k]. Raises EnvironmentProblem when the disk is full."""
        data, receipt = self._paths(chunk)
        receipt.unlink(missing_ok=True)
        temporary = data.with_name(f".{data.name}.tmp")
        tensors = {"logprobs": logprobs.to(torch.float32).contiguous().cpu(), "indices": indices.to(torch.int32).contiguous().cpu()}
        with io.disk_errors(data):
            save_file(tensors, temporary)
            os.replace(temporary, data)
        io.atomic_write_json(receipt, {"bytes": data.stat().st_size, "sha256": io.sha256_file(data)})

    def read(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """logprobs float32 and indices int64, [count, s, k], of consecutive samples. Raises CheckpointError on a damaged chunk."""
        pieces = []
        while count:
            chunk, offset = divmod(first, self.chunk)
            take = min(count, len(self.rows(chunk)) - offset)
            try:
                if chunk not in self._open:
                    # One open chunk suffices: samples are read in order.
                    self._open = {chunk: safe_open(self._paths(chunk)[0], framework="pt")}
                handle = self._open[chunk]
                pieces.append(tuple(handle.get_slice(name)[offset : offset + take] for name in ("logprobs", "indices")))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    expected=f"readable {self._paths(chunk)[0]}", found=str(error), fix="run the same command again: damaged chunks are computed again",
                ) from error
            first, count = first + take, count - take
        logprobs, indices = (torch.cat(parts) for parts in zip(*pieces))
        return logprobs, indices.long()
