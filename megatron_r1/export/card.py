"""The model card: what this model is, what it was made from, what was measured, what it is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_r1 import __version__
from megatron_r1.artifacts.base import Artifact
from megatron_r1.artifacts.checkpoint import CheckpointSet
from megatron_r1.model.config import ModelConfig

_SHOWN = 40


def model_card(checkpoint: CheckpointSet, config: ModelConfig, dtype: str, parity: Mapping[str, Any], evaluation: Artifact | None) -> str:
    """README.md of the exported folder."""
    artifact = checkpoint.artifact
    manifest = artifact.manifest
    parts = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [megatron-core, mobilellm-r1, llama4_text]",
        "---",
        f"# {artifact.name}",
        "",
        f"A dense decoder of {config.parameters():,} parameters ({config.num_layers} layers, width {config.hidden_size}, {config.num_heads} query and "
        f"{config.num_kv_heads} key/value heads, feed-forward {config.ffn_size}, vocabulary {config.vocab_size:,}), trained with megatron_r1 {__version__} by the "
        "MobileLLM-R1 recipe (arXiv 2509.24945) and stored as `Llama4ForCausalLM`. It loads without custom code:",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
        "```",
        "",
        "## Where it comes from",
        "",
        f"- Training step: `{artifact.name}`, fingerprint `{artifact.fingerprint}`",
        *(f"- Its input `{role}`: {_parents(parent)}" for role, parent in sorted(manifest.parents.items())),
        f"- Objective: {checkpoint.manifest.objective}; {checkpoint.final.step:,} steps, {checkpoint.final.tokens:,} tokens in this step"
        + (f" after {checkpoint.manifest.tokens_before:,} tokens in earlier ones" if checkpoint.manifest.tokens_before else ""),
        f"- Weights stored as {dtype}; the shares of the data asked for: {_shares(checkpoint.manifest.sources)}",
        f"- Made by: `{manifest.command or 'the Python interface'}` on {manifest.machine.get('cpu', 'an unnamed machine')}",
        "",
        "## Is it the trained model?",
        "",
        f"Loaded with transformers in fp32, the largest difference to the trainer's logits over {len(parity['prompts'])} prompts is "
        f"{parity['largest_logit_difference']:.2g} (tolerance {parity['tolerance']:g}); the greedy continuations of {parity['greedy_tokens']} tokens are equal"
        + (f" up to {parity['ties']} tie(s) that rounding decides" if parity["ties"] else "")
        + ".",
        "",
        "## What was measured",
        "",
        *(_results(evaluation) if evaluation is not None else ["No evaluation was given to this export."]),
        "",
        "## What it is not",
        "",
        "- Not an assistant: no safety training of any kind; it may write anything its training text contains.",
        f"- Trained on {checkpoint.final.tokens + checkpoint.manifest.tokens_before:,} tokens. Facts, arithmetic and code it writes are to be checked; "
        "the table above, with its intervals and chance levels, is all that is claimed.",
        f"- Trained on sequences of {checkpoint.manifest.seq_length:,} tokens; longer texts than that are untested"
        + (f" (declared length: {config.max_positions:,})." if config.max_positions != checkpoint.manifest.seq_length else "."),
        "- The licence of the training text applies to what it was trained on: see `sources.json` of the corpus step. This folder sets no licence for the weights.",
        "",
    ]
    return "\n".join(parts)


def _parents(parent: Any) -> str:
    several = parent if isinstance(parent, list) else [parent]
    return ", ".join(f"`{one.name}` ({one.kind}, `{one.fingerprint[:16]}`)" for one in several)


def _shares(sources: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {100 * share:.1f} %" for name, share in sorted(sources.items(), key=lambda item: -item[1])) or "not recorded"


def _results(evaluation: Artifact) -> list[str]:
    record = evaluation.json("evaluation.json")
    lines = [
        f"From the evaluation `{evaluation.name}` (`{evaluation.fingerprint[:16]}`) of `{record['checkpoint']['name']}`; intervals are 95 %.",
        "",
        "| task | metric | value | interval | n | chance |",
        "|---|---|---|---|---|---|",
    ]
    for r in record["results"][:_SHOWN]:
        chance = "-" if r["chance"] is None else f"{r['chance']:.3g}"
        lines.append(f"| {r['task']} | {r['metric']} | {r['value']:.4g} | {r['low']:.4g} to {r['high']:.4g} | {r['n']} | {chance} |")
    if len(record["results"]) > _SHOWN:
        lines.append(f"\n{len(record['results']) - _SHOWN} more in evaluation.json.")
    lines += [f"\nDropped: {d['task']} ({d['reason']})." for d in record.get("dropped", [])]
    return lines
