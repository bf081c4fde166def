"""The export stage: write the folder, prove it, describe it.

    hf/           config.json, model.safetensors, generation_config.json, tokenizer files, README.md
    parity.json   the proof; the artifact is not completed without it
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

import torch

from megatron_r1.artifacts.base import Artifact, Workspace
from megatron_r1.artifacts.checkpoint import CheckpointSet
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.export.card import model_card
from megatron_r1.export.config import ExportConfig
from megatron_r1.export.parity import prove, require
from megatron_r1.export.to_hf import rounded, write_hf_folder
from megatron_r1.model.config import ModelConfig
from megatron_r1.model.generate import whole
from megatron_r1.model.load import load_model
from megatron_r1.parallel.config import LayoutConfig
from megatron_r1.parallel.context import initialize
from megatron_r1.utils import io
from megatron_r1.utils.errors import ArtifactError
from megatron_r1.utils.logging import get_logger

log = get_logger("export")
FOLDER, PARITY = "hf", "parity.json"


def run(config: ExportConfig, inputs: Mapping[str, Any], work: Workspace) -> Artifact | None:
    """Export the final checkpoint of `inputs["checkpoint"]`. Raises CheckpointError when the proof fails.

    One process works. Under torchrun every rank must call this, because loading a checkpoint is collective; ranks other
    than 0 return None after that.
    """
    checkpoint = CheckpointSet.open(inputs["checkpoint"])
    evaluation: Artifact | None = inputs.get("evaluation")
    if evaluation is not None:
        _same_model(checkpoint, evaluation)
    model_config = ModelConfig.model_validate(checkpoint.model)
    tokenizer = Tokenizer.load(checkpoint.tokenizer_folder)
    ctx = initialize(LayoutConfig(), config.seed or 0)
    model = load_model(checkpoint.final, ctx)
    if not ctx.is_main:
        return None
    folder = work.path / FOLDER
    shutil.rmtree(folder, ignore_errors=True)  # an interrupted attempt; writing takes seconds
    write_hf_folder(folder, whole(model).state_dict(), model_config, tokenizer, config.dtype)
    changed = _round_in_place(model, config.dtype)
    parity = prove(folder, model, tokenizer, config.parity) | {"dtype": config.dtype, "largest_weight_change_by_rounding": changed}
    io.atomic_write_json(work.path / PARITY, parity)
    require(parity)
    log.info("parity: logits within %.2g, %d greedy tokens equal on %d prompts", parity["largest_logit_difference"], config.parity.greedy_tokens, len(parity["prompts"]))
    io.atomic_write_text(folder / "README.md", model_card(checkpoint, model_config, config.dtype, parity, evaluation))
    return work.complete(
        {"parameters": model_config.parameters(), "dtype": config.dtype, "largest_logit_difference": parity["largest_logit_difference"], "parity": "passed"}
    )


def _same_model(checkpoint: CheckpointSet, evaluation: Artifact) -> None:
    measured = evaluation.json("evaluation.json")["checkpoint"]["fingerprint"]
    if measured != checkpoint.artifact.fingerprint:
        raise ArtifactError(
            expected=f"an evaluation of {checkpoint.artifact.name} ({checkpoint.artifact.fingerprint[:12]}...)",
            found=f"{evaluation.name} measured {measured[:12]}...", fix="name the evaluate step of the exported checkpoint, or none",
        )


@torch.no_grad()
def _round_in_place(model: Any, dtype: str) -> float:
    """Round the weights as the export did; returns the largest change."""
    state = {name: parameter for name, parameter in whole(model).named_parameters()}
    changed = 0.0
    for name, value in rounded(state, dtype).items():
        changed = max(changed, float((state[name].float() - value).abs().max()))
        state[name].copy_(value)
    return changed
