"""Read a Hugging Face folder back: safetensors only, nothing in it is executed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megatron_r1.artifacts.base import Artifact, Workspace
from megatron_r1.artifacts.checkpoint import (
    CHECKPOINTS_FOLDER,
    LEDGER_FILE,
    METRICS_FILE,
    MODEL_FILE,
    TOKENIZER_FOLDER,
    TRAIN_FILE,
    CheckpointRecord,
    TrainManifest,
    checkpoint_folder,
)
from megatron_r1.data.tokenizer import Tokenizer, write_info
from megatron_r1.export.to_hf import CONFIG, TOKENIZER_CONFIG, WEIGHTS
from megatron_r1.model.build import build_model
from megatron_r1.model.config import ModelConfig
from megatron_r1.model.hf_map import canonical, from_hf, model_config
from megatron_r1.parallel import checkpoint as store
from megatron_r1.parallel.config import LayoutConfig
from megatron_r1.parallel.context import initialize
from megatron_r1.utils import io
from megatron_r1.utils.errors import CheckpointError, DataError

INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = (("tokenizer.json", "tokenizers"), ("tokenizer.model", "sentencepiece"))


def read_hf_folder(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Shape and megatron-core state dict (in the stored type) of a `llama4_text` folder.

    Raises CheckpointError when the folder holds another architecture, other weights files or damaged ones.
    """
    config = model_config(io.read_json(folder / CONFIG))
    return config, from_hf(read_weights(folder), config)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the shards its index names."""
    if (folder / WEIGHTS).is_file():
        files = [folder / WEIGHTS]
    elif (folder / INDEX).is_file():
        names = sorted(set(io.read_json(folder / INDEX)["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise CheckpointError(expected=f"file names without folders in {folder / INDEX}", found=", ".join(names), fix="use an index that transformers wrote")
        files = [folder / name for name in names]
    else:
        present = ", ".join(sorted(path.name for path in folder.glob("*"))) or "nothing"
        raise CheckpointError(
            expected=f"{WEIGHTS} (or {INDEX}) in {folder}", found=present,
            fix="pickled weights (pytorch_model.bin) are never read: save the model with safetensors first",
        )
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            state |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(expected=f"readable safetensors in {file}", found=str(error), fix="copy the file again from where it came from") from error
    return state


def import_hf(folder: Path, work: Workspace) -> Artifact:
    """Make a checkpoint artifact (as a train step does, at step 0) from a Hugging Face folder. One process only."""
    config, state = read_hf_folder(folder)
    ctx = initialize(LayoutConfig(), 0)
    chunks = build_model(config, ctx, seed=0)
    # strict=False only for megatron-core's empty "extra states"; that every tensor is there was checked by from_hf.
    chunks[0].load_state_dict(state, strict=False)
    wrong = [name for name, value in canonical(chunks[0].state_dict()).items() if name in state and not value.cpu().equal(state[name].to(value.dtype))]
    if wrong:
        raise CheckpointError(expected="the model to hold the imported weights", found=f"others in {wrong[0]}", fix="report this: the name table is wrong")
    tokenizer = import_tokenizer(folder, work.path / TOKENIZER_FOLDER)
    if tokenizer.vocab_size > config.vocab_size:
        raise DataError(
            expected=f"a tokenizer with at most {config.vocab_size} tokens", found=f"{tokenizer.vocab_size}", fix="use the tokenizer the model was trained with"
        )
    target = checkpoint_folder(work.path, 0)
    store.save(target, chunks, None, {"step": 0, "tokens": 0}, ctx)
    manifest = TrainManifest(
        objective="imported", checkpoints=[CheckpointRecord(step=0, tokens=0, path=f"{CHECKPOINTS_FOLDER}/{target.name}")], final=0, steps=0, tokens=0,
        tokens_before=0, seq_length=config.max_positions, global_batch=0, optimizer={}, data_cursors={}, data_seed=0, shards="", tokenizer=tokenizer.sha256, sources={},
        skipped_steps=[], layout=LayoutConfig().plain(), precision="fp32",
    )
    io.atomic_write_json(work.path / MODEL_FILE, config.plain())
    io.atomic_write_json(work.path / TRAIN_FILE, manifest.plain())
    for journal in (METRICS_FILE, LEDGER_FILE):
        io.atomic_write_text(work.path / journal, "")
    return work.complete({"objective": "imported", "parameters": config.parameters()})


def import_tokenizer(folder: Path, target: Path) -> Tokenizer:
    """Copy the tokenizer of a Hugging Face folder and describe it. Raises DataError when there is none this project reads."""
    described: dict[str, Any] = io.read_json(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).is_file() else {}
    for name, backend in _TOKENIZER_FILES:
        if (folder / name).is_file():
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, target / name)
            tokens = {role: _name(described.get(f"{role}_token")) for role in ("bos", "eos", "pad")}
            return write_info(target, name, backend, {"kind": "imported"}, **tokens)  # type: ignore[arg-type]
    raise DataError(
        expected=f"{' or '.join(name for name, _ in _TOKENIZER_FILES)} in {folder}", found="neither", fix="save the tokenizer into the folder with save_pretrained"
    )


def _name(token: Any) -> str | None:
    """A special token's text; older files store a record instead of the text."""
    return token.get("content") if isinstance(token, dict) else token
