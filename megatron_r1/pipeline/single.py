"""One stage outside a recipe, for the commands that need no recipe."""

from __future__ import annotations

from pathlib import Path

from megatron_r1.artifacts.base import open_artifact, open_workspace
from megatron_r1.pipeline.stages import STAGES
from megatron_r1.utils.errors import ConfigError


def export_checkpoint(checkpoint: Path, folder: Path, dtype: str, command: str) -> str:
    """Export a training artifact to `folder` with the default parity proof. Returns what to tell the user."""
    if folder.exists():
        raise ConfigError(expected="a folder that does not exist yet", found=f"{folder} exists", fix="choose another folder or remove it")
    parent = open_artifact(checkpoint, "checkpoint", verify="full")
    stage = STAGES["export"]
    config = stage.config.model_validate({"stage": "export", "seed": 1, "inputs": {"checkpoint": parent.name}, "dtype": dtype})
    work = open_workspace(folder.parent, folder.name, stage.kind, config, {"checkpoint": parent}, command)
    artifact = stage.run(config, {"checkpoint": parent}, work)
    artifact.path.rename(folder)
    return f"model: {folder / 'hf'}\nproof: {folder / 'parity.json'}"
