"""Tensors of torch's distributed format, read from its files straight to where they belong.

torch's own reader takes one tensor after the other, on one thread, from the file into Python's memory, then into a new tensor and then to its
place, whole tensors where a few rows are wanted. Here threads read the bytes that are wanted, and on a CPU the system copies them where they belong.
Nothing is unpickled but the index, by `pickle_guard`; what a tensor's own pickle says is looked at without calling anything it names.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_r1.parallel.mcore import ShardedTensor
from megatron_r1.parallel.pickle_guard import guarded_load
from megatron_r1.utils.errors import CheckpointError

THREADS = 4
_ANOTHER_MODEL = "check that the model's configuration is the one the checkpoint was trained with"
_LOCAL_HEADER, _LENGTHS = 30, 26  # of a zip member: size of the fixed part, and where the lengths of name and extra field stand


@dataclass(frozen=True)
class _Piece:
    """A rectangle of a stored chunk and the tensor it goes to. `low`: its corner in the chunk; `size`: of the chunk."""

    file: Path
    offset: int
    length: int
    dtype: torch.dtype
    size: tuple[int, ...]
    low: tuple[int, ...]
    target: Tensor


def read(folder: Path, wanted: Sequence[ShardedTensor]) -> None:
    """Fill the data of `wanted` in place from the checkpoint's `folder`, whatever layout it was saved under; other types are converted.

    Not collective. Nothing is changed before all names and shapes are found right. Raises CheckpointError when the checkpoint lacks a tensor or
    has it in another shape, OSError when a file can not be read.
    """
    index = guarded_load(folder / ".metadata")
    places = {(where.fqn, tuple(where.offset or ())): record for where, record in index.storage_data.items()}
    pieces = [piece for entry in wanted for piece in _pieces(folder, index.state_dict_metadata, places, entry)]
    with torch.no_grad(), ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(_fetch, sorted(pieces, key=lambda piece: (piece.file, piece.offset))):
            pass


def _pieces(folder: Path, stored: dict[str, Any], places: dict[Any, Any], entry: ShardedTensor) -> list[_Piece]:
    """What to read for one entry."""
    if entry.key not in stored:
        raise CheckpointError(expected=f"a tensor {entry.key} of {tuple(entry.global_shape)} in {folder.parent}", found="none of that name", fix=_ANOTHER_MODEL)
    record = stored[entry.key]
    if tuple(record.size) != tuple(entry.global_shape):
        raise CheckpointError(
            expected=f"{entry.key} of shape {tuple(entry.global_shape)} in {folder.parent}", found=f"shape {tuple(record.size)}", fix=_ANOTHER_MODEL
        )
    target = entry.data.detach()[(None,) * entry.prepend_axis_num]
    begin, found, filled = entry.global_offset, [], 0
    for chunk in record.chunks:
        low = [max(a, b) for a, b in zip(begin, chunk.offsets)]
        high = [min(a + n, b + m) for a, n, b, m in zip(begin, target.shape, chunk.offsets, chunk.sizes)]
        if any(a >= b for a, b in zip(low, high)):
            continue
        part = target[tuple(slice(a - b, c - b) for a, b, c in zip(low, begin, high))]
        place = places[entry.key, tuple(chunk.offsets)]
        corner = tuple(a - b for a, b in zip(low, chunk.offsets))
        found.append(_Piece(folder / place.relative_path, place.offset, place.length, record.properties.dtype, tuple(chunk.sizes), corner, part))
        filled += part.numel()
    if filled != target.numel():
        raise CheckpointError(
            expected=f"all {target.numel()} numbers of {entry.key} from {tuple(begin)} in {folder.parent}", found=f"{filled}", fix="use another checkpoint"
        )
    return found


def _fetch(piece: _Piece) -> None:
    target = piece.target
    with open(piece.file, "rb", buffering=0) as stream:
        start, stride = _payload(stream, piece)
        first = start + piece.dtype.itemsize * sum(a * s for a, s in zip(piece.low, stride))
        count = 1 + sum((n - 1) * s for n, s in zip(target.shape, stride))  # numbers from the first to the last one wanted
        if target.device.type == "cpu" and target.dtype == piece.dtype and target.is_contiguous() and _one_run(target.shape, stride):
            _fill(stream.fileno(), first, target.view(-1), piece.file)
            return
        room = torch.empty(count, dtype=piece.dtype)
        _fill(stream.fileno(), first, room, piece.file)
    target.copy_(room.as_strided(target.shape, stride))


def _one_run(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether numbers of this shape and stride lie one after the other."""
    expected = 1
    for length, step in zip(reversed(shape), reversed(stride)):
        if length > 1 and step != expected:
            return False
        expected *= length
    return True


def _fill(descriptor: int, start: int, room: Tensor, file: Path) -> None:
    """Bytes of the file from `start` into a one-dimensional tensor. The lock of Python is free meanwhile."""
    view = memoryview(room.view(torch.uint8).numpy())
    while view:
        if not (count := os.preadv(descriptor, [view], start)):
            raise CheckpointError(expected=f"{len(view)} more bytes in {file}", found="its end", fix="use another checkpoint")
        view, start = view[count:], start + count


# ---------------------------------------------------------------- one tensor's archive


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        self._descriptor, self._start, self._length, self._at = descriptor, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence] + offset
        return self._at

    def readinto(self, room: Any) -> int:
        count = os.preadv(self._descriptor, [memoryview(room)[: max(0, self._length - self._at)]], self._start + self._at)
        self._at += count
        return count


class _Recipe(pickle.Unpickler):
    """What a tensor's pickle would call, as plain tuples: nothing is imported, nothing called."""

    def find_class(self, module: str, name: str) -> Any:
        return lambda *arguments: (f"{module}.{name}", *arguments)

    def persistent_load(self, pid: Any) -> Any:
        return pid


def _payload(stream: io.FileIO, piece: _Piece) -> tuple[int, tuple[int, ...]]:
    """Where the numbers of the chunk begin in the file, and their stride. Raises CheckpointError for anything but a tensor as `torch.save` writes it."""
    size = tuple(piece.size)
    numbers = 1
    for length in size:
        numbers *= length
    try:
        archive = zipfile.ZipFile(_Window(stream.fileno(), piece.offset, piece.length))
        root = archive.namelist()[0].split("/")[0]
        name, _, offset, shape, stride, *_ = _Recipe(io.BytesIO(archive.read(f"{root}/data.pkl"))).load()
        member = archive.getinfo(f"{root}/data/0")
        at = piece.offset + member.header_offset
        lengths = struct.unpack("<HH", os.pread(stream.fileno(), 4, at + _LENGTHS))
        # A chunk cut out along more axes than the tensor has (layers are numbered along one) is stored without those.
        stride = (1,) * (len(size) - len(stride)) + tuple(stride)
        whole = name == "torch._utils._rebuild_tensor_v2" and tuple(shape) == size[len(size) - len(shape) :] and offset == 0
        if whole and member.compress_type == zipfile.ZIP_STORED and member.file_size == numbers * piece.dtype.itemsize:
            return at + _LOCAL_HEADER + sum(lengths), stride
        found = f"{name} of shape {tuple(shape)}, {member.file_size} bytes"
    except (zipfile.BadZipFile, pickle.UnpicklingError, KeyError, ValueError, TypeError, IndexError, AttributeError, struct.error, EOFError) as error:
        found = f"{type(error).__name__}: {error}"
    raise CheckpointError(
        expected=f"a tensor {piece.dtype} of shape {size} at byte {piece.offset} of {piece.file}", found=found,
        fix="do not load this checkpoint: it was not written by this software, or it was tampered with",
    )
