"""Settings of the evaluate stage. Torch-free.

Each task has its own typed settings; `null` (or leaving a task out of `only`) switches it off. Defaults fit a model of a
few million parameters on two CPU cores (all tasks together: about 20 seconds).
"""

from __future__ import annotations

import difflib
from typing import Literal

from pydantic import Field, field_validator

from megatron_r1.config.base import Frozen, StageConfig, StepName
from megatron_r1.data.tasks import TASKS

DEFAULT_GENERATED = ("chain_sum", "basic_arithmetic", "simple_equations", "gcd", "count_bits", "spell_backward", "calendar_arithmetic", "syllogism", "gsm_symbolic")


class EvaluateInputs(Frozen):
    """What an evaluation reads."""

    checkpoint: StepName = Field(description="train step whose final checkpoint is evaluated")
    shards: StepName | None = Field(None, description="corpus step whose held-out `test` documents give bits per byte; without it that task is an error unless it is null")
    baseline: StepName | None = Field(None, description="earlier evaluate step to compare with, item by item; refused when the prompts differ")


class BitsPerByteSettings(Frozen):
    """Held-out text, per source and per domain."""

    documents: int = Field(32, gt=0, description="held-out documents scored per source, drawn with the step's seed (all of them when there are fewer)")
    windows_per_document: int = Field(1, gt=0, description="windows scored per document; a longer document gives that many, drawn with the step's seed")
    seq_length: int = Field(256, gt=1, description="tokens of one window")
    sources: list[str] | None = Field(None, description="sources to score; by default every text source of the shards with held-out documents, distractors excepted")


class GeneratedSettings(Frozen):
    """Procedurally generated questions whose answers are verified, held out by template."""

    names: list[str] = Field(default=list(DEFAULT_GENERATED), description="task names (data/tasks.py)")
    samples: int = Field(64, gt=0, description="questions per task")
    max_new_tokens: int = Field(64, gt=0, description="longest answer in tokens")

    @field_validator("names")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        if len(set(names)) != len(names) or not names:
            raise ValueError(f"expected distinct task names, at least one; found {names}; remove the repetition or set `generated: null`")
        for name in names:
            if name not in TASKS:
                near = difflib.get_close_matches(name, TASKS, n=1)
                hint = f"did you mean {near[0]!r}?" if near else "use one of these"
                raise ValueError(f"expected names among {', '.join(TASKS)}; found {name!r}; {hint}")
        return names


class CountryMcqSettings(Frozen):
    """Four-way multiple choice about countries by likelihood; held-out countries are the control."""

    questions: int = Field(120, ge=4, description="questions about countries of the training split, in blocks of four")
    control_questions: int = Field(120, ge=4, description="questions about held-out countries, which must stay at chance; fewer when these countries have fewer facts")


class HumanEvalRankingSettings(Frozen):
    """The true solution of a HumanEval problem against three other problems' solutions, by likelihood."""

    problems: int = Field(164, gt=0, le=164, description="problems ranked, the first ones of the set")
    max_tokens: int = Field(128, gt=8, description="tokens of prompt and solution together; longer prompts lose their beginning, longer solutions their end")


class HumanEvalPassSettings(Frozen):
    """HumanEval pass@1 with greedy decoding: generated code is run against the problem's tests."""

    problems: int = Field(164, gt=0, le=164, description="problems attempted, the first ones of the set")
    max_new_tokens: int = Field(64, gt=0, description="longest completion in tokens")
    timeout_seconds: float = Field(3.0, gt=0, description="processor-time limit of one problem's tests (whole seconds, rounded up)")
    memory_mib: int = Field(512, gt=0, description="address-space limit of the process that runs one problem's tests")


class TaskSettings(Frozen):
    """Which tasks run, and how; null switches one off."""

    bits_per_byte: BitsPerByteSettings | None = Field(default=BitsPerByteSettings(), description="bits per byte on held-out text")
    generated: GeneratedSettings | None = Field(default=GeneratedSettings(), description="generated questions with verified answers")
    country_mcq: CountryMcqSettings | None = Field(default=CountryMcqSettings(), description="multiple choice about countries, with a held-out control")
    humaneval_ranking: HumanEvalRankingSettings | None = Field(default=HumanEvalRankingSettings(), description="ranking of HumanEval solutions")
    humaneval_pass: HumanEvalPassSettings | None = Field(default=HumanEvalPassSettings(), description="HumanEval pass@1; needs allow_code_execution")


class EvaluateConfig(StageConfig):
    """Measure one checkpoint: every number with n and a 95 % confidence interval."""

    stage: Literal["evaluate"] = Field("evaluate", description="which stage this step runs")
    inputs: EvaluateInputs = Field(description="steps this one reads")
    tasks: TaskSettings = Field(default=TaskSettings(), description="tasks and their limits")
    allow_code_execution: bool = Field(
        False, description="run code the model generated (humaneval_pass) in a limited process; a guard, not a security boundary (evaluate/sandbox.py)"
    )
    bootstrap: int = Field(1000, ge=100, description="resamples of a bootstrap interval")
    batch_size: int = Field(64, gt=0, description="sequences generated at once")
    tokens_per_batch: int = Field(8192, gt=0, description="padded tokens of one scoring batch (bounds memory: the logits are tokens x vocabulary)")


def enabled(config: EvaluateConfig) -> list[str]:
    """Names of the tasks that are switched on, in their fixed order."""
    return [name for name in TaskSettings.model_fields if getattr(config.tasks, name) is not None]


def describe(config: EvaluateConfig) -> str:
    """One line for --dry-run."""
    code = "" if config.tasks.humaneval_pass is None or config.allow_code_execution else " (generated code is not run: allow_code_execution is false)"
    compared = f", compared with {config.inputs.baseline}" if config.inputs.baseline else ""
    return f"evaluate {config.inputs.checkpoint} on {', '.join(enabled(config)) or 'nothing'}{code}{compared}"
