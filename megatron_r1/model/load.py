"""A trained model back from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from megatron_r1.model.build import Precision, R1Model, build_model
from megatron_r1.model.config import ModelConfig
from megatron_r1.parallel import checkpoint as store
from megatron_r1.parallel.context import ParallelContext
from megatron_r1.utils.errors import CheckpointError
from megatron_r1.utils.io import read_json


class HasPath(Protocol):
    """Anything with the folder of one checkpoint: `artifacts.checkpoint.CheckpointInfo` is one."""

    @property
    def path(self) -> Path: ...


def load_model(
    checkpoint: HasPath | Path, ctx: ParallelContext, precision: Precision = "fp32", config: ModelConfig | None = None
) -> list[R1Model]:
    """The chunks of this process with the checkpoint's weights, in evaluation mode (parameters still take gradients).

    `config`: the model's shape; None reads it from the train artifact the checkpoint lies in
    (`<artifact>/model.json` beside `<artifact>/checkpoints/<step>/`). fp32 takes the fp32 main weights where the checkpoint
    has them. Loads under any layout. Raises CheckpointError when the checkpoint is damaged or does not fit.
    """
    path = Path(checkpoint if isinstance(checkpoint, (str, Path)) else checkpoint.path)
    config = config or config_beside(path)
    chunks = build_model(config, ctx, seed=0, precision=precision)
    store.load(path, chunks, None, ctx)
    for chunk in chunks:
        chunk.eval()
    return chunks


def config_beside(path: Path) -> ModelConfig:
    """The shape written by the train stage for the checkpoint at `path`. Raises CheckpointError when there is none."""
    file = Path(path).resolve().parent.parent / "model.json"
    if not file.is_file():
        raise CheckpointError(
            expected=f"the model's shape in {file}",
            found="no such file",
            fix="give the path of a checkpoint inside a train artifact (<artifact>/checkpoints/<step>), or pass `config`",
        )
    return ModelConfig.model_validate(read_json(file))
