"""Two evaluations of the same prompts, compared item by item."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from megatron_r1.config.base import Frozen
from megatron_r1.evaluate.intervals import bootstrap_ratio
from megatron_r1.evaluate.results import Measurement
from megatron_r1.utils.errors import ArtifactError


class Difference(Frozen):
    """This model minus the baseline on one result, items paired."""

    task: str = Field(description="as in the results")
    metric: str = Field(description="as in the results")
    baseline: float = Field(description="value of the baseline")
    value: float = Field(description="value of this model")
    difference: float = Field(description="value - baseline")
    low: float = Field(description="lower end of the difference's 95 % interval (paired bootstrap over items)")
    high: float = Field(description="upper end of the difference's 95 % interval")
    n: int = Field(description="items")


def compare(measured: list[Measurement], before: list[Measurement], draws: int, rng: np.random.Generator) -> list[Difference]:
    """Differences of the results both evaluations have.

    Raises ArtifactError when a result was measured on other prompts: such numbers do not compare.
    """
    baseline = {(m.result.task, m.result.metric): m for m in before}
    differences = []
    for new in measured:
        result = new.result
        old = baseline.get((result.task, result.metric))
        if old is None:
            continue
        if old.result.prompt_sha256 != result.prompt_sha256:
            raise ArtifactError(
                expected=f"a baseline whose {result.task} ({result.metric}) was measured on the same prompts",
                found=f"prompt hash {old.result.prompt_sha256[:12]}... there, {result.prompt_sha256[:12]}... here",
                fix="evaluate both with the same task settings, seed, tokenizer and shards, or remove the baseline input",
            )
        low, high = bootstrap_ratio(np.subtract(new.numerators, old.numerators), np.asarray(new.denominators), draws, rng)
        differences.append(
            Difference(
                task=result.task, metric=result.metric, baseline=old.result.value, value=result.value, difference=result.value - old.result.value,
                low=low, high=high, n=result.n,
            )
        )
    return differences
