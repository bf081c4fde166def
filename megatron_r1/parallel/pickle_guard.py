"""No pickle is opened before it is known to name nothing but tensor bookkeeping.

torch's distributed checkpoint format stores its index (`.metadata`) as a pickle, and unpickling can run code. A checkpoint
is a file people pass around, so before anything else opens it, the index is read here by an unpickler that knows only the
classes listed below: anything else in the file ends in an error, never in a call. The tensors themselves are opened by
torch with `weights_only=True`; entries of arbitrary Python objects, which torch would unpickle, are refused.
"""

from __future__ import annotations

import enum
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

from megatron_r1.utils.errors import CheckpointError

_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED: dict[str, frozenset[str]] = {
    _METADATA: frozenset(
        {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        }
    ),
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo"}),
    "torch": frozenset({"Size", "float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"}),
    "torch.serialization": frozenset({"_get_layout"}),
    "collections": frozenset({"OrderedDict"}),
}


class _Guarded(pickle.Unpickler):
    def __init__(self, data: bytes, file: Path) -> None:
        super().__init__(io.BytesIO(data))
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return self._member
        if name not in _ALLOWED.get(module, frozenset()):
            raise CheckpointError(
                expected=f"{self._file} to hold tensor bookkeeping only",
                found=f"a reference to {module}.{name}, which loading it would call",
                fix="do not load this checkpoint: it was not written by this software, or it was tampered with",
            )
        return super().find_class(module, name)

    def _member(self, owner: Any, name: Any) -> Any:
        """What stands for `getattr`: Python 3.11.0 to 3.11.3 write a member of an enumeration as getattr(class, name). Nothing else is got by it."""
        if isinstance(owner, type) and issubclass(owner, enum.Enum) and name in owner.__members__:
            return owner.__members__[name]
        raise CheckpointError(
            expected=f"{self._file} to hold tensor bookkeeping only",
            found=f"a reference to builtins.getattr({owner!r}, {name!r}), which loading it would call",
            fix="do not load this checkpoint: it was not written by this software, or it was tampered with",
        )

    def persistent_load(self, pid: Any) -> Any:
        raise CheckpointError(
            expected=f"{self._file} without external references", found=f"{pid!r}", fix="do not load this checkpoint"
        )


def guarded_load(file: Path) -> Any:
    """Unpickle `file` if it names only allowed classes. Raises CheckpointError otherwise, or when it is damaged."""
    return _open(Path(file).read_bytes(), Path(file))


def check_index(folder: Path) -> None:
    """Check every pickle a torch_dist checkpoint in `folder` makes others open. Raises CheckpointError."""
    folder = Path(folder)
    index = guarded_load(folder / ".metadata")
    objects = sorted(k for k, v in index.state_dict_metadata.items() if type(v).__name__ != "TensorStorageMetadata")
    if objects:
        raise CheckpointError(
            expected=f"only tensors in {folder}",
            found=f"pickled Python objects ({', '.join(objects[:3])})",
            fix="do not load this checkpoint: ours hold tensors and JSON only",
        )
    common = folder / "common.pt"
    if common.exists():
        _check_torch_file(common)


def _check_torch_file(file: Path) -> None:
    """A torch.save archive that may hold plain containers, numbers and text only."""
    try:
        with zipfile.ZipFile(file) as archive:
            pickles = [name for name in archive.namelist() if name.endswith(".pkl")]
            contents = [archive.read(name) for name in pickles]
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            expected=f"{file} to be a torch archive", found=f"damaged content ({error})", fix="use another checkpoint"
        ) from error
    for content in contents:
        _open(content, file)


def _open(content: bytes, file: Path) -> Any:
    try:
        return _Guarded(content, file).load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise CheckpointError(
            expected=f"{file} to be readable", found=f"damaged content ({type(error).__name__}: {error})", fix="use another checkpoint"
        ) from error
