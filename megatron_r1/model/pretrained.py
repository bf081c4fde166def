"""Published models through transformers: language models, and classifiers with one output.

Legend: b rows, s tokens, d hidden size, V vocabulary, n positions, v columns asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_r1.utils.errors import DataError, EnvironmentProblem
from megatron_r1.utils.logging import get_logger, human

log = get_logger("model.pretrained")


def load_language_model(weights: Path, gguf: bool, precision: str, device: torch.device) -> tuple[Any, Any]:
    """(model, tokenizer), frozen, on `device`. `weights`: the folder, or the file where it is a GGUF. `precision`: fp32 | bf16.

    Raises EnvironmentProblem without transformers, DataError when files are missing, damaged or not of one model.
    """
    transformers = _transformers()
    folder, extra = (weights.parent, {"gguf_file": weights.name}) if gguf else (weights, {})
    with _reading(weights):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, **extra)
    if not gguf:
        extra = {"use_safetensors": True}
    elif hasattr(transformers, "GgufConfig"):
        # Without this transformers 5 keeps the quantised blocks, which have no usual weights and are many times slower;
        # transformers 4 always dequantises.
        extra["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _reading(weights):
        model, found = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, attn_implementation="sdpa", output_loading_info=True, **extra)
    # Of a tensor with several names, a tied head and the embedding, one is enough. What is under none of its names in the files has random numbers.
    named, missing = dict(model.named_parameters(remove_duplicate=False)), set(found["missing_keys"])
    there = {id(tensor) for name, tensor in named.items() if name not in missing}
    absent = sorted(name for name in missing if id(named.get(name)) not in there)
    if absent:
        raise DataError(expected=f"all weights of {type(model).__name__} in {weights}", found=f"no {', '.join(absent[:4])}", fix="copy the model again, config.json and weights together")
    return _frozen(model, weights.name, precision, device), tokenizer


def load_classifier(folder: Path, device: torch.device) -> tuple[Any, Any]:
    """(sequence classifier, tokenizer) of a folder, frozen, fp32. Raises EnvironmentProblem without transformers."""
    transformers = _transformers()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    return _frozen(model, folder.name, "fp32", device), tokenizer


class HeadApart:
    """A causal language model of transformers in two parts, so that its logits need not exist as a whole.

    logits = soft cap of (scale * (states after the last norm @ head weight.T + head bias)); scale and cap are what Cohere
    (logit_scale), Granite (logits_scaling), Falcon-H1 (lm_head_multiplier) and Gemma (final_logit_softcapping) have of these.
    That this is all is checked on a few tokens at construction. Raises EnvironmentProblem when it is not.
    """

    def __init__(self, model: Any) -> None:
        text = model.config.get_text_config()
        head = model.get_output_embeddings()
        self.model, self.weight, self.bias = model, head.weight, getattr(head, "bias", None)
        decoder = model.get_decoder()
        self.decoder = decoder if decoder is not model else model.model  # Llama 4's text model names it only so
        self.scale = (getattr(text, "logit_scale", None) or 1.0) * (getattr(text, "lm_head_multiplier", None) or 1.0) / (getattr(text, "logits_scaling", None) or 1.0)
        self.cap: float | None = getattr(text, "final_logit_softcapping", None)
        tokens = torch.arange(16, device=self.weight.device)[None] * 31 % self.vocab_size
        with torch.no_grad():
            whole = model(input_ids=tokens, use_cache=False).logits.float()
            error = (self.logits(self.states(tokens).flatten(0, 1), 0, self.vocab_size).float() - whole[0]).abs().max() / whole.abs().max().clamp(min=1e-9)
        # Rounding in half precision is 2^-8.
        if not error < (1e-4 if self.weight.dtype == torch.float32 else 3e-2):
            raise EnvironmentProblem(
                expected="logits that are the last hidden states times the output matrix (with the bias, scale or soft cap transformers names)",
                found=f"{type(model).__name__}, whose logits differ by {float(error):.1g} of the largest from that",
                fix="choose a model with another head: without this its logits of a whole batch would have to be in memory at once",
            )

    @property
    def vocab_size(self) -> int:
        """V: rows of the head."""
        return int(self.weight.shape[0])

    @torch.no_grad()
    def states(self, tokens: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        """tokens [b, s] -> what the head gets, [b, s, d]. `segment_ids` [b, s]: attention and positions restart where they change.

        Documents are run as sequences of their own, longest first, several at a time: no mask of s x s entries, and what the model
        itself does about long sequences (windows, chunks) stays as it is. Causal attention never looks at the padding, which is on the right.
        """
        if segment_ids is None:
            return self.decoder(input_ids=tokens, use_cache=False).last_hidden_state
        first = torch.ones_like(segment_ids, dtype=torch.bool)
        first[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
        starts = first.flatten().nonzero().squeeze(1).tolist()
        spans = sorted(zip(starts, [*starts[1:], tokens.numel()], strict=True), key=lambda span: span[0] - span[1])
        flat, found = tokens.flatten(), None
        while spans:
            width = spans[0][1] - spans[0][0]
            # At most as many tokens as the batch has, and documents at least half as long as the first: less than half is padding.
            group = [span for span in spans[: tokens.numel() // width] if 2 * (span[1] - span[0]) >= width]
            spans = spans[len(group) :]
            padded = flat.new_zeros(len(group), width)
            for row, (a, b) in enumerate(group):
                padded[row, : b - a] = flat[a:b]
            states = self.decoder(input_ids=padded, use_cache=False).last_hidden_state
            found = states.new_empty(flat.numel(), states.shape[-1]) if found is None else found
            for row, (a, b) in enumerate(group):
                found[a:b] = states[row, : b - a]
        assert found is not None  # a batch has at least one document
        return found.view(*tokens.shape, -1)

    @torch.no_grad()
    def logits(self, states: Tensor, start: int, end: int) -> Tensor:
        """Columns `start` to `end` of the logits of states [n, d]: [n, v]."""
        z = torch.nn.functional.linear(states, self.weight[start:end], None if self.bias is None else self.bias[start:end])
        if self.scale != 1.0:
            z *= self.scale
        return z if self.cap is None else z.div_(self.cap).tanh_().mul_(self.cap)


@contextmanager
def _reading(weights: Path) -> Iterator[None]:
    """What transformers, tokenizers and safetensors raise about files of a user's becomes a DataError."""
    try:
        yield
    except Exception as error:  # no common base, and not all documented
        reason = (str(error).strip() or "no message").splitlines()[0]
        raise DataError(
            expected=f"a causal language model and its tokenizer that transformers can load in {weights}", found=f"{type(error).__name__}: {reason[:300]}",
            fix="copy the whole folder again (config.json, tokenizer files, all *.safetensors); AutoModelForCausalLM.from_pretrained must load it",
        ) from error


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
