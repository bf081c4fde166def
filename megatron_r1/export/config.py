"""Settings of the export stage. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from megatron_r1.config.base import Frozen, StageConfig, StepName

# One per kind of text the recipe trains on, so that the parity proof does not rest on one domain's tokens.
PARITY_PROMPTS = (
    "def fibonacci(n):\n    ",
    "Question: What is 12 + 30? Answer:",
    "The capital of France is",
    "In 1905, Albert Einstein published four papers that changed physics:",
)


class ExportInputs(Frozen):
    """What an export reads."""

    checkpoint: StepName = Field(description="train step whose final checkpoint is exported")
    evaluation: StepName | None = Field(None, description="evaluate step whose results the model card shows")


class ParityConfig(Frozen):
    """The proof that the exported model is the trained model."""

    prompts: list[str] = Field(default=list(PARITY_PROMPTS), description="texts whose logits and greedy continuations are compared")
    tolerance: float = Field(1e-4, gt=0, description="largest allowed absolute difference of a fp32 logit; above it the stage fails")
    greedy_tokens: int = Field(64, gt=0, description="tokens of the greedy continuation that must be equal")

    @field_validator("prompts")
    @classmethod
    def _some(cls, prompts: list[str]) -> list[str]:
        if not prompts or not all(prompts):
            raise ValueError("expected at least one non-empty prompt; found none; the proof needs something to compare")
        return prompts


class ExportConfig(StageConfig):
    """Write a folder that transformers loads as Llama4ForCausalLM, and prove it is the same model."""

    stage: Literal["export"] = Field("export", description="which stage this step runs")
    inputs: ExportInputs = Field(description="steps this one reads")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="type of the stored weights; bfloat16 rounds, and parity is then proven against the rounded weights")
    parity: ParityConfig = Field(default=ParityConfig(), description="the parity proof; it always runs")


def describe(config: ExportConfig) -> str:
    """One line for --dry-run."""
    return (
        f"export {config.inputs.checkpoint} to a Hugging Face folder ({config.dtype}); prove logits within {config.parity.tolerance:g} "
        f"and {config.parity.greedy_tokens} equal greedy tokens on {len(config.parity.prompts)} prompts"
    )
