"""Write a folder that transformers, llama.cpp and vLLM converters read as Llama4ForCausalLM."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_r1.export.sentencepiece_json import convert
from megatron_r1.model.config import ModelConfig
from megatron_r1.model.hf_map import hf_config, to_hf
from megatron_r1.utils import io
from megatron_r1.utils.errors import DataError

WEIGHTS, CONFIG, GENERATION, TOKENIZER_CONFIG = "model.safetensors", "config.json", "generation_config.json", "tokenizer_config.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def write_hf_folder(folder: Path, state: Mapping[str, Any], config: ModelConfig, tokenizer: Any, dtype: str) -> None:
    """Weights, configuration, tokenizer and generation defaults under `folder` (made; existing files are replaced).

    `state`: megatron-core state dict of the whole model. `tokenizer`: data/tokenizer.py.
    Raises DataError when the tokenizer has more tokens than the model has rows, CheckpointError when the state does not fit.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise DataError(
            expected=f"a tokenizer with at most {config.vocab_size} tokens (rows of the embedding)", found=f"{tokenizer.vocab_size} tokens",
            fix="export with the tokenizer the model was trained on",
        )
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.to("cpu", DTYPES[dtype]) for name, tensor in to_hf(state, config).items()}
    io.require_free_space(folder, sum(tensor.numel() * tensor.element_size() for tensor in weights.values()))
    with io.disk_errors(folder):
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    ends = end_ids(tokenizer)
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None), "pad_token_id": tokenizer.pad_id}
    io.atomic_write_json(folder / CONFIG, hf_config(config, dtype=dtype, **special))
    io.atomic_write_json(folder / GENERATION, {key: value for key, value in special.items() if value is not None} | {"do_sample": False})
    write_tokenizer(folder, tokenizer, config)


def end_ids(tokenizer: Any) -> list[int]:
    """Tokens that end a text or a turn, the end of text first; empty when the tokenizer has neither."""
    return list(dict.fromkeys(i for i in (tokenizer.eos_id, tokenizer.end_of_turn_id) if i is not None))


def write_tokenizer(folder: Path, tokenizer: Any, config: ModelConfig) -> None:
    """Copy the tokenizer's own files and describe it so that AutoTokenizer needs no guess."""
    for source in tokenizer.hf_files:
        shutil.copyfile(source, folder / source.name)
    if tokenizer.info.backend == "sentencepiece":
        convert(tokenizer.folder / tokenizer.info.file).save(str(folder / "tokenizer.json"))
    path = folder / TOKENIZER_CONFIG
    described = io.read_json(path) if path.exists() else {}
    for name, token in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id), ("pad_token", tokenizer.pad_id)):
        if token is not None:
            described[name] = tokenizer.special_name(token)
    described |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.max_positions}
    if tokenizer.chat_template is not None:
        described["chat_template"] = tokenizer.chat_template
    io.atomic_write_json(path, described)


def rounded(state: Mapping[str, Any], dtype: str) -> dict[str, Tensor]:
    """The state as a reader of the export will see it: rounded to the stored type, held in fp32."""
    return {name: value.to(DTYPES[dtype]).float() for name, value in state.items() if isinstance(value, Tensor)}
