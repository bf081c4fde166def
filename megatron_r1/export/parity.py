"""The proof that the exported folder is the trained model.

Both sides run in fp32 on the same tokens: the trainer's own forward pass (model/forward.py) and transformers'
Llama4ForCausalLM loaded from the folder without custom code and without network. Compared are all logits of every prompt,
the greedy continuation, the tokens of every prompt and the chat template. The largest logit difference must stay within the
tolerance; the continuations must be equal. Where two tokens are so close that the measured rounding (twice the largest logit
difference) decides between them, the continuation is compared up to there, and the tie is counted in the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_r1.export.config import ParityConfig
from megatron_r1.model.forward import logits as trainer_logits
from megatron_r1.model.generate import generate, whole
from megatron_r1.utils.errors import CheckpointError

CONVERSATION = [
    {"role": "system", "content": "You are a careful assistant."},
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "2 + 3 = 5"},
    {"role": "user", "content": "And 4 + 5?\n"},
]


@torch.no_grad()
def prove(folder: Path, model: Any, tokenizer: Any, config: ParityConfig) -> dict[str, Any]:
    """Compare `folder` with the megatron-core `model` (already rounded to the stored type). Returns the report; see `require`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # ours are the ones to show
    exported = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False).eval()
    hf_tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    device = next(whole(model).parameters()).device
    exported.to(device)
    largest, rows = 0.0, []
    prompts = [tokenizer.encode(text) for text in config.prompts]
    for text, ids in zip(config.prompts, prompts, strict=True):
        tokens = torch.tensor([ids], device=device)
        ours, theirs = trainer_logits(model, tokens).float(), exported(input_ids=tokens).logits.float()
        difference = float((ours - theirs[..., : ours.shape[-1]]).abs().max())
        largest = max(largest, difference)
        rows.append({"prompt": text, "tokens": len(ids), "largest_logit_difference": difference, "largest_logit": float(ours.abs().max())})
    continuations = generate(model, prompts, config.greedy_tokens)
    for row, ids, ours in zip(rows, prompts, continuations, strict=True):
        row |= _greedy(model, exported, ids, ours, 2 * largest)
    report = {
        "architecture": type(exported).__name__,
        "tolerance": config.tolerance,
        "largest_logit_difference": largest,
        "logits_within_tolerance": largest <= config.tolerance,
        "greedy_tokens": config.greedy_tokens,
        "greedy_equal": all(row["greedy_equal"] for row in rows),
        "ties": sum(row["tie_at"] is not None for row in rows),
        "tokenizer_equal": all(list(hf_tokenizer(text, add_special_tokens=False)["input_ids"]) == list(ids) for text, ids in zip(config.prompts, prompts, strict=True)),
        "chat_template_equal": _chat(tokenizer, hf_tokenizer),
        "prompts": rows,
    }
    report["passed"] = bool(
        report["logits_within_tolerance"] and report["greedy_equal"] and report["tokenizer_equal"] and report["chat_template_equal"] is not False
    )
    return report


def require(report: dict[str, Any]) -> None:
    """Raise CheckpointError unless the proof holds."""
    if report["passed"]:
        return
    failed = []
    if not report["logits_within_tolerance"]:
        failed.append(f"logits differ by {report['largest_logit_difference']:.3g}")
    for key, text in (("greedy_equal", "greedy continuations differ"), ("tokenizer_equal", "tokens differ"), ("chat_template_equal", "chat templates differ")):
        if report[key] is False:
            failed.append(text)
    raise CheckpointError(
        expected=f"the exported model to be the trained one (fp32 logits within {report['tolerance']:g}, {report['greedy_tokens']} equal greedy tokens)",
        found="; ".join(failed),
        fix="the export is kept out of the run; see parity.json in the unfinished folder. If only the tolerance is at stake, set parity.tolerance",
    )


def _greedy(model: Any, exported: Any, prompt: Sequence[int], ours: list[int], tie: float) -> dict[str, Any]:
    """Compare greedy continuations. `tie`: logits closer than this are decided by rounding."""
    device = next(exported.parameters()).device
    tokens = torch.tensor([list(prompt)], device=device)
    out = exported.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=len(ours), min_new_tokens=len(ours), do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )
    theirs = out[0, len(prompt) :].tolist()
    if theirs == ours:
        return {"greedy_equal": True, "tie_at": None}
    first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    if first < min(len(ours), len(theirs)):
        here: Tensor = trainer_logits(model, torch.tensor([[*prompt, *ours[:first]]], device=device))[0, -1]
        if abs(float(here[ours[first]] - here[theirs[first]])) <= tie:
            return {"greedy_equal": True, "tie_at": first}
    return {"greedy_equal": False, "tie_at": None, "first_difference": first}


def _chat(tokenizer: Any, hf_tokenizer: Any) -> bool | None:
    """Whether both render a conversation to the same tokens; None when the tokenizer has no chat template."""
    if tokenizer.chat_template is None:
        return None
    from megatron_r1.data.chat import render

    equal = True
    for generation in (False, True):
        ours, _ = render(CONVERSATION, tokenizer, add_generation_prompt=generation)
        theirs = hf_tokenizer.apply_chat_template(CONVERSATION, add_generation_prompt=generation, tokenize=True, return_dict=False)
        equal &= list(ours) == list(theirs)
    return bool(equal)
