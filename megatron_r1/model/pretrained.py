"""Published models through transformers: language models, and classifiers with one output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_r1.utils.errors import EnvironmentProblem
from megatron_r1.utils.logging import get_logger, human

log = get_logger("model.pretrained")


def load_language_model(weights: Path, gguf: bool, precision: str, device: torch.device) -> tuple[Any, Any]:
    """(model, tokenizer), frozen, on `device`. `weights`: the folder, or the file where it is a GGUF. `precision`: fp32 | bf16.

    Raises EnvironmentProblem without transformers.
    """
    transformers = _transformers()
    folder, extra = (weights.parent, {"gguf_file": weights.name}) if gguf else (weights, {})
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, **extra)
    if not gguf:
        extra = {"use_safetensors": True}
    elif hasattr(transformers, "GgufConfig"):
        # Without this transformers 5 keeps the quantised blocks, which have no usual weights and are many times slower;
        # transformers 4 always dequantises.
        extra["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, attn_implementation="sdpa", **extra)
    return _frozen(model, weights.name, precision, device), tokenizer


def load_classifier(folder: Path, device: torch.device) -> tuple[Any, Any]:
    """(sequence classifier, tokenizer) of a folder, frozen, fp32. Raises EnvironmentProblem without transformers."""
    transformers = _transformers()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    return _frozen(model, folder.name, "fp32", device), tokenizer


def _transformers() -> Any:
    try:
        import transformers
        from transformers.utils.logging import disable_progress_bar
    except ImportError as error:
        raise EnvironmentProblem(expected="the transformers package, which loads published models", found=str(error), fix="pip install transformers") from error
    disable_progress_bar()
    return transformers


def _frozen(model: Any, name: str, precision: str, device: torch.device) -> Any:
    model = model.to(device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32).eval().requires_grad_(False)
    log.info("%s: %s parameters, %s", name, human(sum(p.numel() for p in model.parameters())), precision)
    return model
